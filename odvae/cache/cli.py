"""odvae cache build | verify | stats | show | query | gc | merge | export."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from gc import freeze
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import URL, UserError, output_path
from ..utils.format import format_bytes
from ..utils.precision_names import PRECISION_HELP, PRECISIONS
from ..utils.progress import print_result
from ..weights import NATURAL_VAE

if TYPE_CHECKING:
    from .build.report import SourceTotals

Arguments = argparse.Namespace
Command = Callable[[str, Callable[[Arguments], None], str], argparse.ArgumentParser]
MAX_LISTED = 20  # lines of a list in a summary


def add_cache_commands(command: Command) -> None:
    parser = command("build", build, "encode videos into a latent cache; run again, only new or changed files")
    parser.add_argument("source", help="a folder (captions from a .txt beside each file, else from the class folder's "
                        "name, else from the file name; or metadata.csv, .jsonl or .parquet in it), a list (.jsonl, "
                        ".csv, .parquet with path, caption, start, end), Parquet files that hold the videos, or "
                        "WebDataset tars; local or at a URL (hf://datasets/..., s3://..., https://...)")
    parser.add_argument("cache", type=_cache, help="a folder, or a URL such as s3://bucket/cache")
    _add_columns(parser)
    parser.add_argument("--vae", help="folder or hub name of any autoencoder; an image VAE encodes frame by frame "
                        "(default: the shipped one for natural footage; of an existing cache the shipped one that it "
                        "was built with)")
    parser.add_argument("--frames", type=int, nargs="+", default=[33], help="clip lengths, 1 + 4k; each clip takes the "
                        "longest that fits")
    parser.add_argument("--frame-rate", type=float, default=8.0, help="frames per second, by presentation time")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), action="append",
                        help="clip size (default 64 64); if repeated, each clip takes the nearest aspect ratio")
    parser.add_argument("--clips", default="back-to-back", metavar="POLICY",
                        help="back-to-back, every:SECONDS, uniform:CLIPS, whole, or scenes (needs PySceneDetect)")
    parser.add_argument("--store", choices=["mean", "moments"], default="mean", help="moments: mean and log-variance, "
                        "so that training can sample the posterior anew each epoch")
    parser.add_argument("--store-dtype", choices=["float16", "bfloat16", "float32"], default="float16",
                        help="of the stored latents (default: %(default)s)")
    parser.add_argument("--dtype", choices=PRECISIONS, default="auto", help=f"{PRECISION_HELP}; of an existing cache "
                        "auto is its own, and another is refused")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="torch.compile the VAE's blocks, as in `odvae encode`")
    parser.add_argument("--shard-mb", type=float, default=256.0, help="at most 256")
    parser.add_argument("--shard-clips", type=int, default=512, help="an interruption costs at most one shard's work")
    parser.add_argument("--workers", type=int, help="decoding processes of each encoder (default: the cores, shared by "
                        "the encoders, at most 8)")
    parser.add_argument("--on", choices=["local", "ray"], default="local", help="encode on this machine, or on a Ray "
                        "cluster (pip install 'odvae-lvdm[ray]'), whose nodes see the same paths")
    parser.add_argument("--address", metavar="ADDRESS", help="of the Ray cluster: auto, or host:port (default: "
                        "RAY_ADDRESS, else a cluster on this machine)")
    parser.add_argument("--devices", nargs="+", default=[], metavar="DEVICE", help="one encoder on each: cuda:0 cuda:1 "
                        "(default: all accelerators); with --on ray their number: gpu=16 or cpu=32 (default: all that "
                        "the cluster has now)")
    parser.add_argument("--file-seconds", type=float, default=120.0, help="time limit per file; a file that timed out "
                        "is tried again if the limit is raised")
    parser.add_argument("--patience", type=float, default=600.0, metavar="SECONDS", help="how long transient failures "
                        "(network, full disk) are retried; the next build tries again what still fails")
    parser.add_argument("--max-set-aside", type=float, default=0.5, metavar="SHARE", help="of the files, from 0 to 1; "
                        "the exit status is 3 if more is set aside")
    parser.add_argument("--max-rejects", type=int, metavar="N", help="files and clips; the exit status is 3 if more "
                        "are set aside")
    parser.add_argument("--scratch-gb", type=float, default=16.0, metavar="GB", help="local disk for fetched remote "
                        "files, in the temporary folder (TMPDIR): each is fetched once (0: again whenever it is read)")
    parser.add_argument("--partitions", type=int, help="of a new cache, a power of two (default: by the number of "
                        "files, at most 16384 in each)")
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help="build only every n-th partition, "
                        "beginning with the i-th: for N processes, on one host or many (array jobs)")
    parser.add_argument("--keep-truncated", action="store_true", help="use the readable part of truncated files")
    parser.add_argument("--retry", action="store_true", help="also retry files that an earlier build found unusable")
    parser.add_argument("--dry-run", action="store_true", help="probe the files and print the plan, encode nothing")

    parser = command("verify", verify, "check all checksums and the consistency of a cache")
    parser.add_argument("cache", type=_cache)
    parser.add_argument("--decode", type=int, default=0, metavar="N", help="decode N clips and encode them again")
    parser.add_argument("--vae", help="for --decode (default: the shipped one that the cache was built with)")
    parser.add_argument("--repair", action="store_true", help="remove the rows of faulty shards, so that the next "
                        "build encodes their clips again")

    parser = command("stats", stats, "show buckets, captions, latent statistics, quality and rejects")
    parser.add_argument("cache", type=_cache)

    parser = command("show", show, "decode some clips into a contact sheet (.png) or a video (.mp4)")
    parser.add_argument("cache", type=_cache)
    parser.add_argument("out", type=output_path, nargs="?", default=Path("outputs/cache.png"))
    parser.add_argument("--vae", help="(default: the shipped one that the cache was built with)")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--where", help="SQL, such as \"motion > 0.1 and caption like '%%red%%'\"")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice")

    parser = command("query", query, "SQL over the tables `clips` and `rejects`")
    parser.add_argument("cache", type=_cache)
    parser.add_argument("sql", help="such as \"select bucket, count(*), avg(motion) from clips group by bucket\"")
    parser.add_argument("--out", type=output_path, help="write a .csv, .parquet or .jsonl instead")

    parser = command("gc", gc, "remove clips that are no longer in any source")
    parser.add_argument("cache", type=_cache)
    parser.add_argument("sources", nargs="+", help="all sources of the cache")
    _add_columns(parser)
    parser.add_argument("--dry-run", action="store_true", help="remove nothing, list what would be removed")
    parser.add_argument("--max-share", type=float, default=0.1, metavar="SHARE", help="of the clips, from 0 to 1, that "
                        "may be removed without --yes")
    parser.add_argument("--yes", action="store_true", help="remove any number of clips")

    parser = command("merge", merge, "merge caches of one VAE and transform into a new one; the same command resumes "
                                     "an interrupted merge")
    parser.add_argument("caches", type=_cache, nargs="+")
    parser.add_argument("--out", type=output_path, required=True)
    parser.add_argument("--partitions", type=int, help="of the new cache, a power of two (default: as many as the "
                        "largest cache has)")

    parser = command("export", export, "export one file per clip, or WebDataset tars, for other programs")
    parser.add_argument("cache", type=_cache)
    parser.add_argument("out", type=output_path)
    parser.add_argument("--format", choices=["safetensors", "webdataset"], default="safetensors")


def _cache(text: str) -> Path | str:
    """Return a cache's folder, or its URL unchanged."""
    return text if URL.match(text) else Path(text)


