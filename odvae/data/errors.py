"""The error for a video, photo or caption that cannot be used."""

from __future__ import annotations

from ..utils.errors import UserError
from ..utils.files import path_text


class VideoError(UserError):
    """A video file that cannot be used; names the file, what is wrong and what to do.

    Attributes:
        kind: one of `failures.KINDS`.
        reason, advice: the two halves of the message.
    """

    def __init__(self, reason: str, advice: str = "", kind: str = "corrupt") -> None:
        reason, advice = path_text(reason), path_text(advice)  # they go into an index and a terminal
        super().__init__(f"{reason}; {advice}" if advice else reason)
        self.reason, self.advice, self.kind = reason, advice, kind
