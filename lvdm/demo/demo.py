"""`make demo`: from video files to long generated videos, stage by stage, each by commands that a reader can repeat."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from odvae.cache.reader import LatentCache
from odvae.cli import print_result
from odvae.data.files import list_videos
from odvae.utils.errors import UserError
from odvae.utils.files import read_json
from odvae.utils.plots import contact_sheet, curves
from odvae.weights import DEMO_IMAGE_VAE, DEMO_VAE, NATURAL_IMAGE_VAE, NATURAL_VAE

from ..evaluation.evaluate import prompt_accuracy
from ..sampling.loading import load_lvdm_pipeline
from .report import write_report
from .session import DemoSession, empty_folder, read_metrics

CLIPS, CLIP_FRAMES, HELD_OUT = 64, 33, 12  # rendered clips
PROMPTS = (
    "a red circle moving right over a striped background",
    "a cyan triangle moving down-left over a cloudy background",
    "a yellow square moving up over a checkered background",
)
LONG = 81  # frames of a long video
ACCURACIES = {"prompt_accuracy": (48, 17), "prompt_accuracy_long": (24, 81)}  # prompts and frames
MIN_PROMPT_SHARE = 1 / 4  # of those prompts, however slow the machine is
FINETUNING_FRAMES = 9  # of the OD-VAE on the user's own videos
# Steps of the live trainings, on a machine that is fast enough: see `DemoSession.fit_steps`.
FINETUNING_STEPS, INFLATION_STEPS, TRAINING_STEPS = 300, 120, 600
# Shares of the time that remains when it is their turn; LVDM's training, the last, takes all.
FINETUNING_SHARE, INFLATION_SHARE = 0.35, 0.45
OTHER_SECONDS = 60.0  # for reconstructing and caching, which follow fine-tuning
GENERATION_SHARE = 0.4  # of all minutes, for stages 5 and 6: on a slow machine with fewer prompts
MINUTES = 9.0  # one less than promised: other programs run, and machines grow hot

VAE_SETTINGS = ("loss.l1=0.5", "loss.l2=2", "loop.micro_batch_size=2", "loop.optimizer.name=muon",
                "loop.optimizer.learning_rate=1e-3", "loop.optimizer.warmup=10")


def run_demo(programs: Mapping[str, Callable[[list[str]], int]], out: Path, videos: Path | None = None,
             minutes: float = MINUTES) -> dict[str, Any]:
    """Run the whole demo; return what it writes to `out`/report.json.

    Args:
        programs: the commands `odvae` and `lvdm`; each takes its arguments and returns the exit status.
        videos: a folder of the user's own videos; None: rendered clips.
        minutes: for the whole demo: its live trainings take the steps that fit.

    A second run keeps the rendered clips and repeats everything else.
    """
    if not 0 < minutes < math.inf:
        raise UserError(f"--minutes must be above 0 and finite, got {minutes:g}")
    if videos is not None:
        list_videos(videos)  # refuse an empty folder before anything is written
    demo = DemoSession(out, programs, minutes, videos)
    out.mkdir(parents=True, exist_ok=True)
    source = collect_videos(demo)
    measure_generation(demo)
    held_out = HELD_OUT if videos is None else max(1, min(HELD_OUT, len(list_videos(videos)) // 4))
    vae = DEMO_VAE if videos is None else finetune_vae(demo, source, held_out)
    reconstruct(demo, source, vae, held_out)
    cache = build_cache(demo, source, vae)
    compare_inflations(demo, source, min(8, held_out))
    train_lvdm(demo, vae)
    generate_long_videos(demo, cache)
    measure_prompt_accuracy(demo)
    return write_report(demo)


def collect_videos(demo: DemoSession) -> Path:
    """Stage 1: render captioned clips, or count the user's videos; return their folder."""
    with demo.stage("render", "1. Video files" if demo.videos else "1. Render captioned clips"):
        if demo.videos is not None:
            print_result(f"{len(list_videos(demo.videos))} files in {demo.videos}")
            return demo.videos
        demo.command("odvae", "render", demo.out / "clips", "--count", CLIPS, "--frames", CLIP_FRAMES)
        demo.command("odvae", "render", demo.out / "held-out", "--count", HELD_OUT, "--frames", CLIP_FRAMES, "--seed",
                     99)
        return demo.out / "clips"


