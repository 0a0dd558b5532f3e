"""The small pretrained LVDM that ships: made by configs/lvdm/demo.yaml on the latents of the OD-VAE that ships."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..sampling.pipeline import LVDMPipeline

DEMO_TRANSFORMER = Path(__file__).parent / "demo"


def default_pipeline() -> LVDMPipeline:
    """The shipped pair as a pipeline, in float32."""
    import torch

    from odvae.inference.loading import load_vae
    from odvae.weights import DEMO_VAE

    from ..model.transformer import LVDMTransformer3DModel
    from ..sampling.pipeline import LVDMPipeline
    from ..text import load_text_encoder

    transformer = LVDMTransformer3DModel.from_pretrained(DEMO_TRANSFORMER, torch_dtype=torch.float32)
    return LVDMPipeline.build(load_vae(DEMO_VAE).eval(), transformer.eval(), load_text_encoder(None))
