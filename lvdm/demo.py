"""`make demo`: from video files to long generated videos, step by step, each by a command that a reader can repeat."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from odvae.cache.reader import LatentCache
from odvae.cli import print_result
from odvae.data.files import list_videos
from odvae.utils.errors import UserError
from odvae.utils.files import read_json, write_json, write_text
from odvae.utils.format import format_bytes
from odvae.utils.plots import contact_sheet, curves
from odvae.weights import DEMO_IMAGE_VAE, DEMO_VAE, NATURAL_IMAGE_VAE, NATURAL_VAE

from .evaluation.evaluate import PromptAccuracy, prompt_accuracy
from .sampling.loading import load_pipeline
from .training.budget import StepBudget, steps_that_fit
from .weights import DEMO_TRANSFORMER

logger = logging.getLogger("odvae")

CLIPS, HELD_OUT = 64, 12
PROMPTS = (
    "a red circle moving right over a striped background",
    "a cyan triangle moving down-left over a cloudy background",
    "a yellow square moving up over a checkered background",
)
LONG, PROMPTED, PROMPTED_LONG = 81, (48, 17), (24, 81)  # frames of a long video; prompts and frames of the accuracies
LEAST_PROMPTED = 1 / 4  # of those prompts, however slow the machine is
FINETUNING_FRAMES = 9  # of the OD-VAE on somebody's own videos
# Steps of the live trainings, on a machine that is fast enough: see `budget`.
FINETUNING_STEPS, INFLATION_STEPS, TRAINING_STEPS = 300, 120, 600
# Shares of the time that is left for them, when it is their turn; LVDM's training, the last, takes all.
FINETUNING_SHARE, INFLATION_SHARE = 0.35, 0.45
OTHER_STEPS = 60.0  # seconds for reconstructing and caching, where fine-tuning comes before them
GENERATION_SHARE = 0.4  # of all minutes, for steps 5 and 6: on a slow machine by fewer prompts
MINUTES = 9.0  # one less than is promised: other programs run, and machines grow hot


VAE_SETTINGS = ("loss.l1=0.5", "loss.l2=2", "loop.micro_batch_size=2", "loop.optimizer.name=muon",
                "loop.optimizer.learning_rate=1e-3", "loop.optimizer.warmup=10")


@dataclass
class Demo:
    """What has been done so far; becomes report.json."""

    out: Path
    programs: dict[str, Callable[[list[str]], int]]  # the command lines, by name
    minutes: float  # that all of it may take
    began: float = field(default_factory=time.monotonic)
    reserve: float = 0.0  # seconds that are kept for the generation at the end
    prompted: float = 1.0  # share of the prompts of step 6 that fit
    budgets: dict[str, StepBudget] = field(default_factory=dict)  # of the live trainings
    commands: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        print_result(f"\n== {title}")
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        print_result(f"   {self.seconds[name]:.0f} s")

    @property
    def left(self) -> float:
        """Seconds for trainings from now on."""
        return 60 * self.minutes - (time.monotonic() - self.began) - self.reserve

    def budget(self, name: str, seconds: float, program: str, arguments: Sequence[str], **options: int) -> int:
        """The steps of the training by `arguments` that fit `seconds`, see `steps_that_fit`."""
        def trial(steps: int) -> Path:
            folder = _afresh(self.out / "trial")
            self.command(program, "train", f"output={folder}", *arguments, f"loop.steps={steps}", "loop.log_every=1",
                         f"loop.evaluate_every={steps}", noted=False)
            return folder

        print_result("a few steps, to see how many fit:")
        self.budgets[name] = steps_that_fit(seconds, trial, **options)
        _afresh(self.out / "trial")
        print_result(f"   {self.budgets[name]}")
        return self.budgets[name].steps

    def command(self, program: str, *arguments: object, noted: bool = True) -> None:
        """Run `odvae ...` or `lvdm ...` in this process, and note it as one would type it."""
        words = [str(a) for a in arguments]
        shown = " ".join([program, *(json.dumps(w) if " " in w else w for w in words)])
        if noted:
            self.commands.append(shown)
        print_result(f"$ {shown}")
        status = self.programs[program](words)
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise UserError(f"the demo stopped at: {shown}")


def run(programs: dict[str, Callable[[list[str]], int]], out: Path, videos: Path | None = None,
        minutes: float = MINUTES) -> dict[str, Any]:
    """The whole demo; returns what it writes to `out`/report.json.

    Args:
        programs: the commands `odvae` and `lvdm`; each takes its arguments and returns the exit status.
        videos: a folder of one's own videos; None: rendered clips.
        minutes: that the whole of it may take: its live trainings take the steps that fit.

    A second run keeps the rendered clips and makes everything else again.
    """
    if not 0 < minutes < math.inf:
        raise UserError(f"--minutes must be above 0, and {minutes:g} was given")
    demo = Demo(out, programs, minutes)
    out.mkdir(parents=True, exist_ok=True)
    source, frames = (out / "clips", 33) if videos is None else (videos, 17)
    if videos is not None:
        list_videos(videos)  # an empty folder is refused before anything is made

    with demo.step("render", "1. Video files" if videos else "1. Rendering captioned clips"):
        if videos is None:
            demo.command("odvae", "render", source, "--count", CLIPS, "--frames", 33)
            demo.command("odvae", "render", out / "held-out", "--count", HELD_OUT, "--frames", 33, "--seed", 99)
        else:
            print_result(f"{len(list_videos(videos))} files in {videos}")

    with demo.step("measure", "1b. Measuring what generation takes here"):
        demo.reserve, demo.prompted = _generation_budget(60 * minutes * GENERATION_SHARE)
        print_result(
            f"{demo.reserve:.0f} s are kept for steps 5 and 6, with {demo.prompted:.0%} of the prompts of step 6; the "
            f"trainings take the steps that fit the rest of {minutes:g} minutes"
        )

    vae, kept = DEMO_VAE, HELD_OUT
    if videos is not None:  # from the VAE that has seen natural footage
        with demo.step("finetune", "1c. Fine-tuning the OD-VAE on your videos, live"):
            kept = max(1, min(HELD_OUT, len(list_videos(videos)) // 4))
            vae = _finetuned(demo, source, kept)

    with demo.step("reconstruct", "2. Reconstructing held-out videos with the OD-VAE"):
        held_out = out / "held-out" if videos is None else source
        demo.command("odvae", "reconstruct", held_out, "--vae", vae, "--out", out / "reconstruct",
                     "--frames", 33 if videos is None else FINETUNING_FRAMES, "--frame-rate", 8, "--size", 64, 64,
                     "--limit", kept)
        figures = read_json(out / "reconstruct" / "report.json")
        demo.figures |= {"psnr_heldout": figures["psnr"], "ssim_heldout": figures["ssim"]}

    with demo.step("cache", "3. Building the latent cache"):
        folder = _afresh(out / "cache")
        demo.command("odvae", "cache", "build", source, folder, "--vae", vae, "--frames", frames)
        cache = LatentCache(folder)
        (height, width), cached = cache.header.transform.sizes[0], sum(cache.column("frames").to_pylist())
        demo.figures |= {
            "cache_bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
            "video_bytes_raw": cached * height * width * 3,
            "train_frames": cached,
        }

    with demo.step("inflate", "4a. Tail against average initialization, live"):
        _inflation(demo, source, DEMO_IMAGE_VAE if videos is None else NATURAL_IMAGE_VAE, min(8, kept))

    with demo.step("train", "4b. Training a small LVDM from scratch, live"):
        _live_training(demo, vae)

    # Rendered clips are what the shipped LVDM knows; of somebody's own videos only the one trained live knows anything.
    whose = "that ships" if videos is None else "trained live"
    with demo.step("generate", f"5. Ten-second videos by the LVDM {whose}, written while they are sampled"):
        _afresh(out / "pipeline")
        pipeline = load_pipeline(None if videos is None else out / "lvdm-live" / "pipeline")
        pipeline.save_pretrained(out / "pipeline")  # what `make app` takes
        prompts = list(PROMPTS) if videos is None else sorted(set(cache.captions))[:3]
        demo.command("lvdm", "generate", *prompts, "--pipeline", out / "pipeline", "--frames", LONG,
                     "--out", _afresh(out / "long"), "--scale", 4, "--seed", 7)
        demo.figures["generated_frames"] = LONG * len(prompts)

    with demo.step("evaluate", "6. Does the LVDM that ships make what the prompt asks for?"):
        pipeline = load_pipeline(None)
        for key, all_of, frames in (("prompt_accuracy", *PROMPTED), ("prompt_accuracy_long", *PROMPTED_LONG)):
            count = round(all_of * demo.prompted)
            result = prompt_accuracy(pipeline, count, frames)
            demo.commands.append(f"lvdm evaluate --prompts {count} --frames {frames}")
            demo.figures |= {key: result.both, f"{key}_prompts": count, f"{key}_colour": result.colour,
                             f"{key}_direction": result.direction, f"{key}_background": result.background,
                             f"{key}_contrast": result.contrast_kept}
            _sheet(result, out / f"{key}.png")
            print_result(f"{count} prompts, {frames} frames: colour and direction found in {result.both:.0%}")

    return _report(demo, videos)


def _generation_budget(seconds: float) -> tuple[float, float]:
    """What steps 5 and 6 will take, and with what share of the prompts of step 6 they fit `seconds`: by a trial of the
    LVDM that ships, as a video's groups take the same time each."""
    pipeline, count, frames = load_pipeline(None), 4, 9
    pipeline.set_progress_bar_config(disable=True)

    def groups(length: int) -> int:
        return len(pipeline.group_layout(pipeline.vae.latent_frames(length)))

    began = time.monotonic()
    pipeline([PROMPTS[0]] * count, frames=frames)
    group = (time.monotonic() - began) / (count * groups(frames))
    long = group * len(PROMPTS) * groups(LONG)
    prompted = group * sum(number * groups(length) for number, length in (PROMPTED, PROMPTED_LONG))
    share = min(1.0, max(LEAST_PROMPTED, (seconds - long) / prompted))
    return long + share * prompted, share