def measure_generation(demo: DemoSession) -> None:
    """Stage 1b: reserve time for stages 5 and 6, after a trial of the shipped LVDM, as the groups of a video take the
    same time each; and choose the share of the prompts of stage 6 that fits."""
    with demo.stage("measure", "1b. Measure the time of generation"):
        pipeline, count, frames = load_lvdm_pipeline(None), 4, 9
        pipeline.set_progress_bar_config(disable=True)

        def groups(length: int) -> int:
            return len(pipeline.group_layout(pipeline.vae.latent_frames(length)))

        began = time.monotonic()
        pipeline([PROMPTS[0]] * count, num_frames=frames, output_type="uint8")
        group_seconds = (time.monotonic() - began) / (count * groups(frames))
        long_seconds = group_seconds * len(PROMPTS) * groups(LONG)
        accuracy_seconds = group_seconds * sum(prompts * groups(length) for prompts, length in ACCURACIES.values())
        available = 60 * demo.minutes * GENERATION_SHARE - long_seconds
        demo.prompt_share = min(1.0, max(MIN_PROMPT_SHARE, available / accuracy_seconds))
        demo.generation_seconds = long_seconds + demo.prompt_share * accuracy_seconds
        print_result(f"{demo.generation_seconds:.0f} s are reserved for stages 5 and 6, with {demo.prompt_share:.0%} "
                     f"of the prompts of stage 6; the trainings share the rest of {demo.minutes:g} minutes")


def finetune_vae(demo: DemoSession, source: Path, held_out: int) -> Path:
    """Stage 1c: fine-tune the OD-VAE for natural footage on the user's videos; return its folder."""
    with demo.stage("finetune", "1c. Fine-tune the OD-VAE on your videos, live"):
        folder = empty_folder(demo.out / "vae-finetuned")
        settings = [f"data.folder={source}", f"data.frames={FINETUNING_FRAMES}", f"data.held_out={held_out}",
                    f"model.init_from={NATURAL_VAE}", "loop.ema_decay=0.98", *VAE_SETTINGS]
        seconds = FINETUNING_SHARE * (demo.training_seconds - OTHER_SECONDS)
        steps = demo.fit_steps("finetune", seconds, "odvae", settings, evaluations=4, most=FINETUNING_STEPS)
        demo.command("odvae", "train", f"output={folder}", *settings, f"loop.steps={steps}",
                     f"loop.evaluate_every={-(-steps // 3)}")
        return folder / "vae"


def reconstruct(demo: DemoSession, source: Path, vae: Path, held_out: int) -> None:
    """Stage 2: PSNR and SSIM of held-out videos."""
    with demo.stage("reconstruct", "2. Reconstruct held-out videos with the OD-VAE"):
        folder, frames = (demo.out / "held-out", CLIP_FRAMES) if demo.videos is None else (source, FINETUNING_FRAMES)
        demo.command("odvae", "reconstruct", folder, "--vae", vae, "--out", demo.out / "reconstruct",
                     "--frames", frames, "--frame-rate", 8, "--size", 64, 64, "--limit", held_out)
        figures = read_json(demo.out / "reconstruct" / "report.json")
        demo.figures |= {"psnr_heldout": figures["psnr"], "ssim_heldout": figures["ssim"]}


def build_cache(demo: DemoSession, source: Path, vae: Path) -> LatentCache:
    """Stage 3."""
    with demo.stage("cache", "3. Build the latent cache"):
        folder = empty_folder(demo.out / "cache")
        demo.command("odvae", "cache", "build", source, folder, "--vae", vae, "--frames",
                     CLIP_FRAMES if demo.videos is None else 17)
        cache = LatentCache(folder)
        (height, width), frames = cache.header.transform.sizes[0], sum(cache.column("frames").to_pylist())
        demo.figures |= {
            "cache_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            "video_bytes_raw": frames * height * width * 3,
            "train_frames": frames,
        }
        return cache


