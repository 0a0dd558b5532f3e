"""Read and write video files, list the clips of a source, and transform pixels to model inputs and back."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .files import RejectedFile, list_videos
    from .transforms import resize_crop, to_tensor, to_uint8
    from .video.reader import VideoError, VideoInfo, VideoWriter, probe, read_clip, read_image, read_stream, write_video

__all__ = ["RejectedFile", "VideoError", "VideoInfo", "VideoWriter", "list_videos", "probe", "read_clip", "read_image",
           "read_stream", "resize_crop", "to_tensor", "to_uint8", "write_video"]

_MODULES = {".files": ("RejectedFile", "list_videos"),
            ".transforms": ("resize_crop", "to_tensor", "to_uint8")}  # all others are in `video.reader`


def __getattr__(name: str) -> Any:
    """Import on first use: reading files needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'odvae.data' has no attribute {name!r}")
    module = next((module for module, names in _MODULES.items() if name in names), ".video.reader")
    return getattr(importlib.import_module(module, __name__), name)
