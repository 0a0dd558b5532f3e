"""Authentication of all requests: their owner, refusals, and security headers."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.storage.jobs import is_id, new_id

# The page may talk to this server and to nobody else; 'unsafe-eval' is needed by gr.HTML's templates.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self' blob: data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
VISITOR = "lvdm_visitor"  # the cookie that identifies a browser where there are no passwords
OWNER = "lvdm_owner"  # the key of the owner in a request's scope
EVENTS = "/gradio_api/run/"  # the events of the page
ANONYMOUS = "api"  # the owner of requests without a user and a cookie


class AuthMiddleware:
    """Requires the password everywhere, refuses writes from other sites, sets security headers, and puts the owner of
    a request into its scope: the user, or else the browser."""

    def __init__(self, app: ASGIApp, credentials: Mapping[str, str]):
        self.app = app
        self._credentials = {user.encode(): password.encode() for user, password in credentials.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal, owner, fresh = self._refuse(scope, headers), ANONYMOUS, False
        if self._credentials:
            owner = self._user(headers) or ""
        elif (visitor := _visitor(headers)) is not None:
            owner = visitor
        elif scope.get("method") == "GET" and scope.get("path") == "/":
            owner, fresh = new_id(), True
        scope[OWNER] = owner

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] == 500 and scope["path"].startswith(EVENTS):
                    message["status"] = 400  # Gradio's status for an event with invalid data
                out = MutableHeaders(scope=message)
                out["Content-Security-Policy"] = POLICY
                out["X-Content-Type-Options"] = "nosniff"
                out["Referrer-Policy"] = "same-origin"
                if fresh:
                    out.append("Set-Cookie", f"{VISITOR}={owner}; Path=/; Max-Age=31536000; HttpOnly; SameSite=Lax")
            await send(message)

        await (refusal or self.app)(scope, receive, send_safely)

    def _refuse(self, scope: Scope, headers: Headers) -> Response | None:
        if scope["type"] != "http":
            return Response(status_code=403)  # no WebSocket is used
        if self._credentials and self._user(headers) is None:
            challenge = {"WWW-Authenticate": 'Basic realm="lvdm-app", charset="UTF-8"'}
            return Response("A password is needed.", 401, challenge)
        origin = headers.get("origin")
        is_write = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if is_write and origin and not _same_origin(origin, headers.get("host")):
            return Response("Requests from other sites are refused.", 403)
        return None

    def _user(self, headers: Headers) -> str | None:
        """Return the user, if name and password are correct."""
        scheme, _, encoded = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "basic":
            return None
        try:
            user, _, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
            expected = self._credentials.get(user)
            correct = secrets.compare_digest(password, expected if expected is not None else secrets.token_bytes(16))
            return user.decode() if correct and expected is not None else None
        except (binascii.Error, ValueError):
            return None


def _same_origin(origin: str, host: str | None) -> bool:
    try:
        return urlsplit(origin).netloc == host
    except ValueError:
        return False


def _visitor(headers: Headers) -> str | None:
    """Return the visitor's id from the cookie, if it is valid."""
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(VISITOR)
    except CookieError:
        return None
    return cookie.value if cookie is not None and is_id(cookie.value) else None
