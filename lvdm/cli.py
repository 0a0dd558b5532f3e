"""The command line: lvdm embed | train | import | generate | decode | evaluate | demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from odvae.cli_options import (
    add_config_arguments,
    add_dry_run_options,
    add_memory_arguments,
    memory_choice,
    split_config,
)
from odvae.utils.errors import UserError, cli_main, output_path, path_or_url
from odvae.utils.progress import print_result, setup_logging

from . import __version__
from .cli_options import HISTORY_OPTIONS, Command, add_evaluation_options, add_generation_options
from .generation.arguments import check_source, check_supported, dry_run, load_requests, sheet_path

Arguments = argparse.Namespace


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
    add_dry_run_options(command)

    command = add_command("embed", run_embed, "embed a cache's captions with a text encoder; `train` does it by itself")
    command.add_argument("cache", type=path_or_url)
    command.add_argument("--text-encoder",
                         help="a transformers encoder's folder or hub name (default: the built-in one)")

    command = add_command("generate", run_generate, "generate videos from prompts, written while they are sampled; the "
                                                    "same command resumes stopped ones")
    command.add_options = add_generation_options

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
    add_evaluation_options(command)

    command = add_command("demo", run_demo_command, "the end-to-end demo, from video files to long generated videos, "
                                                    "with a report")
    command.add_argument("--videos", type=Path, help="your own folder of videos (default: rendered clips)")
    command.add_argument("--out", type=output_path, default=Path("outputs/demo"))
    command.add_argument("--minutes", type=float, help="total time; the trainings take the steps that fit (default: 9)")
    return root


def run_train(args: Arguments) -> None:
    path, overrides = split_config(args.config)  # report mistakes before the slow imports
    from odvae.utils.config import load_config

    from .training.train import TrainConfig, train

    config = load_config(TrainConfig, path, overrides)
    if args.dry_run:
        from .training.dry_run import plan_training

        for line in plan_training(config, processes=args.processes, flops=args.flops, samples=args.samples).lines():
            print_result(line)
        return
    pipeline = train(config, args.change_schedule)
    print_result(f"the pipeline is in {pipeline}")


def run_embed(args: Arguments) -> None:
    from odvae.cache import LatentCache
    from odvae.cache.embed import embed_captions

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
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        keep_videos=args.keep_videos,
        precision=args.dtype,
        history={name: value for name in HISTORY_OPTIONS if (value := getattr(args, name)) is not None},
        world=args.world,
        fvd_frames=args.fvd_frames,
        given=args.given,
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
