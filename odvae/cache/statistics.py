"""Statistics of a whole cache, merged over its partitions."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow.compute as pc

from ..utils.storage import Storage
from . import format as fmt
from .moments import Moments
from .partition import iter_partitions


@dataclass(frozen=True)
class CacheStatistics:
    measured: fmt.Measured | None  # None: no clips
    bytes: int  # of the tensors
    raw_bytes: int  # of all clips as uint8 RGB, at their encoded size
    frames: int  # of video


def measure(storage: Storage) -> CacheStatistics:
    """Add up what a cache holds; one partition is in memory at a time."""
    moments, psnr = list[Moments](), list[float]()
    clips = size = raw_bytes = frames = 0
    for partition in iter_partitions(storage, ("frames", "height", "width", "psnr")):
        table = partition.table
        clips, size = clips + len(table), size + partition.tensor_bytes
        if len(table):
            frames += pc.sum(table["frames"]).as_py()
            pixels = pc.multiply(pc.multiply(table["frames"].cast("int64"), table["height"]), table["width"])
            raw_bytes += 3 * pc.sum(pixels).as_py()
        psnr += pc.drop_null(table["psnr"]).to_pylist()
        if (merged := partition.moments()) is not None:
            moments.append(merged)
    if not moments:
        return CacheStatistics(None, size, raw_bytes, frames)
    merged = Moments.merged(moments)
    measured = fmt.Measured(clips=clips, latents_mean=merged.mean.tolist(), latents_std=merged.std.tolist(),
                            psnr=sum(psnr) / len(psnr) if psnr else None, psnr_clips=len(psnr))
    return CacheStatistics(measured, size, raw_bytes, frames)


def update_header(storage: Storage, header: fmt.Header) -> CacheStatistics:
    """Write the statistics of now into the header, if they have changed, and return them."""
    statistics = measure(storage)
    if fmt.read_header(storage).measured != statistics.measured:
        fmt.write_header(storage, header.model_copy(update={"measured": statistics.measured}))
    return statistics
