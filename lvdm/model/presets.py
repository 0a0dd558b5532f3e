"""Sizes of the transformer. Names count the parameters with 16 latent channels and text of width 768."""

from __future__ import annotations

PRESETS: dict[str, dict[str, int]] = {
    #                 width              depth             heads
    "5m":   {"hidden_size": 192,  "num_layers": 8,  "num_attention_heads": 6},
    "30m":  {"hidden_size": 384,  "num_layers": 12, "num_attention_heads": 6},
    "130m": {"hidden_size": 768,  "num_layers": 13, "num_attention_heads": 12},
    "400m": {"hidden_size": 1024, "num_layers": 23, "num_attention_heads": 16},
    "1.4b": {"hidden_size": 1536, "num_layers": 36, "num_attention_heads": 12},
}
