"""Video files in and out, the clips of a folder, and the transforms between files and models."""

from __future__ import annotations

from .clips import SetAside, list_videos
from .transforms import resize_crop, to_tensor, to_uint8
from .video import VideoError, VideoInfo, VideoWriter, probe, read_clip, read_stream, write_video

__all__ = ["SetAside", "VideoError", "VideoInfo", "VideoWriter", "list_videos", "probe", "read_clip", "read_stream",
           "resize_crop", "to_tensor", "to_uint8", "write_video"]