def vae_of(args: Arguments) -> str:
    """Return the VAE that is asked for, else the shipped one that the cache was built with; of a new cache the one for
    natural footage."""
    from ..inference.shipped import find_shipped_vae
    from ..utils.storage import open_storage
    from . import format as fmt

    if args.vae is not None:
        return str(args.vae)
    storage = open_storage(args.cache)
    if args.action == "build" and not storage.exists(fmt.HEADER):
        return str(NATURAL_VAE)
    return str(find_shipped_vae(fmt.read_header(storage).vae.fingerprint, storage.root))


def _part(text: str) -> tuple[int, int]:
    """Parse "2/8"."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text} must be I/N with 1 <= I <= N, such as 2/8")
    return int(first), int(count)


def _add_columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--columns", nargs="+", default=[], metavar="COLUMN=NAME",
                        help="column names of a list that differ from the defaults: path=video caption=text")


def build(args: Arguments) -> None:
    from ..data.files import format_left_out
    from ..inference.adapters import load_autoencoder
    from ..inference.reconstruct import low_psnr
    from ..trainer.distributed import local_device
    from ..utils.config import override
    from .build.builder import build_cache, dry_run
    from .build.executors import default_devices
    from .build.plan import note_lines
    from .build.settings import BuildSettings

    settings = override(BuildSettings(), {
        "frames": args.frames, "frame_rate": args.frame_rate, "sizes": args.size or [(64, 64)], "clips": args.clips,
        "store": args.store, "dtype": args.store_dtype, "precision": args.dtype,
        "batch": args.batch, "compiled": args.compile, "shard_mb": args.shard_mb,
        "shard_clips": args.shard_clips, "workers": args.workers, "file_seconds": args.file_seconds,
        "patience": args.patience, "keep_truncated": args.keep_truncated, "retry": args.retry,
        "columns": tuple(args.columns), "partitions": args.partitions, "part": args.part, "on": args.on,
        "address": args.address, "devices": tuple(args.devices) or default_devices(args.on),
        "scratch_gb": args.scratch_gb}, "odvae cache build")
    if not 0 <= args.max_set_aside <= 1:
        raise UserError(f"--max-set-aside {args.max_set_aside:g} must be from 0 to 1")
    vae = load_autoencoder(vae_of(args)).model
    if settings.on == "local" and not settings.devices:
        vae = vae.to(local_device())
    if args.dry_run:
        totals, lines = dry_run(args.source, args.cache, vae, settings)
        print_set_aside(totals)
        for line in lines:
            print_result(line)
        _check_rejects(totals, args)
        return
    freeze()  # else collections walk through all that was imported, which takes a third of the planning's time
    summary = build_cache(args.source, args.cache, vae, settings)
    print_set_aside(summary)
    for line in [*note_lines(summary.notes), *format_left_out(summary.left_out)]:
        print_result(line)
    if summary.captions_from_names:
        print_result(f"{summary.captions_from_names} files have only their names as captions")
    duplicates = f", {summary.duplicates} duplicates" if summary.duplicates else ""
    print_result(f"{summary.done} clips encoded, {summary.reused} reused, {summary.set_aside_kinds.total()} set aside"
                 f"{duplicates}, in {summary.seconds:.1f} s")
    if summary.done:
        print_result(f"{summary.frames_encoded / max(1e-9, summary.encode_seconds):.1f} frames/s"
                     + (f"; PSNR {summary.psnr:.1f} dB" if summary.psnr is not None else ""))
    for line in low_psnr(summary.psnr):
        print_result(line)
    for name, rate in sorted(summary.rates.items()) if len(summary.rates) > 1 else ():
        print_result(f"{name}: {rate:.1f} frames/s")
    print_result(f"{args.cache}: {format_bytes(summary.bytes)} for {summary.frames} frames, "
                 f"{format_bytes(summary.raw_bytes)} as raw video "
                 f"({summary.raw_bytes / max(1, summary.bytes):.0f} times as much)")
    _check_rejects(summary, args)


class SetAsideError(UserError):
    """A build succeeded, but set aside more files than allowed."""

    exit_status = 3


def _check_rejects(totals: SourceTotals, args: Arguments) -> None:
    """Raise SetAsideError if more was set aside than allowed."""
    share, number = totals.share_set_aside, totals.set_aside_kinds.total()
    if share > args.max_set_aside:
        raise SetAsideError(f"{share:.0%} of the files were set aside, more than --max-set-aside "
                            f"{args.max_set_aside:g}; see the reasons above. The other files are in the cache")
    if args.max_rejects is not None and number > args.max_rejects:
        raise SetAsideError(f"{number} files and clips were set aside, more than --max-rejects {args.max_rejects}; see "
                            "the reasons above. The other files are in the cache")


def print_set_aside(totals: SourceTotals) -> None:
    """Print the first rejects and the number of each kind; all of them are in each partition's rejects.parquet."""
    for entry in totals.set_aside[:MAX_LISTED]:
        print_result(f"set aside: {entry}")
    number = totals.set_aside_kinds.total()
    if number > MAX_LISTED:
        kinds = ", ".join(f"{count} {kind}" for kind, count in totals.set_aside_kinds.most_common())
        print_result(f"set aside: {number - MAX_LISTED} more (in all: {kinds})")
    from ..data.failures import is_recorded

    transient = sum(count for kind, count in totals.set_aside_kinds.items() if not is_recorded(kind))
    if transient:
        print_result(f"{transient} of these are transient; the next build tries them again")


