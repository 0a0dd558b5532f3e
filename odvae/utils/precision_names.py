"""The names of precisions, for command lines and schemas, without torch."""

from __future__ import annotations

from typing import Literal, get_args

Computed = Literal["float32", "tf32", "bfloat16", "float16"]  # tf32: float32 with products of TF32, on CUDA alone
Precision = Literal["auto", "float32", "tf32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PRECISION_HELP = "of the computation (default: %(default)s: bfloat16 on an accelerator, float32 on a CPU)"
