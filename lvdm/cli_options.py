"""The options of the commands that have many."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from odvae.cli_options import add_precision
from odvae.utils.errors import output_path

from .defaults import GUIDANCE_SCALE
from .generation.arguments import NO_OPTION

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


HISTORY_OPTIONS = {"history_noise": float, "history_follow": float, "sink_period": int}  # of `evaluate`


class Command(argparse.ArgumentParser):
    """A command. `add_options` is called when the command is parsed, for options whose definition is slow to import."""

    add_options: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        if self.add_options is not None:
            self.add_options(self)
            self.add_options = None
        return super().parse_known_args(*args, **kwargs)


def add_generation_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompts", nargs="*", metavar="PROMPT", help="for a class-conditional model, a class name")
    command.add_argument("--prompts", type=Path, dest="prompt_file", metavar="FILE",
                         help="one prompt per line, or in a .jsonl an object per line: prompt, and optionally seed, "
                              "num_frames, negative_prompt, sections ([[second, prompt], ...]) ...")
    command.add_argument("--pipeline", type=Path, help="a pipeline's folder, ours or a text-to-video one of diffusers "
                                                       "(default: the shipped one)")
    command.add_argument("--decoder", type=Path, metavar="FOLDER",
                         help="decode by this decoder of `odvae distill` instead of the pipeline's VAE: faster, nearly "
                              "as good")
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
                         help="torch.compile the blocks of the transformer and of an OD-VAE: takes minutes, then "
                              "faster")
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


def add_evaluation_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--pipeline", action="append", metavar="[LABEL=]FOLDER",
                         help="repeat for each; \"shipped\" is the shipped one (default: it alone)")
    command.add_argument("--out", type=output_path, default=Path("outputs/evaluate-lvdm"),
                         help="a folder (default: %(default)s)")
    command.add_argument("--frames", "--lengths", type=int, nargs="+", default=[17, 129], metavar="N",
                         help="lengths, 1 + 4k, all measured on videos of the longest; the shortest is the training "
                              "length (default: 17 129)")
    command.add_argument("--world", choices=("flat", "solids"), default="flat",
                         help="the rendered scenes that the pipelines were trained on (default: flat)")
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
    command.add_argument("--fvd-frames", type=int, metavar="N",
                         help="frames of each video in the Frechet distance, from its start (default: all of the "
                              "shortest length)")
    command.add_argument("--given", type=int, metavar="N",
                         help="prediction: continue the first N frames, 1 + 4k, of each --reference video (default: "
                              "continue nothing)")
    command.add_argument("--batch", type=int, default=24,
                         help="videos generated together, at most (default: %(default)s)")
    command.add_argument("--steps", type=int, nargs="+", metavar="N",
                         help="sampling steps for each group of latents; several: each pipeline with each of them "
                              "(default: the pipeline's)")
    command.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    for name, kind in HISTORY_OPTIONS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help="as of `generate`")
    command.add_argument("--seed", type=int, default=1000, help="of the first video; the next has the next")
    add_precision(command)
    command.add_argument("--keep-videos", action="store_true", help="write the videos longer than the shortest")