def verify(args: Arguments) -> None:
    from ..inference.adapters import load_autoencoder
    from .maintain.verify import verify as run

    vae = load_autoencoder(vae_of(args)).model if args.decode else None
    result = run(args.cache, vae, args.decode, args.repair)
    for line in result.lines:
        print_result(line)
    if result.faults:
        raise UserError(f"{args.cache}: {len(result.faults)} faults\n" + "\n".join(result.faults[:MAX_LISTED]))


def stats(args: Arguments) -> None:
    from .maintain.statistics import stats as run

    for line in run(args.cache):
        print_result(line)


def show(args: Arguments) -> None:
    from ..inference.adapters import load_autoencoder
    from .maintain.show import show as run

    run(args.cache, load_autoencoder(vae_of(args)).model, args.out, args.count, args.where, args.seed)
    print_result(str(args.out))


def query(args: Arguments) -> None:
    from .maintain.query import query as run

    for line in run(args.cache, args.sql, args.out):
        print_result(line)


def gc(args: Arguments) -> None:
    from .maintain.garbage import collect_garbage

    garbage = collect_garbage(args.cache, args.sources, args.columns, dry_run=args.dry_run, force=args.yes,
                            max_share=1.0 if args.yes else args.max_share)
    for line in garbage.lines(MAX_LISTED):
        print_result(line)
    print_result(f"{garbage.clips} clips {'would be removed' if args.dry_run else 'removed'}, "
                 f"{format_bytes(garbage.bytes)}")


def merge(args: Arguments) -> None:
    from .maintain.merge import merge as run

    clips, duplicates = run(args.caches, args.out, args.partitions)
    print_result(f"{clips} clips in {args.out}, {duplicates} duplicates dropped")


def export(args: Arguments) -> None:
    from .maintain.export import export as run

    print_result(f"{run(args.cache, args.out, args.format)} clips in {args.out}")
