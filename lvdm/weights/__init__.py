"""The small shipped LVDM: trained with configs/lvdm/demo.yaml on the latents of the shipped OD-VAE."""

from __future__ import annotations

from pathlib import Path

DEMO_TRANSFORMER = Path(__file__).parent / "demo"
