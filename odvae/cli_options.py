"""Options that several commands share, of `odvae` and `lvdm`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .utils.errors import UserError
from .utils.precision_names import PRECISION_HELP, PRECISIONS

Arguments = argparse.Namespace


def add_config_arguments(sub: argparse.ArgumentParser) -> None:
    """Add [CONFIG] [key=value ...], as `split_config` separates them, and --change-schedule."""
    sub.add_argument("config", nargs="*", metavar="CONFIG.yaml | key=value",
                     help="a YAML file with what differs from the defaults, then overrides such as loop.steps=100")
    sub.add_argument("--change-schedule", action="store_true",
                     help="resume a run with another loop.steps or learning rate; refused otherwise, because the "
                          "schedule affects the result")


def add_dry_run_options(command: argparse.ArgumentParser) -> None:
    """Add --dry-run and the figures that it takes, as `trainer.dry_run.make_plan` does."""
    command.add_argument("--dry-run", action="store_true",
                         help="only print the parameters, the memory by checkpointing mode, and what a step and the "
                              "training take")
    command.add_argument("--processes", type=int, default=1, metavar="N",
                         help="with --dry-run: that train together (default: %(default)s)")
    command.add_argument("--flops", type=float, metavar="F",
                         help="with --dry-run: FLOPs per second that a process reaches, such as 4e14 (default: 40%% of "
                              "the fastest matrix product of this machine)")
    command.add_argument("--samples", type=int, metavar="N",
                         help="with --dry-run: samples to train on (default: those of loop.steps)")


def add_precision(sub: argparse.ArgumentParser) -> None:
    """Add --dtype, as `utils.precision.resolve_precision` takes it."""
    sub.add_argument("--dtype", choices=PRECISIONS, default="auto", help=PRECISION_HELP)


def add_compile(sub: argparse.ArgumentParser) -> None:
    """Add --compile."""
    sub.add_argument("--compile", action="store_true",
                     help="torch.compile the VAE's blocks: takes a minute for each size of video, then faster on an "
                          "accelerator; the same values to rounding")


def add_memory_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--memory", default="auto", metavar="auto | SIZE",
                     help="memory to plan for: what is free (auto), or a size such as 2GiB or 500MiB; tiles, which are "
                          "not exact, are used only if whole frames do not fit")
    sub.add_argument("--frames-at-once", type=int, metavar="N", help="maximum frames per chunk, a multiple of 4")
    sub.add_argument("--tile", type=int, nargs=2, metavar=("H", "W"), help="use tiles of this size in pixels")
    sub.add_argument("--no-tiling", action="store_true", help="fail instead of using tiles")


def memory_choice(args: Arguments) -> Any:
    """Return the `MemoryOptions` for these arguments."""
    from .inference.memory import MemoryOptions

    if args.tile and args.no_tiling:
        raise UserError("give --tile or --no-tiling, not both")
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(?:i?B)?", args.memory, re.IGNORECASE)
    if not match and args.memory != "auto":
        raise UserError(f"--memory {args.memory} is neither auto nor a size such as 2GiB or 500MiB")
    size = int(float(match[1]) * 2 ** (10 * (1 + "KMGT".index(match[2].upper())))) if match else None
    return MemoryOptions(size, args.frames_at_once, tuple(args.tile) if args.tile else None, not args.no_tiling)


def split_config(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Separate positional arguments into the YAML file (or None) and the overrides."""
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise UserError(f"expected one config file, got {', '.join(files)}; write overrides as key=value")
    return (Path(files[0]) if files else None), [a for a in arguments if "=" in a]