def _finetuned(demo: Demo, source: Path, held_out: int) -> Path:
    folder = _afresh(demo.out / "vae-finetuned")
    settings = [f"data.folder={source}", f"data.frames={FINETUNING_FRAMES}", f"data.held_out={held_out}",
                f"model.init_from={NATURAL_VAE}", "loop.ema_decay=0.98", *VAE_SETTINGS]
    steps = demo.budget("finetune", FINETUNING_SHARE * (demo.left - OTHER_STEPS), "odvae", settings, evaluations=4,
                        most=FINETUNING_STEPS)
    demo.command("odvae", "train", f"output={folder}", *settings, f"loop.steps={steps}",
                 f"loop.evaluate_every={-(-steps // 3)}")
    return folder / "vae"


def _inflation(demo: Demo, source: Path, image_vae: Path, held_out: int) -> None:
    """Two short trainings of the same image VAE, inflated in two ways, on the same batches."""
    settings = [f"data.folder={source}", "data.frames=9", f"data.held_out={held_out}",
                f"model.init_from={image_vae}", "loop.ema_decay=0.9", *VAE_SETTINGS]
    steps = demo.budget("inflate", INFLATION_SHARE * demo.left, "odvae", settings, evaluations=7, runs=2,
                        most=INFLATION_STEPS)
    series = {}
    for init in ("tail", "average"):
        folder = _afresh(demo.out / f"inflate-{init}")
        demo.command("odvae", "train", f"output={folder}", *settings, f"model.init={init}", f"loop.steps={steps}",
                     f"loop.evaluate_every={-(-steps // 6)}")
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        points = [(line["step"], line["psnr_heldout"]) for line in log if "psnr_heldout" in line]
        series[init] = ([step for step, _ in points], [value for _, value in points])
        demo.figures[f"psnr_{init}_inflated"] = points[-1][1]
    curves(series, demo.out / "tail-against-average.png", "held-out PSNR after inflation", "step", "dB")


