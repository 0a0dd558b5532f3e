"""odvae render | train | configs | reconstruct | evaluate | encode | decode | inflate | import | export | cache."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .cache.cli import add_cache_commands
from .utils.errors import UserError, cli_main, output_path
from .utils.progress import print_result, setup_logging
from .weights import DEMO_VAE

Arguments = argparse.Namespace


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="odvae", description="OD-VAE: compress videos 4x in time and 8x8 in space.")
    root.add_argument("--version", action="version", version=f"odvae {__version__}")
    commands = root.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[Arguments], None], text: str, parent: Any = None) -> argparse.ArgumentParser:
        one: argparse.ArgumentParser = (parent or commands).add_parser(name, help=text, description=text)
        one.set_defaults(run=run)
        return one

    one = command("render", render, "write captioned clips of moving shapes: data for a first run and for tests")
    one.add_argument("folder", type=output_path)
    one.add_argument("--count", type=int, default=64, help="clips")
    one.add_argument("--frames", type=int, default=33, help="frames a clip, at 8 fps")
    one.add_argument("--size", type=int, default=64, help="pixels a side")
    one.add_argument("--seed", type=int, default=0, help="another seed shares no clip")

    one = command("train", train, "train an OD-VAE on a folder of videos; the same command goes on where it stopped")
    add_config_arguments(one)

    command("configs", configs, "list the configs that ship, each with the command that takes it")

    one = command("reconstruct", reconstruct, "encode and decode videos, write them side by side, print PSNR and SSIM")
    one.add_argument("videos", type=Path, help="a folder, or one file")
    one.add_argument("--vae", type=Path, default=DEMO_VAE)
    one.add_argument("--out", type=output_path, default=Path("outputs/reconstruct"))
    one.add_argument("--frames", type=int, help="frames of each, 1 + 4k (default: the longest that each one has)")
    one.add_argument("--frame-rate", type=float, help="frames a second (default: the file's own)")
    one.add_argument("--size", type=int, nargs=2, metavar=("H", "W"),
                     help="resize and crop (default: the largest multiples of 8 that fit)")
    one.add_argument("--limit", type=int, help="stop after this many videos")

    one = command("evaluate", evaluate, "compare autoencoders, ours and diffusers', on the same clips in one table")
    one.add_argument("videos", type=Path, help="a folder, or one file")
    one.add_argument("--model", action="append", metavar="[LABEL=]FOLDER", required=True,
                     help="a folder or hub name; once for each model")
    one.add_argument("--out", type=output_path, default=Path("outputs/evaluate"))
    one.add_argument("--frames", type=int, default=33, help="of each video; shorter ones are set aside")
    one.add_argument("--frame-rate", type=float, help="frames a second (default: the file's own)")
    one.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="resize and crop (default: the file's own)")
    one.add_argument("--limit", type=int, help="stop after this many videos")
    one.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float32", help="of the models")
    one.add_argument("--lpips", type=Path, metavar="WEIGHTS", help="file or folder with LPIPS's trunk and heads")
    one.add_argument("--rfvd", type=Path, metavar="WEIGHTS", help="file with I3D's weights (RGB, Kinetics-400)")

    one = command("encode", encode, "a video file, or a folder of them, into latents of any length")
    one.add_argument("source", type=Path, help="a video, or a folder: then all videos in it")
    one.add_argument("target", type=output_path, help="a .safetensors file, or a folder")
    one.add_argument("--vae", type=Path, default=DEMO_VAE)
    one.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    add_memory_arguments(one)

    one = command("decode", decode, "latents that `odvae encode` wrote, back into video")
    one.add_argument("source", type=Path, help="a .safetensors file, or a folder: then all of them in it")
    one.add_argument("target", type=output_path, help="a video to write (.mp4, .mov, .mkv), or a folder")
    one.add_argument("--vae", type=Path, default=DEMO_VAE, help="the one that encoded")
    add_memory_arguments(one)

    one = command("inflate", inflate, "an image VAE's weights into a video VAE")
    one.add_argument("image_vae", help="folder or hub name of a diffusers AutoencoderKL")
    one.add_argument("out", type=output_path)
    one.add_argument("--variant", type=int, default=4)
    one.add_argument("--init", choices=["tail", "average", "center", "random"], default="tail")

    one = command("import", import_, "the public code's VAE (Open-Sora-Plan v1.1, v1.2) into our format")
    one.add_argument("source", type=Path, help="a folder with config.json and .safetensors or .ckpt")
    one.add_argument("out", type=output_path)

    one = command("export", export, "a VAE of ours into the public code's layout, where it can be one")
    one.add_argument("vae", type=Path)
    one.add_argument("out", type=output_path)

    cache = commands.add_parser("cache", help="the latent cache").add_subparsers(dest="action", required=True)
    add_cache_commands(lambda name, run, text: command(name, run, text, cache))
    return root


def add_config_arguments(one: argparse.ArgumentParser) -> None:
    """[CONFIG] [key=value ...], as `split_config` takes them apart, and what resuming a run may change."""
    one.add_argument("config", nargs="*", metavar="CONFIG.yaml | key=value",
                     help="a YAML file with what differs from the defaults, then overrides such as loop.steps=100")
    one.add_argument("--change-schedule", action="store_true",
                     help="go on with a run whose loop.steps or learning rate is another now; without it that is "
                          "refused, as the schedule is part of what is learned")


def add_memory_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("--memory", default="auto", metavar="auto | SIZE",
                     help="to plan for: what is free (auto), or a size such as 2GiB or 500MiB; tiles are taken only "
                          "where whole frames do not fit, as they are not exact")
    one.add_argument("--frames-at-once", type=int, metavar="N", help="at most so many, a multiple of 4")
    one.add_argument("--tile", type=int, nargs=2, metavar=("H", "W"), help="take tiles of so many pixels")
    one.add_argument("--no-tiling", action="store_true", help="rather stop than take tiles")


def memory_choice(args: Arguments) -> Any:
    """The `MemoryOptions` that these arguments say."""
    from .inference.memory import MemoryOptions

    if args.tile and args.no_tiling:
        raise UserError("give --tile or --no-tiling, not both")
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(?:i?B)?", args.memory, re.IGNORECASE)
    if not found and args.memory != "auto":
        raise UserError(f"--memory {args.memory} is neither auto nor a size such as 2GiB or 500MiB")
    size = int(float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2].upper())))) if found else None
    return MemoryOptions(size, args.frames_at_once, tuple(args.tile) if args.tile else None, not args.no_tiling)


def split_config(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The YAML file (or None) and the overrides among positional arguments."""
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise UserError(f"expected one config file, got {', '.join(files)}; overrides are written key=value")
    return (Path(files[0]) if files else None), [a for a in arguments if "=" in a]


