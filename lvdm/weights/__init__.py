"""The small pretrained LVDM that ships: made by configs/lvdm/demo.yaml on the latents of the OD-VAE that ships."""

from __future__ import annotations

from pathlib import Path

DEMO_TRANSFORMER = Path(__file__).parent / "demo"
