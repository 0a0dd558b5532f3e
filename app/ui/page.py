"""What the page's tabs share: the door, who asks, and views that follow the store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from app.door import Door
from app.guard import NOBODY, OWNER
from odvae.runtime.errors import UserError

HERE = Path(__file__).parent
TICK = 0.7  # seconds between two looks at the store; a look takes milliseconds and sends only what has changed

# Events of the page itself: not in the API, no veil over what they change, and no place in the queue.
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


class Page:
    """Made once; each tab's `build(page)` adds its components and events inside the Blocks that are open."""

    def __init__(self, door: Door, blocks: gr.Blocks, timer: gr.Timer) -> None:
        self.door, self.blocks, self.timer = door, blocks, timer
        self.tabs: gr.Tabs | None = None
        self.form: Any = None  # of the Generate tab, which the History tab fills

    def live(self, look: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> dict[str, Any]:
        """Keep components as `look(*inputs, request: gr.Request)` says: on load and on every tick. It returns a value
        an output; what has not changed is not sent. Returns the event's arguments, to look at once after a click:
        `button.click(...).success(**page.live(...))`."""
        seen = gr.State({})
        count = len(outputs)

        # Gradio fills in the request only by position; without `wraps`, as it would look at what is wrapped.
        def now(request: gr.Request, *values: Any) -> tuple[Any, ...]:
            *given, before = values
            told = look(*given, request=request)
            told = told if count > 1 else (told,)
            digests = [hashlib.sha1(json.dumps(one, default=repr).encode()).hexdigest() for one in told]
            sent = [one if before.get(str(i)) != digest else gr.skip()
                    for i, (one, digest) in enumerate(zip(told, digests, strict=True))]
            return *sent, {str(i): digest for i, digest in enumerate(digests)}

        now.__name__ = look.__name__
        now.__annotations__ = {"request": gr.Request}  # Gradio looks for the type itself
        event = {"fn": now, "inputs": [*inputs, seen], "outputs": [*outputs, seen], **QUIET}
        self.blocks.load(**event)
        self.timer.tick(**event)
        return event


def owner_of(request: gr.Request) -> str:
    """Who asks: the user's name, or the browser's id where nobody is asked for one; the guard has put it there."""
    asked = getattr(request, "request", None)
    return str(asked.scope.get(OWNER, NOBODY)) if asked is not None else NOBODY


# For events that take a file: see `uploaded`.
FILES: dict[str, Any] = QUIET | {"preprocess": False, "show_progress": "minimal"}


def uploaded(file: Any) -> tuple[Path, str]:
    """Where Gradio has put a file that the browser sent, and the browser's name of it. Raises UserError for any other:
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
    raise UserError("The file did not arrive whole. Bring it again.")


def told(error: UserError) -> str:
    """A mistake, as HTML for a notice."""
    from html import escape

    return f'<div class="lv-error" role="alert">{escape(str(error))}</div>'


def text(name: str) -> str:
    """A file of the page's: JavaScript or CSS."""
    return (HERE / name).read_text(encoding="utf-8")
