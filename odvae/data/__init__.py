"""Video files in and out, the clips of a folder, and the transforms between files and models."""

from __future__ import annotations

from .clips import ClipSpec, SetAside, caption_of, clips_of, list_videos
from .transforms import resize_crop, to_tensor, to_uint8
from .video import VideoError, VideoInfo, VideoWriter, probe, read_clip, read_stream, write_video

__all__ = ["ClipSpec", "SetAside", "VideoError", "VideoInfo", "VideoWriter", "caption_of", "clips_of", "list_videos",
           "probe", "read_clip", "read_stream", "resize_crop", "to_tensor", "to_uint8", "write_video"]
