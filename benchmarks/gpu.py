"""Check and measure everything on one accelerator, in minutes: is it correct there, and how fast is it?

    python benchmarks/gpu.py [--device cuda] [--minutes 8] [--only NAME ...] [--out outputs/gpu.jsonl]

`make gpu` runs it. Each result is printed and written as it comes, so a part that fails or a run that is stopped costs
nothing else; parts that no longer fit the minutes are named at the end. On a CPU the same parts run at small sizes.
Exit status 1: a check failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_correctness
import gpu_speed
import torch
from common import record, table
from gpu_results import Part, Result

PARTS: tuple[Part, ...] = (*gpu_correctness.PARTS, *gpu_speed.PARTS)


def run_part(part: Part, device: torch.device) -> Iterator[Result]:
    """Run a part; an error is a result too."""
    try:
        yield from part.run(device)
    except Exception as error:
        traceback.print_exc()
        yield Result(f"{part.name}: {type(error).__name__}: {error}".splitlines()[0], None, ok=False)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run(parts: list[Part], device: torch.device, minutes: float, emit: Callable[[Part, Result], object]) -> list[str]:
    """Run parts until the time is used; returns the names of those that were left out."""
    end = time.perf_counter() + 60 * minutes
    for number, part in enumerate(parts):
        if time.perf_counter() > end:
            return [left.name for left in parts[number:]]
        for result in run_part(part, device):
            emit(part, result)
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", choices=[part.name for part in PARTS])
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu.jsonl"))
    args = parser.parse_args()
    device = torch.device(args.device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, Result]] = []

    def emit(part: Part, result: Result) -> None:
        rows.append((part.name, result))
        print(f"{part.name}: {result}", flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps({"part": part.name, **result.as_dict()}) + "\n")

    parts = [part for part in PARTS if not args.only or part.name in args.only]
    left_out = run(parts, device, args.minutes, emit)
    print()
    table(["part", "what", "value", "unit", "limit", "ok"], [[name, *result.cells] for name, result in rows])
    if left_out:
        print(f"not run within {args.minutes:g} minutes: {', '.join(left_out)}")
    record("gpu", {"device": str(device), "minutes": args.minutes, "left_out": left_out},
           [{"part": name, **result.as_dict()} for name, result in rows])
    return int(any(result.ok is False for _, result in rows))


if __name__ == "__main__":
    sys.exit(main())
