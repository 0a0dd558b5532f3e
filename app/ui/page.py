"""What the tabs of the page share: the service, the owner of a request, and views that poll the store."""

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

# Events of the page itself: not in the API, no veil over what they change, and no place in the queue.
SILENT_EVENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


class Page:
    """Made once; each tab's `build(page)` adds its components and events inside the Blocks that are open."""

    def __init__(self, service: JobService, blocks: gr.Blocks) -> None:
        self.service, self.blocks = service, blocks
        self.tabs: gr.Tabs | None = None
        self.form: Any = None  # of the Generate tab, which the History tab fills
        self._views: list[View] = []

    def poll(self, update: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> dict[str, Any]:
        """Keep components as `update(*inputs, request: gr.Request)` says: on load and on every tick. It returns a value
        an output; what has not changed is not sent. Returns the event's arguments, to refresh at once after a click:
        `button.click(...).success(**page.poll(...))`."""
        view = View(update, inputs, outputs)
        self._views.append(view)
        event = _event(update.__name__, view.now, view)
        self.blocks.load(**event)
        return event

    def follow(self, timer: gr.Timer) -> None:
        """Poll all views on every tick, by one request: a browser pays for each."""
        views = list(self._views)
        faults: dict[str, str] = {}  # logged once, not at every tick

        def tick(request: gr.Request, *values: Any) -> tuple[Any, ...]:
            updates: list[Any] = []
            for view in views:
                given, values = values[: len(view.inputs)], values[len(view.inputs):]
                try:
                    updates += view.now(request, *given)
                    faults.pop(view.update.__qualname__, None)
                except Exception as error:  # a fault of one tab leaves the others as they should be
                    if faults.get(view.update.__qualname__) != repr(error):
                        logger.exception("%s cannot be shown", view.update.__qualname__)
                    faults[view.update.__qualname__] = repr(error)
                    updates += [gr.skip() for _ in view.outputs]
            return tuple(updates)

        timer.tick(**_event("tick", tick, *views))


class View:
    """Components that follow the store.

    Attributes:
        update: returns their values, see `Page.poll`.
        inputs, outputs: of the event; the last of both is what was sent before.
    """

    def __init__(self, update: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        seen = gr.State({})
        self.update, self.inputs, self.outputs = update, [*inputs, seen], [*outputs, seen]

    def now(self, request: gr.Request, *values: Any) -> tuple[Any, ...]:
        *given, before = values
        updates = self.update(*given, request=request)
        updates = updates if len(self.outputs) > 2 else (updates,)
        digests = [hashlib.sha1(json.dumps(one, default=_serialize).encode()).hexdigest() for one in updates]
        sent = [one if before.get(str(i)) != digest else gr.skip()
                for i, (one, digest) in enumerate(zip(updates, digests, strict=True))]
        return *sent, {str(i): digest for i, digest in enumerate(digests)}


def _serialize(value: Any) -> str:
    return value.to_json() if isinstance(value, pd.DataFrame) else repr(value)


def _event(name: str, fn: Callable[..., Any], *views: View) -> dict[str, Any]:
    # Gradio fills in the request only by position, and looks for the type itself: without `wraps`, as it would look at
    # what is wrapped.
    def now(request: gr.Request, *values: Any) -> tuple[Any, ...]:
        return cast(tuple[Any, ...], fn(request, *values))

    now.__name__ = name
    now.__annotations__ = {"request": gr.Request}
    return {"fn": now, "inputs": [one for view in views for one in view.inputs],
            "outputs": [one for view in views for one in view.outputs], **SILENT_EVENT}


def owner_of(request: gr.Request) -> str:
    """Return the user's name, or the browser's id without passwords; `AuthMiddleware` has put it there."""
    asked = getattr(request, "request", None)
    return str(asked.scope.get(OWNER, ANONYMOUS)) if asked is not None else ANONYMOUS


# For events that take a file: see `uploaded`.
FILES: dict[str, Any] = SILENT_EVENT | {"preprocess": False, "show_progress": "minimal"}


def uploaded(file: Any) -> tuple[Path, str]:
    """Return where Gradio has put an uploaded file, and its name in the browser. Raises UserError for any other path:
    Gradio should have refused it, and has not always.

    Args:
        file: Gradio's FileData as it came in, of an event with `FILES`.
    """
    try:
        path = Path(str(file["path"])).resolve()
        if path.is_relative_to(Path(get_upload_folder()).resolve()) and path.is_file():
            return path, str(file.get("orig_name") or path.name)
    except (TypeError, KeyError, ValueError, OSError, AttributeError):
        pass
    raise UserError("The file did not arrive whole. Upload it again.")


def error_html(error: UserError) -> str:
    """A mistake, as HTML for a notice."""
    return notice(str(error), "error")


def read_static(name: str) -> str:
    """A file of the page's: JavaScript or CSS."""
    return (STATIC / name).read_text(encoding="utf-8")
