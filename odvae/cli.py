"""odvae render | train | distill | configs | reconstruct | evaluate | encode | decode | inflate | import | export
| consolidate | cache."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import __version__
from .cache.cli import add_cache_commands
from .cli_options import (
    add_compile,
    add_config_arguments,
    add_dry_run_options,
    add_memory_arguments,
    add_precision,
    memory_choice,
    split_config,
)
from .utils.errors import UserError, cli_main, output_path
from .utils.progress import print_result, setup_logging
from .weights import NATURAL_VAE

Arguments = argparse.Namespace


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="odvae", description="OD-VAE: compress videos 4x in time and 8x8 in space.")
    root.add_argument("--version", action="version", version=f"odvae {__version__}")
    commands = root.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[Arguments], None], text: str, parent: Any = None) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = (parent or commands).add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = command("render", render, "write captioned clips of moving shapes: data for a first run and for tests")
    sub.add_argument("folder", type=output_path)
    sub.add_argument("--world", choices=("flat", "solids"), default="flat",
                     help="flat shapes over a texture, or lit solids before a moving camera (default: flat)")
    sub.add_argument("--count", type=int, default=64, help="clips")
    sub.add_argument("--frames", type=int, nargs="+", default=[33], metavar="N",
                     help="frames per clip, at 8 fps; two numbers: at least and at most (default: 33)")
    sub.add_argument("--size", type=int, help="height and width in pixels (default: 64, of solids 96)")
    sub.add_argument("--seed", type=int, default=0, help="different seeds share no clip")
    sub.add_argument("--workers", type=int, default=1, help="processes that render (default: 1)")

    sub = command("train", train, "train an OD-VAE on a folder of videos; run the same command to resume")
    add_config_arguments(sub)
    add_dry_run_options(sub)

    sub = command("distill", distill, "train a small, fast decoder for the latents of a video VAE; run the same "
                                      "command to resume")
    sub.add_argument("vae", metavar="VAE", help="a folder or hub name: ours, or a video VAE of diffusers")
    sub.add_argument("out", type=output_path, metavar="OUT", help="the run's folder; the decoder is in OUT/decoder")
    add_config_arguments(sub)

    command("configs", configs, "list the shipped configs, each with its command")

    sub = command("reconstruct", reconstruct, "encode and decode videos, write them side by side, print PSNR and SSIM")
    sub.add_argument("videos", type=Path, help="a folder, or one file")
    sub.add_argument("--vae", type=Path, default=NATURAL_VAE, help="(default: the shipped one for natural footage)")
    add_precision(sub)
    add_compile(sub)
    sub.add_argument("--out", type=output_path, default=Path("outputs/reconstruct"))
    sub.add_argument("--frames", type=int, help="frames per video, 1 + 4k (default: as many as it has)")
    sub.add_argument("--frame-rate", type=float, help="frames per second (default: the file's own)")
    sub.add_argument("--size", type=int, nargs=2, metavar=("H", "W"),
                     help="resize and crop (default: the largest multiples of 8 that fit)")
    sub.add_argument("--limit", type=int, help="stop after this many videos")

    sub = command("evaluate", evaluate, "compare autoencoders, ours and diffusers', on the same clips")
    sub.add_argument("videos", type=Path, help="a folder, or one file")
    sub.add_argument("--model", action="append", metavar="[LABEL=]FOLDER", required=True,
                     help="a folder or hub name; repeat for each model")
    sub.add_argument("--out", type=output_path, default=Path("outputs/evaluate"))
    sub.add_argument("--frames", type=int, default=33, help="frames per video; shorter ones are set aside")
    sub.add_argument("--frame-rate", type=float, help="frames per second (default: the file's own)")
    sub.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="resize and crop (default: the file's own)")
    sub.add_argument("--limit", type=int, help="stop after this many videos")
    add_precision(sub)
    sub.add_argument("--lpips", type=Path, metavar="WEIGHTS", help="file or folder with LPIPS's trunk and heads")
    sub.add_argument("--rfvd", type=Path, metavar="WEIGHTS", help="file with I3D's weights (RGB, Kinetics-400)")

    sub = command("encode", encode, "encode videos of any length into latent files")
    sub.add_argument("source", type=Path, help="a video, or a folder of videos")
    sub.add_argument("target", type=output_path, help="a .safetensors file, or a folder")
    sub.add_argument("--vae", type=Path, default=NATURAL_VAE, help="(default: the shipped one for natural footage)")
    sub.add_argument("--store-dtype", choices=["float16", "bfloat16", "float32"], default="float16",
                     help="of the latents in the file (default: %(default)s)")
    add_precision(sub)
    add_compile(sub)
    add_memory_arguments(sub)

    sub = command("decode", decode, "decode latent files of `odvae encode` into videos")
    sub.add_argument("source", type=Path, help="a .safetensors file, or a folder of them")
    sub.add_argument("target", type=output_path, help="a video to write (.mp4, .mov, .mkv), or a folder")
    sub.add_argument("--vae", type=Path, help="the VAE that encoded the latents (default: the shipped one that did)")
    add_precision(sub)
    add_compile(sub)
    add_memory_arguments(sub)

    sub = command("inflate", inflate, "inflate an image VAE to a video VAE")
    sub.add_argument("image_vae", help="folder or hub name of a diffusers AutoencoderKL")
    sub.add_argument("out", type=output_path)
    sub.add_argument("--variant", type=int, default=4, help="1 to 4, or 0: the image VAE itself on each frame")
    sub.add_argument("--init", choices=["tail", "average", "center", "random"], default="tail")

    sub = command("import", import_, "import a VAE of the public code (Open-Sora-Plan v1.1, v1.2)")
    sub.add_argument("source", type=Path, help="a folder with config.json and .safetensors or .ckpt")
    sub.add_argument("out", type=output_path)

    sub = command("export", export, "export a VAE to the layout of the public code, if it supports it")
    sub.add_argument("vae", type=Path)
    sub.add_argument("out", type=output_path)

    sub = command("consolidate", consolidate, "write a training checkpoint of shards as one of whole tensors")
    sub.add_argument("checkpoint", type=Path, help="such as RUN/checkpoints/step-00000200, of odvae or lvdm train")
    sub.add_argument("out", type=output_path, help="a new folder for model.safetensors, ema.safetensors and the "
                                                   "optimizers' states, from which a training can resume too")

    cache = commands.add_parser("cache", help="the latent cache").add_subparsers(dest="action", required=True)
    add_cache_commands(lambda name, run, text: command(name, run, text, cache))
    return root


def render(args: Arguments) -> None:
    from .data.synthetic import write_rendered

    if len(args.frames) > 2:
        raise UserError(f"--frames takes one number, or the least and the most, got {len(args.frames)}")
    least, most = args.frames[0], args.frames[-1]
    paths = write_rendered(args.folder, args.count, frames=(least, most), size=args.size, seed=args.seed,
                           world=args.world, workers=args.workers)
    length = least if least == most else f"{least} to {most}"
    print_result(f"{len(paths)} clips of {length} frames, with captions, are in {args.folder}")


def train(args: Arguments) -> None:
    path, overrides = split_config(args.config)  # report mistakes before the slow imports
    from .training.train import TrainConfig, train
    from .utils.config import load_config

    config = load_config(TrainConfig, path, overrides)
    if args.dry_run:
        from .training.dry_run import plan_training

        for line in plan_training(config, processes=args.processes, flops=args.flops, samples=args.samples).lines():
            print_result(line)
        return
    print_result(f"the VAE is in {train(config, args.change_schedule)}")


def distill(args: Arguments) -> None:
    path, overrides = split_config(args.config)
    from .training.distill import DistillConfig, distill
    from .utils.config import load_config

    config = load_config(DistillConfig, path, [*overrides, f"vae={args.vae}", f"output={args.out}"])
    print_result(f"the decoder is in {distill(config, args.change_schedule)}")


def configs(args: Arguments) -> None:
    from .utils.config import shipped_configs

    for package, program in (("odvae", "odvae train"), ("lvdm", "lvdm train"), ("app", "lvdm-app --config")):
        for path in shipped_configs(package):
            description = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            command = "odvae distill VAE OUT" if path.name.startswith("distill") else program
            print_result(f"{f'{command} {path.name}':<42}{description}")


def reconstruct(args: Arguments) -> None:
    from .inference.reconstruct import reconstruct_files

    size = tuple(args.size) if args.size else None
    report = reconstruct_files(args.videos, args.vae, args.out, frames=args.frames, frame_rate=args.frame_rate,
                               size=size, limit=args.limit, precision=args.dtype, compiled=args.compile)
    for line in report.lines():
        print_result(line)


def evaluate(args: Arguments) -> None:
    from .evaluate import evaluate

    size = tuple(args.size) if args.size else None
    report = evaluate(args.videos, args.model, args.out, frames=args.frames, frame_rate=args.frame_rate, size=size,
                      limit=args.limit, precision=args.dtype, lpips=args.lpips, rfvd=args.rfvd)
    for line in report.lines():
        print_result(line)


def encode(args: Arguments) -> None:
    from .inference.codec import encode_files

    report = encode_files(args.source, args.target, args.vae, dtype=args.store_dtype, precision=args.dtype,
                          memory=memory_choice(args), compiled=args.compile)
    for line in report.lines():
        print_result(line)


def decode(args: Arguments) -> None:
    from .inference.codec import decode_files

    report = decode_files(args.source, args.target, args.vae, precision=args.dtype, memory=memory_choice(args),
                          compiled=args.compile)
    for line in report.lines():
        print_result(line)


def inflate(args: Arguments) -> None:
    from diffusers import AutoencoderKL

    from .convert.inflate import inflate
    from .utils.files import atomic_folder

    try:
        image_vae = AutoencoderKL.from_pretrained(args.image_vae, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load an image VAE from {args.image_vae}: {error}") from error
    with atomic_folder(args.out) as folder:
        inflate(image_vae, args.variant, args.init).save_pretrained(folder)
    print_result(f"variant {args.variant} with {args.init} initialization is in {args.out}")


def import_(args: Arguments) -> None:
    from .convert.open_sora_plan import import_checkpoint
    from .utils.files import atomic_folder

    vae = import_checkpoint(args.source)
    with atomic_folder(args.out) as folder:
        vae.save_pretrained(folder)
    print_result(f"{vae.num_parameters() / 1e6:.2f} M parameters, variant {vae.config.variant}, time sampling "
                 f"{vae.config.time_sampling}, in {args.out}")


def export(args: Arguments) -> None:
    from .convert.open_sora_plan import export_checkpoint
    from .inference.loading import load_vae
    from .model import AutoencoderKLODVAE

    vae = load_vae(args.vae)
    if not isinstance(vae, AutoencoderKLODVAE):
        raise UserError(f"{args.vae} holds an image VAE, but the public code's layout is for video VAEs")
    export_checkpoint(vae, args.out)
    print_result(f"the checkpoint in the public code's layout is in {args.out}")


def consolidate(args: Arguments) -> None:
    from .trainer.checkpoints import consolidate

    print_result(f"the checkpoint of whole tensors is in {consolidate(args.checkpoint, args.out)}")


@cli_main
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    setup_logging()
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