def compare_inflations(demo: DemoSession, source: Path, held_out: int) -> None:
    """Stage 4a: two short trainings of the same image VAE, inflated in two ways, on the same batches."""
    with demo.stage("inflate", "4a. Compare tail and average initialization, live"):
        image_vae = DEMO_IMAGE_VAE if demo.videos is None else NATURAL_IMAGE_VAE
        settings = [f"data.folder={source}", "data.frames=9", f"data.held_out={held_out}",
                    f"model.init_from={image_vae}", "loop.ema_decay=0.9", *VAE_SETTINGS]
        steps = demo.fit_steps("inflate", INFLATION_SHARE * demo.training_seconds, "odvae", settings, evaluations=7,
                               runs=2, most=INFLATION_STEPS)
        series = {}
        for init in ("tail", "average"):
            folder = empty_folder(demo.out / f"inflate-{init}")
            demo.command("odvae", "train", f"output={folder}", *settings, f"model.init={init}", f"loop.steps={steps}",
                         f"loop.evaluate_every={-(-steps // 6)}")
            points = [(line["step"], line["psnr_heldout"]) for line in read_metrics(folder) if "psnr_heldout" in line]
            series[init] = ([step for step, _ in points], [value for _, value in points])
            demo.figures[f"psnr_{init}_inflated"] = points[-1][1]
        curves(series, demo.out / "tail-against-average.png", "held-out PSNR after inflation", "step", "dB")


def train_lvdm(demo: DemoSession, vae: Path) -> None:
    """Stage 4b: train an LVDM from scratch, of a size whose first samples come within minutes."""
    with demo.stage("train", "4b. Train a small LVDM from scratch, live"):
        settings = [f"windows.cache={demo.out / 'cache'}", f"vae={vae}", "windows.held_out=8", "model.hidden_size=128",
                    "model.num_layers=6", "model.num_attention_heads=4", "loop.micro_batch_size=16",
                    "loop.ema_decay=0.99", "loop.optimizer.name=muon", "loop.optimizer.learning_rate=2e-3"]
        steps = demo.fit_steps("train", demo.training_seconds, "lvdm", settings, evaluations=3, most=TRAINING_STEPS)
        folder = empty_folder(demo.out / "lvdm-live")
        demo.command("lvdm", "train", f"output={folder}", *settings, f"loop.steps={steps}",
                     f"loop.evaluate_every={-(-steps // 2)}")
        losses = [line["loss"] for line in read_metrics(folder) if "loss" in line]
        demo.figures |= {"loss_first": losses[0], "loss_last": losses[-1]}


def generate_long_videos(demo: DemoSession, cache: LatentCache) -> None:
    """Stage 5: the shipped LVDM knows rendered clips; of the user's videos only the one trained live knows anything."""
    shipped = demo.videos is None
    model = "shipped LVDM" if shipped else "LVDM trained live"
    with demo.stage("generate", f"5. Generate ten-second videos with the {model}, written while they are sampled"):
        folder = empty_folder(demo.out / "pipeline")  # `make app` uses it
        load_lvdm_pipeline(None if shipped else demo.out / "lvdm-live" / "pipeline").save_pretrained(folder)
        prompts = list(PROMPTS) if shipped else sorted(set(cache.captions))[:3]
        demo.command("lvdm", "generate", *prompts, "--pipeline", folder, "--num-frames", LONG,
                     "--out", empty_folder(demo.out / "long"), "--scale", 4, "--seed", 7)
        demo.figures["generated_frames"] = LONG * len(prompts)


def measure_prompt_accuracy(demo: DemoSession) -> None:
    """Stage 6: does the shipped LVDM follow its prompts, in short and in long videos?"""
    with demo.stage("evaluate", "6. Measure the prompt accuracy of the shipped LVDM"):
        pipeline = load_lvdm_pipeline(None)
        for key, (all_prompts, frames) in ACCURACIES.items():
            count = round(all_prompts * demo.prompt_share)
            result = prompt_accuracy(pipeline, count, frames)
            demo.commands.append(f"lvdm evaluate --prompts {count} --frames {frames}")
            demo.figures |= {key: result.both, f"{key}_prompts": count, f"{key}_colour": result.colour,
                             f"{key}_direction": result.direction, f"{key}_background": result.background,
                             f"{key}_contrast": result.contrast_kept}
            labels = [f"{'correct' if right else 'WRONG  '}  {prompt}"
                      for right, prompt in zip(result.right, result.prompts, strict=True)]
            contact_sheet(list(result.videos), demo.out / f"{key}.png", labels)
            print_result(f"{count} prompts, {frames} frames: colour and direction correct in {result.both:.0%}")
