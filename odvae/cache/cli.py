"""odvae cache build | verify | stats | show | query | gc | merge | export."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..utils.errors import UserError, output_path
from ..utils.format import format_bytes
from ..utils.progress import print_result
from ..weights import DEMO_VAE

Arguments = argparse.Namespace
Command = Callable[[str, Callable[[Arguments], None], str], argparse.ArgumentParser]
SHOWN = 20  # reasons that a summary tells one by one


def add_cache_commands(command: Command) -> None:
    one = command("build", build, "encode videos into a latent cache; again: only what is new or changed. Several "
                                  "processes, on one host or many, may run the same command at the same time")
    one.add_argument("source", help="a folder (each file's caption in a .txt beside it, else its class folder's name, "
                     "else its own; or metadata.csv, .jsonl or .parquet in it), a list (.jsonl, .csv, .parquet with "
                     "path, caption, start, end), Parquet files that hold the videos, tars in WebDataset's layout; "
                     "here or at a URL (hf://datasets/..., s3://..., https://...)")
    one.add_argument("cache", type=output_path)
    _add_columns(one)
    one.add_argument("--vae", default=str(DEMO_VAE), help="folder or hub name of any autoencoder; of an image VAE each "
                     "frame has its latent")
    one.add_argument("--frames", type=int, nargs="+", default=[33], help="lengths of clips, 1 + 4k; of several each "
                     "clip takes the longest that fits")
    one.add_argument("--frame-rate", type=float, default=8.0, help="frames a second, by presentation time")
    one.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), action="append",
                     help="of clips (default 64 64); give it several times, and each clip takes the nearest in shape")
    one.add_argument("--clips", default="back-to-back", metavar="POLICY",
                     help="back-to-back, every:SECONDS, uniform:CLIPS, whole, or scenes (needs PySceneDetect)")
    one.add_argument("--store", choices=["mean", "moments"], default="mean", help="moments: log-variances as well, so "
                     "that a training can draw a fresh sample of the posterior each epoch")
    one.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    one.add_argument("--batch", type=int, default=8)
    one.add_argument("--shard-mb", type=float, default=256.0, help="at most 256")
    one.add_argument("--shard-clips", type=int, default=512, help="an interruption costs at most one shard's work")
    one.add_argument("--workers", type=int, help="processes that decode (default: one a core, at most 8)")
    one.add_argument("--file-seconds", type=float, default=120.0, help="that a file may take before it is given up; "
                     "what took too long is tried again where this is more than before")
    one.add_argument("--patience", type=float, default=300.0, metavar="SECONDS", help="that failures are retried "
                     "which may pass (the network, a full disk); what fails still is tried again by the next build")
    one.add_argument("--max-set-aside", type=float, default=0.5, metavar="SHARE", help="of the files, from 0 to 1; "
                     "where more is set aside the exit status is 3")
    one.add_argument("--keep-truncated", action="store_true", help="use what can be read of files that are cut off")
    one.add_argument("--retry", action="store_true", help="try again also what was unusable by a file's own faults")
    one.add_argument("--dry-run", action="store_true", help="look at the files, tell what falls where, encode nothing")

    one = command("verify", verify, "check every checksum of a cache, and all else that has to hold")
    one.add_argument("cache", type=Path)
    one.add_argument("--decode", type=int, default=0, metavar="N", help="decode N clips and encode them again")
    one.add_argument("--vae", default=str(DEMO_VAE), help="for --decode")

    one = command("stats", stats, "what a cache holds: buckets, captions, latents' statistics, quality, rejects")
    one.add_argument("cache", type=Path)

    one = command("show", show, "decode some clips into a contact sheet (.png) or a video (.mp4)")
    one.add_argument("cache", type=Path)
    one.add_argument("out", type=output_path, nargs="?", default=Path("outputs/cache.png"))
    one.add_argument("--vae", default=str(DEMO_VAE))
    one.add_argument("--count", type=int, default=12)
    one.add_argument("--where", help="SQL, such as \"motion > 0.1 and caption like '%%red%%'\"")
    one.add_argument("--seed", type=int, default=0, help="which ones")

    one = command("query", query, "SQL over the tables `clips` and `rejects`")
    one.add_argument("cache", type=Path)
    one.add_argument("sql", help="such as \"select bucket, count(*), avg(motion) from clips group by bucket\"")
    one.add_argument("--out", type=output_path, help="a .csv, .parquet or .jsonl instead of lines")

    one = command("gc", gc, "remove clips that no source has any more")
    one.add_argument("cache", type=Path)
    one.add_argument("sources", nargs="+", help="all that it is built from")
    _add_columns(one)
    one.add_argument("--dry-run", action="store_true", help="only tell")
    one.add_argument("--max-share", type=float, default=0.1, metavar="SHARE", help="of the clips, from 0 to 1, that "
                     "goes without --yes")
    one.add_argument("--yes", action="store_true", help="remove what is listed, however much it is")

    one = command("merge", merge, "several caches of one VAE and transform into a new one; the same command again "
                                  "continues where it was stopped")
    one.add_argument("caches", type=Path, nargs="+")
    one.add_argument("--out", type=output_path, required=True)

    one = command("export", export, "a file a clip, or WebDataset tars, for other programs")
    one.add_argument("cache", type=Path)
    one.add_argument("out", type=output_path)
    one.add_argument("--format", choices=["safetensors", "webdataset"], default="safetensors")


def _add_columns(one: argparse.ArgumentParser) -> None:
    one.add_argument("--columns", nargs="+", default=[], metavar="COLUMN=NAME",
                     help="which column of a list is which, where names differ: path=video caption=text")


def build(args: Arguments) -> None:
    from ..data.files import left_out_lines
    from ..inference.adapters import load_autoencoder
    from ..trainer.distributed import local_device
    from ..utils.config import override
    from .build.builder import BuildSettings, build_cache, dry_run
    from .build.plan import note_lines

    settings = override(BuildSettings(), {
        "frames": args.frames, "frame_rate": args.frame_rate, "sizes": args.size or [(64, 64)], "clips": args.clips,
        "store": args.store, "dtype": args.dtype, "batch": args.batch, "shard_mb": args.shard_mb,
        "shard_clips": args.shard_clips, "workers": args.workers, "file_seconds": args.file_seconds,
        "patience": args.patience, "keep_truncated": args.keep_truncated, "retry": args.retry,
        "columns": tuple(args.columns)}, "odvae cache build")
    if not 0 <= args.max_set_aside <= 1:
        raise UserError(f"--max-set-aside {args.max_set_aside:g} must be from 0 to 1")
    vae = load_autoencoder(args.vae).model.to(local_device())
    if args.dry_run:
        plan, lines = dry_run(args.source, args.cache, vae, settings)
        tell_set_aside(plan.set_aside)
        for line in lines:
            print_result(line)
        _check_share(plan.share_set_aside, args.max_set_aside)
        return
    summary = build_cache(args.source, args.cache, vae, settings)
    tell_set_aside(summary.set_aside)
    for line in [*note_lines(summary.notes), *left_out_lines(summary.left_out)]:
        print_result(line)
    if summary.captions_from_names:
        print_result(f"{summary.captions_from_names} files have no other caption than their names")
    more = [f"{summary.elsewhere} by other processes"] * bool(summary.elsewhere)
    more += [f"{summary.duplicates} the same as others"] * bool(summary.duplicates)
    print_result(f"{summary.done} clips encoded, {summary.reused} reused, {len(summary.set_aside)} set aside"
         f"{''.join(f', {part}' for part in more)}, in {summary.seconds:.1f} s")
    if summary.done:
        print_result(f"{summary.frames_encoded / max(1e-9, summary.encode_seconds):.1f} frames a second"
             + (f"; {summary.psnr:.1f} dB on clips that were decoded again" if summary.psnr is not None else ""))
    print_result(
        f"{args.cache}: {format_bytes(summary.bytes)} for {summary.frames} frames, {format_bytes(summary.raw_bytes)} "
        f"as raw video, {summary.raw_bytes / max(1, summary.bytes):.0f} times as much"
    )
    _check_share(summary.share_set_aside, args.max_set_aside)


class SetAsideError(UserError):
    """A build that ended well, with less in the cache than the source promised."""

    exit_status = 3


def _check_share(share: float, most: float) -> None:
    """Raises SetAsideError."""
    if share > most:
        raise SetAsideError(f"{share:.0%} of the files were set aside, more than --max-set-aside {most:g}; the "
                            "reasons stand above. What could be used is in the cache")


def tell_set_aside(entries: Sequence[Any]) -> None:
    """How many of which kind, and the first ones; all of them are in rejects.parquet."""
    for entry in entries[:SHOWN]:
        print_result(f"set aside: {entry}")
    if len(entries) > SHOWN:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(entry.kind for entry in entries).most_common())
        print_result(f"set aside: {len(entries) - SHOWN} more (in all: {kinds})")
    from ..data.failures import is_recorded

    passing = sum(not is_recorded(entry.kind) for entry in entries)
    if passing:
        print_result(f"{passing} of these may pass; the next build tries them again")


def verify(args: Arguments) -> None:
    from ..inference.adapters import load_autoencoder
    from .verify import verify as run

    vae = load_autoencoder(args.vae).model if args.decode else None
    result = run(args.cache, vae, args.decode)
    for line in result.lines:
        print_result(line)
    if result.faults:
        raise UserError(f"{args.cache}: {len(result.faults)} faults\n" + "\n".join(result.faults[:SHOWN]))


def stats(args: Arguments) -> None:
    from .inspect import stats as run

    for line in run(args.cache):
        print_result(line)


def show(args: Arguments) -> None:
    from ..inference.adapters import load_autoencoder
    from .inspect import show as run

    run(args.cache, load_autoencoder(args.vae).model, args.out, args.count, args.where, args.seed)
    print_result(str(args.out))


def query(args: Arguments) -> None:
    from .inspect import query as run

    for line in run(args.cache, args.sql, args.out):
        print_result(line)


def gc(args: Arguments) -> None:
    from .maintain import collect_garbage

    found = collect_garbage(args.cache, args.sources, args.columns, dry_run=args.dry_run, sure=args.yes,
                            max_share=1.0 if args.yes else args.max_share)
    for line in found.lines(SHOWN):
        print_result(line)
    print_result(f"{found.clips} clips {'would be' if args.dry_run else 'were'} removed, {format_bytes(found.bytes)}")


def merge(args: Arguments) -> None:
    from .maintain import merge as run

    clips, twice = run(args.caches, args.out)
    print_result(f"{clips} clips in {args.out}, {twice} that were in several of them once")


def export(args: Arguments) -> None:
    from .export import export as run

    print_result(f"{run(args.cache, args.out, args.format)} clips in {args.out}")
