"""What an OD-VAE's config says about lengths and sizes, without the network: asking costs no import of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def compression(config: Mapping[str, Any]) -> tuple[int, int]:
    """How many frames become one latent frame, and how many pixels a side one latent."""
    return int(config["time_compression"]), int(config["patch_size"] * 2 ** (len(config["block_out_channels"]) - 1))
