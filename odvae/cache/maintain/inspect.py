"""Inspect a cache: statistics, decoded clips, SQL."""

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

from ...data.transforms import to_uint8
from ...data.video.reader import write_video
from ...utils.errors import UserError
from ...utils.files import atomic_path
from ...utils.format import format_bytes
from ...utils.plots import contact_sheet
from ...utils.seeding import generator
from ...utils.storage import open_storage
from .. import format as fmt
from ..encoder import LatentEncoder
from ..partition import REJECTS, folder_of, partition_numbers
from ..reader import LatentCache
from ..statistics import measure
from ..text import text_stores

logger = logging.getLogger(__name__)
MAX_ROWS = 100  # rows of a query's result


def stats(path: Path) -> list[str]:
    """Return a cache's statistics as lines."""
    cache = LatentCache(path)
    header, index = cache.header, cache.index
    seconds = pc.sum(index["seconds"]).as_py()
    psnr = [value for value in index["psnr"].to_pylist() if value is not None]
    captions = pc.count_distinct(cache.all_captions()["caption_hash"])
    lines = [f"{len(cache)} clips of {len(pc.unique(index['content']))} files, {seconds / 3600:.2f} hours at "
             f"{header.transform.frame_rate:g} fps, {captions} captions",
             f"{header.vae.kind} {header.vae.fingerprint[:12]}, {header.vae.latent_channels} channels, "
             f"{header.stored} in {header.dtype}, {format_bytes(measure(open_storage(path)).bytes)} of tensors",
             f"{'bucket':>16} {'clips':>9} {'latents':>18}"]
    shapes = cache.shapes
    for bucket, clips in sorted(cache.buckets.items(), key=lambda pair: -len(pair[1])):
        lines.append(f"{bucket:>16} {len(clips):>9} {'x'.join(map(str, shapes[clips[0]])):>18}")
    lines.append(f"{'':>12}{'5 %':>8}{'median':>8}{'95 %':>8}")
    for name in ("brightness", "contrast", "sharpness", "motion"):
        values = np.quantile(index[name].to_numpy(), (.05, .5, .95))
        lines.append(f"{name:>12}" + "".join(f"{value:8.3f}" for value in values))
    lines.append("latent mean " + " ".join(f"{value:.2f}" for value in cache.latents_mean))
    lines.append("latent std  " + " ".join(f"{value:.2f}" for value in cache.latents_std))
    if psnr:
        lines.append(f"PSNR of {len(psnr)} clips: {np.mean(psnr):.2f} dB ({min(psnr):.1f} to {max(psnr):.1f})")
    for store in text_stores(path):
        lines.append(f"text embeddings by {store.name}: {len(store)} captions, {store.dim} wide")
    counts = read_rejects(path)["kind"].value_counts().to_pylist()
    if counts:
        lines.append("set aside: " + ", ".join(f"{count['counts']} {count['values']}" for count in counts))
    return lines


def read_rejects(path: Path) -> pa.Table:
    """Return the files and clips that the last build set aside (`format.REJECTS`)."""
    storage = open_storage(path)
    tables = [fmt.REJECTS.empty_table()]
    for number in partition_numbers(storage):
        name = f"{folder_of(number)}/{REJECTS}"
        try:
            with storage.open(name) as file:
                tables.append(pq.read_table(file).cast(fmt.REJECTS))
        except FileNotFoundError:
            continue
        except (pa.ArrowException, ValueError) as error:
            logger.warning("%s is damaged (%s); the next build writes it again", storage.path(name), error)
    return pa.concat_tables(tables)


def show(path: Path, vae: Any, out: Path, count: int = 12, where: str | None = None, seed: int = 0) -> None:
    """Decode random clips into a contact sheet (.png) or a video grid (.mp4).

    Args:
        where: an SQL condition on the clips.

    Raises:
        UserError: another VAE, no clips, a file name with another suffix.
    """
    if out.suffix.lower() not in (".png", ".mp4"):
        raise UserError(f"{out} is neither a .png nor a .mp4")
    cache, encoder = LatentCache(path, vae), LatentEncoder(vae)
    candidates = list(range(len(cache)))
    if where is not None:
        matching = set(_execute(path, f"select id from clips where {where}")["id"].to_pylist())
        candidates = [i for i in candidates if cache.ids[i] in matching]
        if not candidates:
            raise UserError(f"no clip of {path} matches {where}")
    order = torch.randperm(len(candidates), generator=generator(seed, "show")).tolist()[:count]
    clips = [candidates[i] for i in order]
    sizes = [[cache.column(name)[i].as_py() for name in ("frames", "height", "width")] for i in clips]
    videos = [to_uint8(encoder.decode(cache.entry(i).float(), *size)[0]) for i, size in zip(clips, sizes, strict=True)]
    if out.suffix.lower() == ".png":
        contact_sheet(videos, out, [f"{cache.captions[i]}  ({cache.column('path')[i].as_py()})" for i in clips])
        return
    write_video(out, [_grid(videos)], cache.header.transform.frame_rate)


def _grid(videos: list[np.ndarray]) -> np.ndarray:
    """Tile videos into one as long as the longest; shorter ones hold their last frame."""
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
    """Run SQL over `clips` and `rejects`; the result as lines, or in a file. In addition to the columns of
    `format.SCHEMA`, `clips` has `caption`: a clip's captions, one per line.

    Raises:
        UserError: SQL that cannot be run, a file name with another suffix.
    """
    fmt.read_header(path)
    table = _execute(path, sql)
    if out is not None:
        _write(table, out)
        return [f"{len(table)} rows in {out}"]
    shown = table.slice(0, MAX_ROWS).to_pylist()
    rows = [table.column_names, *([_format_cell(value) for value in row.values()] for row in shown)]
    widths = [max(len(row[i]) for row in rows) for i in range(table.num_columns)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines + [f"... {len(table) - MAX_ROWS} more rows; --out FILE writes all"] * (len(table) > MAX_ROWS)


def _execute(path: Path, sql: str) -> pa.Table:
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
            result = connection.sql(sql)
            if result is None:
                raise UserError("the query has no result; begin it with select")
            table: pa.Table = result.to_arrow_table()
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
    """Convert lists to JSON text, for CSV."""
    for number, column in enumerate(table.schema):
        if pa.types.is_nested(column.type):
            text = [None if value is None else json.dumps(value, ensure_ascii=False) for value in
                    table[number].to_pylist()]
            table = table.set_column(number, column.name, pa.array(text, pa.string()))
    return table


def _format_cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
