"""What a build is asked for."""

from __future__ import annotations

from pydantic import Field

from ...inference.fingerprint import Dtype
from ...utils.config import Config
from .. import format as fmt


class BuildSettings(Config):
    frames: list[int] = Field([33], min_length=1)  # lengths of clips: each takes the longest that fits
    frame_rate: float = Field(8.0, gt=0)  # frames a second
    sizes: list[tuple[int, int]] = Field([(64, 64)], min_length=1)  # (height, width): each clip the nearest in shape
    clips: str = "back-to-back"  # which spans: see `plan.ClipPolicy`; "whole" takes no heed of `frames`
    store: fmt.Stored = "mean"
    dtype: Dtype = "float16"  # of the stored latents
    batch: int = Field(8, ge=1)  # clips that are encoded at once
    shard_mb: float = Field(256, ge=1, le=256)  # a shard ends at whichever comes first;
    shard_clips: int = Field(512, ge=1)  # an interruption costs at most one shard's work
    workers: int | None = Field(None, ge=1)  # processes that decode (None: one a core, at most 8)
    file_seconds: float = Field(120.0, gt=0)  # that looking at a file, or decoding a clip of it, may take
    patience: float = Field(300.0, ge=0)  # s that failures are retried which may pass (network, full disk)
    keep_truncated: bool = False  # use what can be read of files that are cut off
    retry: bool = False  # try again also what a file's own faults made unusable before
    columns: tuple[str, ...] = ()  # of lists, where names differ: "path=video", "caption=text"; see `data.manifests`
    probes: int = Field(8, ge=0)  # clips that are decoded again, for their PSNR
