"""The command line: lvdm embed | train | import | generate | decode | evaluate | demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from odvae.cli import (
    add_config_arguments,
    add_memory_arguments,
    add_precision,
    memory_choice,
    print_result,
    split_config,
)
from odvae.utils.errors import UserError, cli_main, output_path, path_or_url
from odvae.utils.progress import setup_logging

from . import __version__
from .defaults import GUIDANCE_SCALE, STEPS
from .generation.arguments import NO_OPTION, check_source, check_supported, dry_run, load_requests, sheet_path

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Arguments = argparse.Namespace


class Command(argparse.ArgumentParser):
    """A command. `add_options` is called when the command is parsed, for options whose definition is slow to import."""

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

    def add_command(name: str, run: Callable[[Arguments], None], text: str) -> Command:
        command: Command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    command = add_command("train", run_train, "train an LVDM on a latent cache; the same command resumes a stopped run")
    add_config_arguments(command)
    _add_dry_run_arguments(command)

    command = add_command("embed", run_embed, "embed a cache's captions with a text encoder; `train` does it by itself")
    command.add_argument("cache", type=path_or_url)
    command.add_argument("--text-encoder",
                         help="a transformers encoder's folder or hub name (default: the built-in one)")

    command = add_command("generate", run_generate, "generate videos from prompts, written while they are sampled; the "
                                                    "same command resumes stopped ones")
    command.add_options = _add_generation_arguments

    command = add_command("import", run_import, "import Open-Sora-Plan v1.2, the system that the OD-VAE was made for, "
                                                "as a pipeline")
    command.add_argument("source", help="the transformer: a folder, or a hub name such as "
                                        "LanguageBind/Open-Sora-Plan-v1.2.0/93x480p")
    command.add_argument("target", type=output_path, metavar="OUT", help="a new folder for the pipeline")
    command.add_argument("--vae", required=True, help="a folder or hub name, such as "
                                                      "LanguageBind/Open-Sora-Plan-v1.2.0/vae")
    command.add_argument("--text-encoder", default="google/mt5-xxl",
                         help="a folder or hub name (default: %(default)s)")
    command.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                         help="of the transformer's and the text encoder's weights (default: %(default)s)")

    command = add_command("decode", run_decode, "decode latents that `generate` stored to a video again")
    command.add_argument("latents", type=Path, metavar="FILE.safetensors")
    command.add_argument("target", type=output_path, metavar="OUT.mp4")
    command.add_argument("--pipeline", type=Path, help="the pipeline that generated them (default: the shipped one)")
    command.add_argument("--scale", type=int, help="whole-number enlargement of the pixels (default: the stored one)")
    add_memory_arguments(command)

    command = add_command("evaluate", run_evaluate, "compare pipelines in one table: held-out loss, prompt accuracy, "
                                                    "Frechet distance, drift by length, speed and memory")
    _add_evaluation_arguments(command)

    command = add_command("demo", run_demo_command, "the end-to-end demo, from video files to long generated videos, "
                                                    "with a report")
    command.add_argument("--videos", type=Path, help="your own folder of videos (default: rendered clips)")
    command.add_argument("--out", type=output_path, default=Path("outputs/demo"))
    command.add_argument("--minutes", type=float, help="total time; the trainings take the steps that fit (default: 9)")
    return root


def _add_dry_run_arguments(command: argparse.ArgumentParser) -> None:
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


def _add_generation_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompts", nargs="*", metavar="PROMPT", help="for a class-conditional model, a class name")
    command.add_argument("--prompts", type=Path, dest="prompt_file", metavar="FILE",
                         help="one prompt per line, or in a .jsonl an object per line: prompt, and optionally seed, "
                              "num_frames, negative_prompt, sections ([[second, prompt], ...]) ...")
    command.add_argument("--pipeline", type=Path, help="a pipeline's folder, ours or a text-to-video one of diffusers "
                                                       "(default: the shipped one)")
    command.add_argument("--lora", action="append", default=[], metavar="FILE[:WEIGHT]",
                         help="a LoRA of `lvdm train` or diffusers (.safetensors or its folder), and the weight of its "
                              "update (default: 1); repeat for several")
    command.add_argument("--out", type=output_path, help="a folder (default: outputs/generate)")
    command.add_argument("--image", type=Path, help="the first frame")
    command.add_argument("--video", type=Path, help="continue from the end of this video")
    command.add_argument("--continue", type=Path, dest="continued", metavar="FILE",
                         help="continue stored latents (.mp4 or .safetensors) up to --num-frames, with their settings")
    command.add_argument("--batch", type=int, default=8,
                         help="videos generated together, at most (default: %(default)s)")
    command.add_argument("--overwrite", action="store_true", help="generate existing videos again")
    command.add_argument("--dry-run", action="store_true", help="only print what would be generated and the memory")
    command.add_argument("--compile", action="store_true",
                         help="torch.compile the transformer's blocks: takes a minute, then faster")
    command.add_argument("--offload", choices=["model", "sequential"],
                         help="keep idle weights off the accelerator: by component, or by layer (slow)")
    command.add_argument("--on", choices=["local", "ray"], default="local",
                         help="generate on this machine, or spread the batches over a Ray cluster")
    command.add_argument("--address", metavar="ADDRESS", help="of the Ray cluster: auto, or host:port (default: "
                         "RAY_ADDRESS, or one that is started on this machine)")
    command.add_argument("--devices", metavar="KIND=N",
                         help="with --on ray: how many pipelines, such as gpu=4 or cpu=2 (default: one on each GPU of "
                              "the cluster, or on each CPU where it has no GPU)")
    add_precision(command)
    from .sampling.params import VideoFileParams

    group = command.add_argument_group("parameters", "of each video, stored in its file. The seed is that of the first "
                                                     "video; the next has the next")
    for name, field in VideoFileParams.model_fields.items():
        if name not in NO_OPTION:
            add_field(group, name, field)


def add_field(group: Any, name: str, field: FieldInfo) -> None:
    """Add the option that sets a field of a pydantic schema; without it the argument is None."""
    kind = next(kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not NoneType)
    choices = get_args(kind) or None  # of a Literal
    default = "" if field.default in (None, "") else f" (default: {field.default})"
    group.add_argument(f"--{name.replace('_', '-')}", type=None if choices else kind, choices=choices,
                       help=f"{field.description}{default}")


def _add_evaluation_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--pipeline", action="append", metavar="[LABEL=]FOLDER",
                         help="repeat for each; \"shipped\" is the shipped one (default: it alone)")
    command.add_argument("--out", type=output_path, default=Path("outputs/evaluate-lvdm"),
                         help="a folder (default: %(default)s)")
    command.add_argument("--frames", type=int, nargs="+", default=[17, 129], metavar="N",
                         help="lengths, 1 + 4k; the shortest is the training length (default: 17 129)")
    command.add_argument("--prompts", type=int, metavar="N",
                         help="videos of each length (default: 48, or the whole file)")
    command.add_argument("--prompt-file", type=Path, metavar="FILE",
                         help="your own prompts, in the format of `generate`, instead of those of rendered scenes; "
                              "prompt accuracy is then not measured")
    command.add_argument("--cache", type=Path, help="a cache of the pipelines' VAE, for the held-out loss")
    command.add_argument("--reference", type=Path, metavar="FOLDER",
                         help="videos for the Frechet distance (default: rendered scenes that no training saw)")
    command.add_argument("--fvd", "--rfvd", type=Path, metavar="WEIGHTS",
                         help="I3D's weights (RGB, Kinetics-400), for the Frechet distance on its features too")
    command.add_argument("--batch", type=int, default=24,
                         help="videos generated together, at most (default: %(default)s)")
    command.add_argument("--num-inference-steps", type=int, default=STEPS)
    command.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    command.add_argument("--seed", type=int, default=1000, help="of the first video; the next has the next")
    add_precision(command)
    command.add_argument("--keep-videos", action="store_true", help="write the videos longer than the shortest")


def run_train(args: Arguments) -> None:
    path, overrides = split_config(args.config)  # report mistakes before the slow imports
    from odvae.utils.config import load_config

    from .training.train import TrainConfig, train

    config = load_config(TrainConfig, path, overrides)
    if args.dry_run:
        from .training.dry_run import plan_training

        if min(args.processes, args.flops or 1, args.samples or 1) <= 0:
            raise UserError("--processes, --flops and --samples must be above 0")
        for line in plan_training(config, processes=args.processes, flops=args.flops, samples=args.samples).lines():
            print_result(line)
        return
    pipeline = train(config, args.change_schedule)
    print_result(f"the pipeline is in {pipeline}")


def run_embed(args: Arguments) -> None:
    from odvae.cache import LatentCache
    from odvae.cache.text import embed_captions

    from .text import load_text_encoder, on_accelerator

    captions = chain([""], chain.from_iterable(some.to_pylist() for some in LatentCache(args.cache).iter_captions()))
    encoder = load_text_encoder(args.text_encoder)
    with on_accelerator(encoder):
        store, count = embed_captions(args.cache, encoder, captions, name=args.text_encoder or "built-in")
    truncated = f" ({encoder.num_truncated} of them truncated)" if encoder.num_truncated else ""
    print_result(f"{count} captions embedded{truncated}, {len(store)} in {store.folder}")


def run_generate(args: Arguments) -> None:
    if args.batch < 1:
        raise UserError(f"--batch {args.batch} must be at least 1")
    if sum(source is not None for source in (args.image, args.video, args.continued)) > 1:
        raise UserError("give only one of --image, --video and --continue")
    check_source(args)
    if args.prompt_file and (args.prompts or args.continued):
        raise UserError("give only one of prompts, --prompts FILE and --continue")
    if args.continued and len(args.prompts) > 1:
        raise UserError("--continue takes at most one prompt, which holds from there on")

    if args.on != "ray" and (args.address or args.devices):
        raise UserError("--address and --devices are of a Ray cluster; add --on ray")

    check_supported(args)
    if args.on == "ray" and not args.dry_run:
        from .generation.ray_actors import generate_on_ray

        report = generate_on_ray(args)
    else:
        from .generation.generate import generate

        pipeline, requests = load_requests(args)
        if args.dry_run:
            for line in dry_run(pipeline, requests, args.batch):
                print_result(line)
            return
        report = generate(pipeline, requests, batch=args.batch, overwrite=args.overwrite, offload=args.offload,
                          sheet=sheet_path(args, requests))
    for line in report.lines():
        print_result(line)
    if report.failed:
        count = len(report.failed) + len(report.generated) + len(report.reused)
        raise report.failure(f"{len(report.failed)} of {count} videos failed; the reasons are above")


def run_import(args: Arguments) -> None:
    import torch

    from .convert.open_sora_plan import import_pipeline

    pipeline = import_pipeline(args.source, args.target, vae=args.vae, text_encoder=args.text_encoder,
                               dtype=getattr(torch, args.dtype))
    size = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    print_result(f"a transformer of {size / 1e6:.1f} M parameters; the pipeline is in {args.target}")


def run_decode(args: Arguments) -> None:
    from .generation.generate import decode
    from .sampling.loading import load_pipeline

    decode(load_pipeline(args.pipeline), args.latents, args.target, args.scale, memory_choice(args))
    print_result(str(args.target))


def run_evaluate(args: Arguments) -> None:
    from .evaluation.evaluate import SHIPPED, evaluate

    result = evaluate(
        args.pipeline or [SHIPPED],
        args.out,
        frames=args.frames,
        prompts=args.prompts,
        prompt_file=args.prompt_file,
        cache=args.cache,
        reference=args.reference,
        i3d_weights=args.fvd,
        batch=args.batch,
        steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        keep_videos=args.keep_videos,
        precision=args.dtype,
    )
    for line in result.lines():
        print_result(line)


def run_demo_command(args: Arguments) -> None:
    from odvae.cli import main as odvae

    from .demo.demo import MINUTES, run_demo

    minutes = MINUTES if args.minutes is None else args.minutes
    run_demo({"odvae": odvae, "lvdm": main}, args.out, args.videos, minutes)


@cli_main
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    setup_logging()
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
