"""report.json and report.md of a demo."""

from __future__ import annotations

from typing import Any

from odvae.cli import print_result
from odvae.utils.files import write_json, write_text
from odvae.utils.format import format_bytes
from odvae.weights import DEMO_IMAGE_VAE, DEMO_VAE, NATURAL_IMAGE_VAE, NATURAL_VAE

from ..weights import DEMO_TRANSFORMER
from .session import DemoSession

PICTURES = ("reconstruct/contact_sheet.png", "tail-against-average.png", "lvdm-live/loss.png", "lvdm-live/samples",
            "long/contact_sheet.png", "prompt_accuracy.png", "prompt_accuracy_long.png")


def write_report(demo: DemoSession) -> dict[str, Any]:
    """Write both files, print the table and return what report.json holds."""
    odvae, image_vae = (DEMO_VAE, DEMO_IMAGE_VAE) if demo.videos is None else (NATURAL_VAE, NATURAL_IMAGE_VAE)
    report = {**demo.figures, "seconds": demo.seconds,
              "budgets": {name: vars(budget) for name, budget in demo.budgets.items()},
              "loaded": {"odvae": str(odvae), "image_vae": str(image_vae), "lvdm": str(DEMO_TRANSFORMER)},
              "trained_live": {"inflation": ["inflate-tail", "inflate-average"], "lvdm": "lvdm-live"},
              "commands": demo.commands}
    write_json(demo.out / "report.json", report)
    table = _table(demo)
    budgets = "; ".join(f"{name} {budget}" for name, budget in demo.budgets.items())
    lines = [
        "# Demo report", "",
        f"Videos: {demo.videos or 'rendered clips'}. Total: {sum(demo.seconds.values()):.0f} s.", "", *table, "",
        "Loaded: the OD-VAE, its image VAE and the LVDM that ship with the packages. Trained live: the two inflated "
        "VAEs and the small LVDM of stage 4. The prompt accuracies are those of the shipped LVDM.", "",
        f"The lengths of the live trainings and the number of prompts follow from this machine's speed and the limit "
        f"of {demo.minutes:g} minutes: {budgets}.", "",
        "## Pictures", "", *(f"- [{name}]({name})" for name in PICTURES), "",
        "## Seconds", "", "| stage | s |", "|---|---|", *(f"| {k} | {v} |" for k, v in demo.seconds.items()), "",
        "## Commands", "", "```", *demo.commands, "```", ""]
    write_text(demo.out / "report.md", "\n".join(lines))
    print_result("\n" + "\n".join(table))
    print_result(f"\nThe report is in {demo.out / 'report.md'}, the long videos in {demo.out / 'long'}")
    return report


def _table(demo: DemoSession) -> list[str]:
    f = demo.figures
    rows = {
        "PSNR, SSIM of held-out clips": f"{f['psnr_heldout']:.2f} dB, {f['ssim_heldout']:.4f}",
        "latent cache": f"{format_bytes(f['cache_bytes'])} for {format_bytes(f['video_bytes_raw'])} of raw video, "
                        f"{f['train_frames']} frames",
        f"tail, average initialization after {demo.budgets['inflate'].steps} steps":
            f"{f['psnr_tail_inflated']:.2f} dB, {f['psnr_average_inflated']:.2f} dB",
        "loss of the LVDM trained live, first, last": f"{f['loss_first']:.3f}, {f['loss_last']:.3f}",
        "colour and direction correct, 17 frames":
            f"{f['prompt_accuracy']:.1%} of {f['prompt_accuracy_prompts']} prompts",
        "colour and direction correct, last 17 of 81 frames":
            f"{f['prompt_accuracy_long']:.1%} of {f['prompt_accuracy_long_prompts']} prompts",
        "background pattern correct, 17 frames, last 17 of 81":
            f"{f['prompt_accuracy_background']:.1%}, {f['prompt_accuracy_long_background']:.1%}",
        "background contrast at the end of 81 frames / at the start": f"{f['prompt_accuracy_long_contrast']:.2f}"}
    return ["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
