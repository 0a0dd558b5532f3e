"""Randomness as a pure function of seed, names and numbers, independent of earlier draws."""

from __future__ import annotations

import hashlib
import json
import operator

import torch


def generator(seed: int, *stream: int | str) -> torch.Generator:
    """Return a CPU generator whose state is a pure function of its arguments, e.g. `generator(seed, "noise", step)`.

    Similar arguments give unrelated streams, and 1 is not "1". torch's CPU generator keeps 32 bits of a seed, so two of
    n streams coincide with a probability of about n² / 2^33.
    """
    key = json.dumps([part if isinstance(part, str) else operator.index(part) for part in (seed, *stream)])
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
