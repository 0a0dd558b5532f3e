"""Look into a cache: statistics, decoded clips, SQL."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ..data.transforms import to_uint8
from ..data.video.reader import write_video
from ..utils.errors import UserError
from ..utils.files import atomic_path
from ..utils.format import format_bytes
from ..utils.plots import contact_sheet
from ..utils.seeding import generator
from . import format as fmt
from .encoder import LatentEncoder
from .reader import LatentCache
from .text import text_stores

logger = logging.getLogger(__name__)
SHOWN = 100  # rows of a query's result


def stats(path: Path) -> list[str]:
    """What a cache holds, as lines."""
    cache = LatentCache(path)
    header, index = cache.header, cache.index
    seconds = pc.sum(index["seconds"]).as_py()
    psnr = [value for value in index["psnr"].to_pylist() if value is not None]
    captions = pc.count_distinct(cache.all_captions()["caption_hash"])
    lines = [f"{len(cache)} clips of {len(pc.unique(index['content']))} files, {seconds / 3600:.2f} hours at "
             f"{header.transform.frame_rate:g} frames a second, {captions} captions",
             f"{header.vae.kind} {header.vae.fingerprint[:12]}, {header.vae.latent_channels} channels, "
             f"{header.stored} in {header.dtype}, {format_bytes(_tensor_bytes(path))} of tensors",
             f"{'bucket':>16} {'clips':>9} {'latents':>18}"]
    shapes = cache.shapes
    for bucket, clips in sorted(cache.buckets.items(), key=lambda pair: -len(pair[1])):
        lines.append(f"{bucket:>16} {len(clips):>9} {'x'.join(map(str, shapes[clips[0]])):>18}")
    lines.append(f"{'':>12}{'5 %':>8}{'median':>8}{'95 %':>8}")
    for name in ("brightness", "contrast", "sharpness", "motion"):
        values = np.quantile(index[name].to_numpy(), (.05, .5, .95))
        lines.append(f"{name:>12}" + "".join(f"{value:8.3f}" for value in values))
    lines.append("latents' mean " + " ".join(f"{value:.2f}" for value in cache.latents_mean))
    lines.append("latents' std  " + " ".join(f"{value:.2f}" for value in cache.latents_std))
    if psnr:
        lines.append(f"{len(psnr)} clips decoded again: {np.mean(psnr):.2f} dB ({min(psnr):.1f} to {max(psnr):.1f})")
    for store in text_stores(path):
        lines.append(f"text embeddings by {store.name}: {len(store)} captions, {store.dim} wide")
    counts = read_rejects(path)["kind"].value_counts().to_pylist()
    if counts:
        lines.append("set aside: " + ", ".join(f"{one['counts']} {one['values']}" for one in counts))
    return lines


def read_rejects(path: Path) -> pa.Table:
    """What was set aside when the last build ended (`format.REJECTS`)."""
    rejects = path / "rejects.parquet"
    try:
        if rejects.is_file():
            return pq.read_table(rejects).cast(fmt.REJECTS)
    except (pa.ArrowException, ValueError) as error:
        logger.warning("%s is damaged (%s); the next build writes it anew", rejects, error)
    return fmt.REJECTS.empty_table()


def _tensor_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path / "shards").glob("*.safetensors"))


def show(path: Path, vae: Any, out: Path, count: int = 12, where: str | None = None, seed: int = 0) -> None:
    """Decode clips, drawn at random, into a contact sheet (.png) or a grid that moves (.mp4).

    Args:
        where: SQL that chooses among the clips.

    Raises:
        UserError: another VAE, no clips, a name that is neither.
    """
    if out.suffix.lower() not in (".png", ".mp4"):
        raise UserError(f"{out} is neither a .png nor a .mp4")
    cache, encoder = LatentCache(path, vae), LatentEncoder(vae)
    numbers = list(range(len(cache)))
    if where is not None:
        chosen = set(_run(path, f"select id from clips where {where}")["id"].to_pylist())
        numbers = [i for i in numbers if cache.ids[i] in chosen]
        if not numbers:
            raise UserError(f"no clip of {path} has {where}")
    order = torch.randperm(len(numbers), generator=generator(seed, "show")).tolist()[:count]
    picks = [numbers[i] for i in order]
    sizes = [[cache.column(name)[i].as_py() for name in ("frames", "height", "width")] for i in picks]
    videos = [to_uint8(encoder.decode(cache.entry(i).float(), *size)[0]) for i, size in zip(picks, sizes, strict=True)]
    if out.suffix.lower() == ".png":
        contact_sheet(videos, out, [f"{cache.captions[i]}  ({cache.column('path')[i].as_py()})" for i in picks])
        return
    write_video(out, [_grid(videos)], cache.header.transform.frame_rate)


def _grid(videos: list[np.ndarray]) -> np.ndarray:
    """Side by side in rows, as long as the longest; a shorter one stays at its last frame."""
    length = max(map(len, videos))
    height, width = (max(video.shape[axis] for video in videos) for axis in (1, 2))
    columns = max(1, round((len(videos) * height / width) ** .5))
    grid = np.zeros((length, -(-len(videos) // columns) * height, columns * width, 3), np.uint8)
    for i, video in enumerate(videos):
        top, left = i // columns * height, i % columns * width
        t, h, w = video.shape[:3]
        grid[:t, top:top + h, left:left + w] = video
        grid[t:, top:top + h, left:left + w] = video[-1]
    return grid


def query(path: Path, sql: str, out: Path | None = None) -> list[str]:
    """Run SQL over `clips` and `rejects`; the result as lines, or in a file. Beside the columns of `format.SCHEMA`,
    `clips` has `caption`: a clip's captions, a line each.

    Raises:
        UserError: SQL that cannot be run, a file of another kind.
    """
    fmt.read_header(path)
    table = _run(path, sql)
    if out is not None:
        _write(table, out)
        return [f"{len(table)} rows in {out}"]
    shown = table.slice(0, SHOWN).to_pylist()
    rows = [table.column_names, *([_shown(value) for value in row.values()] for row in shown)]
    widths = [max(len(row[i]) for row in rows) for i in range(table.num_columns)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines + [f"... {len(table) - SHOWN} more rows; --out FILE writes all"] * (len(table) > SHOWN)


def _run(path: Path, sql: str) -> pa.Table:
    try:
        import duckdb
    except ImportError as error:
        raise UserError("queries need DuckDB: pip install 'odvae-lvdm[query]'") from error
    cache = LatentCache(path)
    with duckdb.connect() as connection:
        connection.register("index", cache.index)
        connection.execute("create view clips as "
                           "select *, array_to_string(captions, chr(10)) as caption from \"index\"")
        connection.register("rejects", read_rejects(path))
        connection.execute("set enable_external_access = false")
        try:
            found = connection.sql(sql)
            if found is None:
                raise UserError("the query has no result; begin it with select")
            table: pa.Table = found.to_arrow_table()
        except duckdb.Error as error:
            raise UserError(f"the query cannot be run: {error}") from error
    return table


def _write(table: pa.Table, out: Path) -> None:
    import pyarrow.csv

    if out.suffix.lower() not in (".csv", ".parquet", ".jsonl"):
        raise UserError(f"{out} is none of .csv, .parquet and .jsonl")
    with atomic_path(out) as temporary:
        if out.suffix.lower() == ".csv":
            pyarrow.csv.write_csv(_without_lists(table), temporary)
        elif out.suffix.lower() == ".parquet":
            pq.write_table(table, temporary)
        else:
            temporary.write_text("".join(json.dumps(row, default=str) + "\n" for row in table.to_pylist()))


def _without_lists(table: pa.Table) -> pa.Table:
    """With lists as JSON: CSV has none."""
    for number, column in enumerate(table.schema):
        if pa.types.is_nested(column.type):
            text = [None if value is None else json.dumps(value, ensure_ascii=False) for value in
                    table[number].to_pylist()]
            table = table.set_column(number, column.name, pa.array(text, pa.string()))
    return table


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
