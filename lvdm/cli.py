"""The command line: lvdm embed | train | generate | decode | evaluate | demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from odvae.cli import add_config_arguments, add_memory_arguments, memory_choice, print_result, split_config
from odvae.utils.errors import UserError, cli_main, output_path
from odvae.utils.progress import setup_logging

from . import __version__
from .defaults import GUIDANCE_SCALE, STEPS

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from .generation.requests import GenerationRequest
    from .sampling.pipeline import LVDMPipeline

Arguments = argparse.Namespace
NO_OPTION = ("prompt", "sections", "source")  # parameters that are given otherwise


class Command(argparse.ArgumentParser):
    """A command. `add_options` adds options when the command is parsed: what they come from takes time to import."""

    add_options: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        if self.add_options is not None:
            self.add_options(self)
            self.add_options = None
        return super().parse_known_args(*args, **kwargs)


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="lvdm", description="Latent video diffusion: train on a cache, generate.")
    root.add_argument("--version", action="version", version=f"lvdm {__version__}")
    commands = root.add_subparsers(dest="command", required=True, parser_class=Command)

    def command(name: str, run: Callable[[Arguments], None], text: str) -> Command:
        one: Command = commands.add_parser(name, help=text, description=text)
        one.set_defaults(run=run)
        return one

    one = command("train", train, "train an LVDM on a latent cache; the same command again goes on where it stopped")
    add_config_arguments(one)

    one = command("embed", embed, "a cache's captions through a text encoder, each once; a training does it by itself")
    one.add_argument("cache", type=Path)
    one.add_argument("--text-encoder", help="a transformers encoder's folder or hub name (default: the built-in one)")

    one = command("generate", generate, "videos from prompts, written while they are sampled; what was stopped goes on "
                                        "where it stopped")
    one.add_options = _add_generation_arguments

    one = command("decode", decode, "latents that `generate` kept, to a video again")
    one.add_argument("latents", type=Path, metavar="FILE.safetensors")
    one.add_argument("target", type=output_path, metavar="OUT.mp4")
    one.add_argument("--pipeline", type=Path, help="the one that made them (default: the weights that ship)")
    one.add_argument("--scale", type=int, help="enlarge the written pixels by a whole number (default: as it was)")
    add_memory_arguments(one)

    one = command("evaluate", evaluate, "pipelines in one table: held-out loss, prompts, Frechet distance, drift by "
                                        "length, speed and memory")
    _add_evaluation_arguments(one)

    one = command("demo", demo, "the whole way, from video files to long generated videos, with a report")
    one.add_argument("--videos", type=Path, help="your own folder of videos (default: rendered clips)")
    one.add_argument("--out", type=output_path, default=Path("outputs/demo"))
    one.add_argument("--minutes", type=float, help="that all may take; the trainings take the steps that fit "
                                                   "(default: 9)")
    return root


def _add_generation_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("prompts", nargs="*", metavar="PROMPT", help="with a model of classes, the name of one")
    one.add_argument("--prompts", type=Path, dest="file", metavar="FILE",
                     help="one a line, or in a .jsonl an object a line: prompt, and any of seed, frames, "
                          "negative_prompt, sections ([[second, prompt], ...]), steps ...")
    one.add_argument("--pipeline", type=Path, help="a pipeline's folder (default: the weights that ship)")
    one.add_argument("--out", type=output_path, help="a folder (default: outputs/generate)")
    one.add_argument("--image", type=Path, help="the first frame")
    one.add_argument("--video", type=Path, help="go on from the end of this video")
    one.add_argument("--continue", type=Path, dest="go_on", metavar="FILE",
                     help="go on from kept latents (.mp4 or .safetensors) to --frames, with the settings they have")
    one.add_argument("--batch", type=int, default=8, help="videos made together, at most")
    one.add_argument("--overwrite", action="store_true", help="make anew what is there already")
    one.add_argument("--dry-run", action="store_true", help="tell what would be made and what it takes, and stop")
    one.add_argument("--offload", choices=["model", "sequential"],
                     help="keep weights off the accelerator while they have nothing to do: by part, or by layer (slow)")
    from .sampling.params import VideoFileParams

    group = one.add_argument_group("parameters", "of each video; stored in its file. The seed is that of the first "
                                                 "video, the next has the next")
    for name, field in VideoFileParams.model_fields.items():
        if name not in NO_OPTION:
            add_field(group, name, field)


def add_field(group: Any, name: str, field: FieldInfo) -> None:
    """Add the option that sets a field of a pydantic schema; without it the argument is None."""
    kind = next(one for one in get_args(field.annotation) or (field.annotation,) if one is not NoneType)
    choices = get_args(kind) or None  # of a Literal
    default = "" if field.default in (None, "") else f" (default: {field.default})"
    group.add_argument(f"--{name.replace('_', '-')}", type=None if choices else kind, choices=choices,
                       help=f"{field.description}{default}")


def _add_evaluation_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("--pipeline", action="append", metavar="[LABEL=]FOLDER",
                     help="once for each; \"shipped\" is the one with the weights that ship (default: it alone)")
    one.add_argument("--out", type=output_path, default=Path("outputs/evaluate-lvdm"),
                     help="a folder (default: %(default)s)")
    one.add_argument("--frames", type=int, nargs="+", default=[17, 129], metavar="N",
                     help="lengths, 1 + 4k; the shortest is the training length (default: 17 129)")
    one.add_argument("--prompts", type=int, metavar="N", help="videos of each length (default: 48, or the whole file)")
    one.add_argument("--prompt-file", type=Path, metavar="FILE",
                     help="your own prompts, as `generate` takes them, in place of those of rendered scenes; whether "
                          "the videos meet them is then not measured")
    one.add_argument("--cache", type=Path, help="a cache of the pipelines' VAE, for the held-out loss")
    one.add_argument("--reference", type=Path, metavar="FOLDER",
                     help="of videos, for the Frechet distance (default: rendered scenes that no training saw)")
    one.add_argument("--fvd", "--rfvd", type=Path, metavar="WEIGHTS",
                     help="file with I3D's weights (RGB, Kinetics-400): the Frechet distance on them too")
    one.add_argument("--batch", type=int, default=24, help="videos made together, at most (default: %(default)s)")
    one.add_argument("--steps", type=int, default=STEPS)
    one.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    one.add_argument("--seed", type=int, default=1000, help="of the first video, the next has the next")
    one.add_argument("--keep-videos", action="store_true", help="write those that are longer than the shortest")


def train(args: Arguments) -> None:
    path, overrides = split_config(args.config)  # report mistakes before the slow imports
    from odvae.utils.config import load_config

    from .training.train import TrainConfig
    from .training.train import train as run

    print_result(f"the pipeline is in {run(load_config(TrainConfig, path, overrides), args.change_schedule)}")


def embed(args: Arguments) -> None:
    from odvae.cache import LatentCache
    from odvae.cache.text import embed_captions

    from .text import load_text_encoder

    captions = ["", *LatentCache(args.cache).all_captions()["caption"].to_pylist()]
    encoder = load_text_encoder(args.text_encoder)
    store, done = embed_captions(args.cache, encoder, captions, name=args.text_encoder or "built-in")
    cut = f" ({encoder.cut} of them cut, as they are longer than the encoder takes)" if encoder.cut else ""
    print_result(f"{done} captions embedded{cut}, {len(set(captions)) - done} reused, in {store.folder}")


def generate(args: Arguments) -> None:
    if args.batch < 1:
        raise UserError(f"--batch {args.batch} must be at least 1")
    if sum(one is not None for one in (args.image, args.video, args.go_on)) > 1:
        raise UserError("give --image, --video or --continue, not more than one of them")
    _check_source(args)
    if args.file and (args.prompts or args.go_on):
        raise UserError("give prompts, or a file of them, or a video to continue")
    if args.go_on and len(args.prompts) > 1:
        raise UserError("--continue takes one prompt at most, that holds from there on")

    from .generation.generate import generate as run
    from .sampling.loading import load_pipeline

    pipeline = load_pipeline(args.pipeline, place=args.offload is None)
    requests = _requests(args, pipeline)
    if args.dry_run:
        for line in plan(pipeline, requests, args.batch):
            print_result(line)
        return
    sheet = None if args.go_on else requests[0].target.with_name("contact_sheet.png")
    done = run(pipeline, requests, batch=args.batch, overwrite=args.overwrite, offload=args.offload, sheet=sheet)
    for line in done.lines():
        print_result(line)
    if done.failed:
        raise done.failure(f"{len(done.failed)} of {len(requests)} videos could not be made; the reasons stand above")


def _check_source(args: Arguments) -> None:
    """Raise UserError where --image or --video names no file, or one of the other kind."""
    from odvae.data.files import is_image
    from odvae.data.video.image import is_animated

    path = args.image or args.video
    if path is None:
        return
    if not path.is_file():
        raise UserError(f"{'--image' if args.image else '--video'} {path}: "
                        f"{'that is a folder' if path.is_dir() else 'there is no such file'}")
    photo = is_image(path) and not is_animated(path)
    if args.image and not photo:
        raise UserError(f"--image {path}: that is no photo that can be read; give a PNG, JPEG, WebP or BMP, or with "
                        "--video a video to go on from")
    if args.video and photo:
        raise UserError(f"--video {path}: that is a photo; give it with --image")


def _requests(args: Arguments, pipeline: LVDMPipeline) -> list[GenerationRequest]:
    """The videos that the arguments ask for."""
    from odvae.utils.config import override

    from .generation.requests import build_requests, continuation, describe_file, load_context_frames
    from .sampling.params import VideoFileParams, read_prompts

    options = {name: value for name in VideoFileParams.model_fields if name not in NO_OPTION
               and (value := getattr(args, name)) is not None}
    if args.go_on:
        changes = options | ({"prompt": args.prompts[0]} if args.prompts else {})
        return [continuation(pipeline, args.go_on, changes, args.out)]
    base = override(VideoFileParams(), options, "the command line")
    out, context_latents = args.out or Path("outputs/generate"), None
    source = args.image or args.video
    if source is not None:
        context_latents = pipeline.encode_video(load_context_frames(pipeline, source, base))
        base = base.model_copy(update={"source": describe_file(source)})
    if args.file:
        return build_requests(out, read_prompts(args.file, base), context_latents)
    if not args.prompts:
        raise UserError("give a prompt, or --prompts FILE; \"\" is a prompt")
    params = [base.model_copy(update={"prompt": prompt, "seed": base.seed + i}) for i, prompt in
              enumerate(args.prompts)]
    return build_requests(out, params, context_latents)


def plan(pipeline: LVDMPipeline, requests: Sequence[GenerationRequest], batch: int) -> list[str]:
    """What would be made, and what it would take."""
    from .generation.requests import with_model_defaults

    lines: list[str] = []
    sizes: dict[tuple[int, int], int] = {}
    for request in requests:
        one = with_model_defaults(request.settings, pipeline)
        assert one.height and one.width
        lines.append(f"{request.target}: {one.frames} frames, {one.frames / (one.frame_rate or 1):.1f} s, of "
                     f"{one.height}x{one.width}")
        sizes[one.height, one.width] = sizes.get((one.height, one.width), 0) + 1
    for (height, width), count in sizes.items():
        together = min(batch, count)
        lines.append(f"{together} x {height}x{width} together: {pipeline.requirements(height, width, together)}")
    return lines


def decode(args: Arguments) -> None:
    from .generation.generate import decode as run
    from .sampling.loading import load_pipeline

    run(load_pipeline(args.pipeline), args.latents, args.target, args.scale, memory_choice(args))
    print_result(str(args.target))


def evaluate(args: Arguments) -> None:
    from .evaluation.evaluate import SHIPPED
    from .evaluation.evaluate import evaluate as run

    result = run(args.pipeline or [SHIPPED], args.out, frames=args.frames, prompts=args.prompts,
                 prompt_file=args.prompt_file, cache=args.cache, reference=args.reference, i3d_weights=args.fvd,
                 batch=args.batch, steps=args.steps, guidance_scale=args.guidance_scale, seed=args.seed,
                 keep_videos=args.keep_videos)
    for line in result.lines():
        print_result(line)


def demo(args: Arguments) -> None:
    from odvae.cli import main as odvae

    from .demo import MINUTES, run

    run({"odvae": odvae, "lvdm": main}, args.out, args.videos, MINUTES if args.minutes is None else args.minutes)


@cli_main
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    setup_logging()
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
