"""Compression ratios of an OD-VAE from its config, without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def compression(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the temporal compression (frames per latent frame) and the spatial one (pixels per latent and side), also
    of Wan's VAE."""
    if "scale_factor_temporal" in config:
        return int(config["scale_factor_temporal"]), int(config["scale_factor_spatial"])
    return int(config["time_compression"]), int(config["patch_size"] * 2 ** (len(config["block_out_channels"]) - 1))