def _live_training(demo: Demo, vae: Path) -> None:
    """From scratch, at a size whose first pictures come within minutes; then its samples before and after."""
    settings = [f"windows.cache={demo.out / 'cache'}", f"vae={vae}", "windows.held_out=8", "model.hidden_size=128",
                "model.num_layers=6", "model.num_attention_heads=4", "loop.micro_batch_size=16", "loop.ema_decay=0.99",
                "loop.optimizer.name=muon", "loop.optimizer.learning_rate=2e-3"]
    steps = demo.budget("train", demo.left, "lvdm", settings, evaluations=3, most=TRAINING_STEPS)
    folder = _afresh(demo.out / "lvdm-live")
    demo.command("lvdm", "train", f"output={folder}", *settings, f"loop.steps={steps}",
                 f"loop.evaluate_every={-(-steps // 2)}")
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    demo.figures |= {"loss_first": losses[0], "loss_last": losses[-1]}


def _afresh(folder: Path) -> Path:
    """Trainings and the cache of an earlier demo would be gone on with, or refused where they differ."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _sheet(result: PromptAccuracy, path: Path) -> None:
    labels = [("found    " if ok else "MISSED  ") + text for ok, text in zip(result.right, result.prompts, strict=True)]
    contact_sheet(list(result.videos), path, labels)


def _report(demo: Demo, videos: Path | None) -> dict[str, Any]:
    odvae, image_vae = (DEMO_VAE, DEMO_IMAGE_VAE) if videos is None else (NATURAL_VAE, NATURAL_IMAGE_VAE)
    loaded = {"odvae": str(odvae), "image_vae": str(image_vae), "lvdm": str(DEMO_TRANSFORMER)}
    live = {"inflation": ["inflate-tail", "inflate-average"], "lvdm": "lvdm-live"}
    budgets = {name: vars(budget) for name, budget in demo.budgets.items()}
    lengths = "; ".join(f"{name} {budget}" for name, budget in demo.budgets.items())
    report = {**demo.figures, "seconds": demo.seconds, "budgets": budgets, "loaded": loaded, "trained_live": live,
              "commands": demo.commands}
    write_json(demo.out / "report.json", report)
    f = demo.figures
    lines = [
        "# Demo report", "",
        f"Videos: {videos or 'rendered clips'}. Total: {sum(demo.seconds.values()):.0f} s.", "",
        "| figure | value |", "|---|---|",
        f"| PSNR, SSIM of held-out clips | {f['psnr_heldout']:.2f} dB, {f['ssim_heldout']:.4f} |",
        f"| latent cache | {format_bytes(f['cache_bytes'])} for {format_bytes(f['video_bytes_raw'])} of raw video, "
        f"{f['train_frames']} frames |",
        f"| tail against average, {demo.budgets['inflate'].steps} steps | {f['psnr_tail_inflated']:.2f} dB against "
        f"{f['psnr_average_inflated']:.2f} dB |",
        f"| loss of the LVDM trained live, first and last | {f['loss_first']:.3f}, {f['loss_last']:.3f} |",
        f"| colour and direction as asked, 17 frames | {f['prompt_accuracy']:.1%} of "
        f"{f['prompt_accuracy_prompts']} |",
        f"| the same in the last 17 of 81 frames | {f['prompt_accuracy_long']:.1%} of "
        f"{f['prompt_accuracy_long_prompts']} |",
        f"| background's pattern as asked, 17 frames, last 17 of 81 | {f['prompt_accuracy_background']:.1%}, "
        f"{f['prompt_accuracy_long_background']:.1%} |",
        f"| background's contrast at the end of 81 frames against the beginning | "
        f"{f['prompt_accuracy_long_contrast']:.2f} |", "",
        "Loaded: the OD-VAE, its image VAE and the LVDM that ship with the packages. Trained live: the two inflated "
        "VAEs and the small LVDM of step 4. The prompt accuracies are those of the LVDM that ships.", "",
        f"How long the live trainings are, and how many prompts are tried, follows from this machine's speed and the "
        f"{demo.minutes:g} minutes that all may take: {lengths}.", "",
        "## Pictures", "",
        *(f"- [{name}]({name})" for name in (
            "reconstruct/contact_sheet.png", "tail-against-average.png", "lvdm-live/loss.png", "lvdm-live/samples",
            "long/contact_sheet.png", "prompt_accuracy.png", "prompt_accuracy_long.png")), "",
        "## Seconds", "", "| step | s |", "|---|---|", *(f"| {k} | {v} |" for k, v in demo.seconds.items()), "",
        "## Commands", "", "```", *demo.commands, "```", ""]
    write_text(demo.out / "report.md", "\n".join(lines))
    print_result("\n" + "\n".join(lines[4:14]))
    print_result(f"\nThe report is in {demo.out / 'report.md'}, the long videos in {demo.out / 'long'}")
    return report
