"""Statistics of a cache for people; one partition is in memory at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from ...utils.errors import UserError
from ...utils.format import format_bytes
from ...utils.storage import open_storage
from .. import format as fmt
from ..hashes import HashSet
from ..moments import Moments
from ..partition import Partition, iter_partitions
from ..text import text_stores
from .rejects import iter_rejects

PIXELS = ("brightness", "contrast", "sharpness", "motion")  # columns, each from 0 to 1
COLUMNS = ("content", "seconds", "psnr", "caption_hashes", "bucket", "shape", *PIXELS)
BINS = 2**16  # of the histograms from which quantiles are read


class _Totals:
    """What the partitions add up to. Sets are compact, and distributions histograms."""

    def __init__(self) -> None:
        self.seconds, self.bytes, self.psnr = 0.0, 0, list[float]()
        self.contents, self.captions = HashSet(), HashSet()
        self.buckets, self.shapes = Counter[str](), dict[str, list[int]]()
        self.histograms = {name: np.zeros(BINS, np.int64) for name in PIXELS}
        self.moments: list[Moments] = []

    def add(self, partition: Partition) -> None:
        table = partition.table
        self.bytes += partition.tensor_bytes
        self.seconds += pc.sum(table["seconds"]).as_py() or 0.0
        self.psnr += pc.drop_null(table["psnr"]).to_pylist()
        self.contents.update(pc.unique(table["content"]).to_pylist())
        self.captions.update(pc.unique(pc.list_flatten(table["caption_hashes"])).to_pylist())
        for count in pc.value_counts(table["bucket"]).to_pylist():
            self.buckets[count["values"]] += count["counts"]
            if count["values"] not in self.shapes:
                first = pc.index(table["bucket"], count["values"]).as_py()
                self.shapes[count["values"]] = table["shape"][first].as_py()
        for name, histogram in self.histograms.items():
            values = pc.drop_null(table[name]).to_numpy()
            histogram += np.bincount((values * BINS).astype(np.int64).clip(0, BINS - 1), minlength=BINS)
        if (merged := partition.moments()) is not None:
            self.moments.append(merged)


def stats(path: Path | str) -> list[str]:
    """Return a cache's statistics as lines."""
    storage = open_storage(path)
    header, totals = fmt.read_header(storage), _Totals()
    for partition in iter_partitions(storage, COLUMNS):
        totals.add(partition)
    if not totals.moments:
        raise UserError(f"{storage.root} has no clips yet; finish it with `odvae cache build`")
    moments = Moments.merged(totals.moments)
    lines = [f"{totals.buckets.total()} clips of {len(totals.contents)} files, {totals.seconds / 3600:.2f} hours at "
             f"{header.transform.frame_rate:g} fps, {len(totals.captions)} captions",
             f"{header.vae.kind} {header.vae.fingerprint[:12]}, {header.vae.latent_channels} channels, "
             f"{header.stored} in {header.dtype}, {format_bytes(totals.bytes)} of tensors",
             f"{'bucket':>16} {'clips':>9} {'latents':>18}"]
    for bucket, clips in totals.buckets.most_common():
        shape = header.vae.latent_channels, *totals.shapes[bucket][1:]
        lines.append(f"{bucket:>16} {clips:>9} {'x'.join(map(str, shape)):>18}")
    lines.append(f"{'':>12}{'5 %':>8}{'median':>8}{'95 %':>8}")
    for name, histogram in totals.histograms.items():
        lines.append(f"{name:>12}" + "".join(f"{_quantile(histogram, share):8.3f}" for share in (.05, .5, .95)))
    lines.append("latent mean " + " ".join(f"{value:.2f}" for value in moments.mean))
    lines.append("latent std  " + " ".join(f"{value:.2f}" for value in moments.std))
    if psnr := totals.psnr:
        lines.append(f"PSNR of {len(psnr)} clips: {np.mean(psnr):.2f} dB ({min(psnr):.1f} to {max(psnr):.1f})")
    lines += [f"text embeddings by {store.name}: {len(store)} captions, {store.dim} wide"
              for store in text_stores(storage)]
    kinds = Counter[str]()
    for rejects in iter_rejects(storage):
        kinds.update(rejects["kind"].to_pylist())
    if kinds:
        lines.append("set aside: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    return lines


def _quantile(histogram: np.ndarray, share: float) -> float:
    """Return a quantile of values in [0, 1], to half a bin."""
    total = np.cumsum(histogram)
    return float((np.searchsorted(total, share * (total[-1] - 1), side="right") + .5) / BINS) if total[-1] else 0.0
