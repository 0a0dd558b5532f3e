"""Settings of a cache build."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from ...inference.fingerprint import Dtype
from ...utils.config import Config
from ...utils.precision_names import Precision
from .. import format as fmt


class BuildSettings(Config):
    """How clips are cut, encoded and stored, and where that runs."""

    frames: list[int] = Field([33], min_length=1)  # lengths of clips; each clip takes the longest that fits
    frame_rate: float = Field(8.0, gt=0)  # frames per second
    sizes: list[tuple[int, int]] = Field([(64, 64)], min_length=1)  # (height, width); by the nearest aspect ratio
    clips: str = "back-to-back"  # a `plan.ClipPolicy`; "whole" ignores `frames`
    store: fmt.Stored = "mean"
    dtype: Dtype = "float16"  # of the stored latents
    precision: Precision | None = None  # that the VAE computes in; None: its own; auto: `encoder.choose_precision`
    batch: int = Field(8, ge=1)  # clips that are encoded at once
    compiled: bool = False  # compile the VAE's blocks, see `model.compilation`
    shard_mb: float = Field(256, ge=1, le=256)  # a shard ends at whichever limit comes first
    shard_clips: int = Field(512, ge=1)  # an interruption costs at most one shard's work
    workers: int | None = Field(None, ge=1)  # decoding processes of each encoder; None: by the cores, at most 8
    file_seconds: float = Field(120.0, gt=0)  # time limit for probing a file or decoding a clip
    patience: float = Field(600.0, ge=0)  # s for which transient failures (network, full disk) are retried
    keep_truncated: bool = False  # use the readable part of truncated files
    retry: bool = False  # try files again that an earlier build found unusable
    columns: tuple[str, ...] = ()  # of lists, where names differ: "path=video", "caption=text"; see `data.manifests`
    partitions: int | None = Field(None, ge=1, le=2**20)  # of a new cache, a power of two; None: by the source's files
    part: tuple[int, int] = (1, 1)  # (i, n): build only every n-th partition, beginning with the i-th
    scratch_gb: float = Field(16.0, ge=0)  # of fetched remote files, on local disk in the temporary folder
    psnr_clips: int = Field(8, ge=0)  # clips that are decoded again to measure PSNR
    on: Literal["local", "ray"] = "local"  # where units run: this machine, or a cluster of Ray
    address: str | None = None  # of the cluster; None: RAY_ADDRESS, or one that is started on this machine
    devices: tuple[str, ...] = ()  # see `executors.open_executor`

    @property
    def compiled_batch(self) -> int | None:
        """See `encoder.LatentEncoder`."""
        return self.batch if self.compiled else None

    @field_validator("partitions")
    @classmethod
    def _check_partitions(cls, partitions: int | None) -> int | None:
        if partitions is not None and partitions & (partitions - 1):
            raise ValueError("must be a power of two")
        return partitions

    @field_validator("part")
    @classmethod
    def _check_part(cls, part: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= part[0] <= part[1]:
            raise ValueError("must be (i, n) with 1 <= i <= n")
        return part
