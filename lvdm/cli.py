"""The command line: lvdm embed | train | generate | evaluate | demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from odvae.cli import add_config_arguments, split_config, tell
from odvae.runtime.errors import UserError, command_line
from odvae.runtime.progress import setup_logging

from .defaults import GUIDANCE_SCALE, STEPS

Arguments = argparse.Namespace


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="lvdm", description="Latent video diffusion: train on a cache, generate.")
    commands = root.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[Arguments], None], text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(run=run)
        return one

    one = command("train", train, "train an LVDM on a latent cache; the same command again goes on where it stopped")
    add_config_arguments(one)

    one = command("embed", embed, "a cache's captions through a text encoder, each once; a training does it by itself")
    one.add_argument("cache", type=Path)
    one.add_argument("--text-encoder", help="a transformers encoder's folder or hub name (default: the built-in one)")

    one = command("generate", generate, "videos from prompts, written while they are sampled")
    one.add_argument("prompts", nargs="+", metavar="PROMPT")
    one.add_argument("--pipeline", type=Path, help="a pipeline's folder (default: the weights that ship)")
    one.add_argument("--out", type=Path, default=Path("outputs/generate"))
    one.add_argument("--frames", type=int, default=81, help="of the whole result, 1 + 4k")
    one.add_argument("--negative-prompt", default="")
    one.add_argument("--steps", type=int, default=STEPS, help="Euler steps a group of latents")
    one.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--image", type=Path, help="the first frame")
    one.add_argument("--video", type=Path, help="go on from the end of this video")
    one.add_argument("--scale", type=int, default=1, help="enlarge the written pixels by a whole number")

    one = command("evaluate", evaluate, "share of scene prompts whose colour and direction are found in the videos")
    one.add_argument("--pipeline", type=Path, help="a pipeline's folder (default: the weights that ship)")
    one.add_argument("--prompts", type=int, default=48)
    one.add_argument("--frames", type=int, default=17, help="1 + 4k; the last 17 are measured")
    one.add_argument("--steps", type=int, default=STEPS)
    one.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    one.add_argument("--seed", type=int, default=1000)
    one.add_argument("--out", type=Path, help="write a contact sheet of the videos to this PNG")

    one = command("demo", demo, "the whole way, from video files to long generated videos, with a report")
    one.add_argument("--videos", type=Path, help="your own folder of videos (default: rendered clips)")
    one.add_argument("--out", type=Path, default=Path("outputs/demo"))
    one.add_argument("--minutes", type=float, default=2.5, help="of live LVDM training")
    return root


def train(args: Arguments) -> None:
    from odvae.runtime.config import load_config

    from .train import TrainConfig
    from .train import train as run

    path, overrides = split_config(args.config)
    tell(f"the pipeline is in {run(load_config(TrainConfig, path, overrides))}")


def embed(args: Arguments) -> None:
    from odvae.cache import LatentCache
    from odvae.cache.text import embed_captions

    from .text import load_text_encoder

    captions = ["", *LatentCache(args.cache).captions]
    encoder = load_text_encoder(args.text_encoder)
    store, done = embed_captions(args.cache, encoder, captions, name=args.text_encoder or "built-in")
    tell(f"{done} captions embedded, {len(set(captions)) - done} reused, in {store.folder}")


def generate(args: Arguments) -> None:
    from .generate import generate as run
    from .generate import load_pipeline, read_beginning

    if args.scale < 1:
        raise UserError(f"--scale {args.scale} must be at least 1")
    if args.image is not None and args.video is not None:
        raise UserError("give --image or --video, not both")
    pipeline = load_pipeline(args.pipeline)
    beginning = args.image or args.video
    video = None if beginning is None else read_beginning(pipeline, beginning)
    paths = run(pipeline, args.prompts, args.out, frames=args.frames, seed=args.seed,
                scale=args.scale, negative_prompt=args.negative_prompt, steps=args.steps,
                guidance_scale=args.guidance_scale, video=video)
    for path in paths:
        tell(str(path))
    tell(str(args.out / "contact_sheet.png"))


def evaluate(args: Arguments) -> None:
    from odvae.runtime.figures import contact_sheet

    from .evaluate import prompt_accuracy
    from .generate import load_pipeline

    result = prompt_accuracy(load_pipeline(args.pipeline), args.prompts, args.frames, steps=args.steps,
                             guidance_scale=args.guidance_scale, seed=args.seed)
    if args.out is not None:
        labels = [("ok    " if ok else "WRONG ") + text for ok, text in zip(result.right, result.prompts, strict=True)]
        contact_sheet(list(result.videos), args.out, labels)
    tell(f"{args.prompts} prompts, {args.frames} frames: colour and direction {result.both:.3f}, "
         f"colour {result.colour:.3f}, direction {result.direction:.3f} (chance .021); background's pattern "
         f"{result.background:.3f} (chance .250), its contrast at the end against the beginning "
         f"{result.contrast_kept:.2f}")


def demo(args: Arguments) -> None:
    from odvae.cli import main as odvae

    from .demo import run

    run({"odvae": odvae, "lvdm": main}, args.out, args.videos, args.minutes)


@command_line
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    setup_logging()
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
