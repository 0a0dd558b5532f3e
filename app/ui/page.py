"""What the tabs share: the service, the owner of a request, and views that poll the store."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import gradio as gr
import pandas as pd
from gradio.utils import get_upload_folder

from app.api.auth import ANONYMOUS, OWNER
from app.api.service import JobService
from app.ui.html.job import notice
from odvae.utils.errors import UserError

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
TICK = 0.7  # seconds between two polls of the store; each takes milliseconds and sends only what has changed

# Options of the page's own events: not in the API, no progress overlay, not queued by Gradio.
SILENT_EVENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


class Page:
    """The page. Each tab's `build(page)` adds its components and events inside the open Blocks."""

    def __init__(self, service: JobService, blocks: gr.Blocks) -> None:
        self.service, self.blocks = service, blocks
        self.tabs: gr.Tabs | None = None
        self.form: Any = None  # of the Generate tab, which the History tab fills
        self._views: list[View] = []

    def poll(self, update: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> dict[str, Any]:
        """Update components by `update(*inputs, request: gr.Request)` on load and on every tick. It returns a value for
        each output; only changes are sent. Returns the arguments of the event, to refresh at once after a click:
        `button.click(...).success(**page.poll(...))`."""
        view = View(update, inputs, outputs)
        self._views.append(view)
        event = _event(update.__name__, view.refresh, view)
        self.blocks.load(**event)
        return event

    def poll_on(self, timer: gr.Timer) -> None:
        """Poll all views on every tick, in one request."""
        views = list(self._views)
        errors: dict[str, str] = {}  # logged once, not at every tick

        def tick(request: gr.Request, *values: Any) -> tuple[Any, ...]:
            updates: list[Any] = []
            for view in views:
                inputs, values = values[: len(view.inputs)], values[len(view.inputs):]
                try:
                    updates += view.refresh(request, *inputs)
                    errors.pop(view.update.__qualname__, None)
                except Exception as error:  # an error in one tab must not stop the others
                    if errors.get(view.update.__qualname__) != repr(error):
                        logger.exception("cannot update %s", view.update.__qualname__)
                    errors[view.update.__qualname__] = repr(error)
                    updates += [gr.skip() for _ in view.outputs]
            return tuple(updates)

        timer.tick(**_event("tick", tick, *views))


class View:
    """Components that show the state of the store.

    Attributes:
        update: returns their values, see `Page.poll`.
        inputs, outputs: of the event; the last of each holds the digests of the values that were sent before.
    """

    def __init__(self, update: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        digests = gr.State({})
        self.update, self.inputs, self.outputs = update, [*inputs, digests], [*outputs, digests]

    def refresh(self, request: gr.Request, *values: Any) -> tuple[Any, ...]:
        """Return the changed values, `gr.skip()` for the others, and the digests of all."""
        *inputs, sent_before = values
        updates = self.update(*inputs, request=request)
        updates = updates if len(self.outputs) > 2 else (updates,)
        digests = [hashlib.sha1(json.dumps(value, default=_serialize).encode()).hexdigest() for value in updates]
        sent = [value if sent_before.get(str(i)) != digest else gr.skip()
                for i, (value, digest) in enumerate(zip(updates, digests, strict=True))]
        return *sent, {str(i): digest for i, digest in enumerate(digests)}


def _serialize(value: Any) -> str:
    return value.to_json() if isinstance(value, pd.DataFrame) else repr(value)


def _event(name: str, fn: Callable[..., Any], *views: View) -> dict[str, Any]:
    # Gradio passes the request by position, by the annotation of the function itself: so no `wraps`.
    def handler(request: gr.Request, *values: Any) -> tuple[Any, ...]:
        return cast(tuple[Any, ...], fn(request, *values))

    handler.__name__ = name
    handler.__annotations__ = {"request": gr.Request}
    return {"fn": handler, "inputs": [item for view in views for item in view.inputs],
            "outputs": [item for view in views for item in view.outputs], **SILENT_EVENT}


def owner_of(request: gr.Request) -> str:
    """Return the owner that `AuthMiddleware` found: the user's name or, without passwords, the browser's id."""
    http_request = getattr(request, "request", None)
    return str(http_request.scope.get(OWNER, ANONYMOUS)) if http_request is not None else ANONYMOUS


# For events that take a file: see `uploaded`.
FILES: dict[str, Any] = SILENT_EVENT | {"preprocess": False, "show_progress": "minimal"}


def uploaded(file: Any) -> tuple[Path, str]:
    """Return the path of a file that Gradio has uploaded, and its name in the browser. Raises UserError for any other
    path: Gradio should refuse it, but has not always.

    Args:
        file: the raw FileData of an event with `FILES`.
    """
    try:
        path = Path(str(file["path"])).resolve()
        if path.is_relative_to(Path(get_upload_folder()).resolve()) and path.is_file():
            return path, str(file.get("orig_name") or path.name)
    except (TypeError, KeyError, ValueError, OSError, AttributeError):
        pass
    raise UserError("The upload is incomplete. Upload the file again.")


def error_html(error: UserError) -> str:
    """Return an error as HTML for a notice."""
    return notice(str(error), "error")


def read_static(name: str) -> str:
    """Read a file of the page: JavaScript, CSS or HTML."""
    return (STATIC / name).read_text(encoding="utf-8")