def render(args: Arguments) -> None:
    from .data.synthetic import write_rendered

    paths = write_rendered(args.folder, args.count, frames=args.frames, size=args.size, seed=args.seed)
    print_result(f"{len(paths)} clips of {args.frames} frames, each with its caption, in {args.folder}")


def train(args: Arguments) -> None:
    path, overrides = split_config(args.config)
    from .training.train import TrainConfig
    from .training.train import train as run
    from .utils.config import load_config

    path, overrides = split_config(args.config)
    print_result(f"the VAE is in {run(load_config(TrainConfig, path, overrides), args.change_schedule)}")


def configs(args: Arguments) -> None:
    from .utils.config import shipped_configs

    for package, program in (("odvae", "odvae train"), ("lvdm", "lvdm train"), ("app", "lvdm-app --config")):
        for path in shipped_configs(package):
            about = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            print_result(f"{f'{program} {path.name}':<34}{about}")


def reconstruct(args: Arguments) -> None:
    from .inference.reconstruct import reconstruct_files

    size = tuple(args.size) if args.size else None
    summary = reconstruct_files(args.videos, args.vae, args.out, frames=args.frames, frame_rate=args.frame_rate,
                                size=size, limit=args.limit)
    for line in summary.lines():
        print_result(line)


def evaluate(args: Arguments) -> None:
    from .evaluate import evaluate as run

    size = tuple(args.size) if args.size else None
    for line in run(args.videos, args.model, args.out, frames=args.frames, frame_rate=args.frame_rate, size=size,
                    limit=args.limit, dtype=args.dtype, lpips=args.lpips, rfvd=args.rfvd).lines():
        print_result(line)


def encode(args: Arguments) -> None:
    from .inference.codec import encode_files

    for line in encode_files(args.source, args.target, args.vae, dtype=args.dtype, memory=memory_choice(args)).lines():
        print_result(line)


def decode(args: Arguments) -> None:
    from .inference.codec import decode_files

    for line in decode_files(args.source, args.target, args.vae, memory=memory_choice(args)).lines():
        print_result(line)


def inflate(args: Arguments) -> None:
    from diffusers import AutoencoderKL

    from .convert.inflate import inflate as run

    try:
        image_vae = AutoencoderKL.from_pretrained(args.image_vae, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load an image VAE from {args.image_vae}: {error}") from error
    run(image_vae, args.variant, args.init).save_pretrained(args.out)
    print_result(f"variant {args.variant}, {args.init} initialised, in {args.out}")


def import_(args: Arguments) -> None:
    from .convert.open_sora_plan import import_checkpoint

    vae = import_checkpoint(args.source)
    vae.save_pretrained(args.out)
    print_result(
        f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters, variant {vae.config.variant}, time "
        f"sampling {vae.config.time_sampling}, in {args.out}"
    )


def export(args: Arguments) -> None:
    from .convert.open_sora_plan import export_checkpoint
    from .inference.loading import load_vae
    from .model import AutoencoderKLODVAE

    vae = load_vae(args.vae)
    if not isinstance(vae, AutoencoderKLODVAE):
        raise UserError(f"{args.vae} holds an image VAE; the public code's layout is for video VAEs")
    export_checkpoint(vae, args.out)
    print_result(f"the public code's layout, in {args.out}")


@cli_main
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    setup_logging()
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
