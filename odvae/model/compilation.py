"""torch.compile for the residual blocks of a VAE, which are most of its time: few graphs, however long a video is.

Blocks that are alike share their graphs (regional compilation). There is one for each shape of block and chunk, without
symbolic sizes: with these, torch's default from the second shape on, inductor (2.13) fails, as it cannot sort the
strides of the channels-last layout. So streams take chunks of two lengths only (`even_parts`), the first of which also
begins a clip, and torch's limit of graphs is raised; what goes beyond it, such as a folder of videos of many sizes,
runs uncompiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..utils.compiler import check_compiler
from ..utils.errors import UserError
from .blocks import ResnetBlock


class CompiledBlocksMixin:
    """diffusers' `compile_repeated_blocks`, as a VAE's blocks need it."""

    compiled = False  # whether blocks are compiled

    def compile_repeated_blocks(self, **options: Any) -> None:
        """Compile every residual block; `options` go to torch.compile."""
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, limits.accumulated_recompile_limit)
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, ResnetBlock):
                module.compile(**{"dynamic": False, **options})
        self.compiled = True


def compile_vae(model: Any, **options: Any) -> None:
    """Compile the blocks of an OD-VAE for inference; `options` go to torch.compile.

    Raises:
        UserError: it is another model; the compiler that torch.compile's own backend needs is not there.
    """
    check_compilable(model)
    if "backend" not in options:
        check_compiler(model.device)
    model.compile_repeated_blocks(**options)


def check_compilable(model: Any) -> None:
    """Raise UserError unless this is an OD-VAE."""
    if not isinstance(model, CompiledBlocksMixin):
        raise UserError(f"only an OD-VAE can be compiled, not a {type(model).__name__}; leave out --compile")


def even_parts(model: Any, chunk: Tensor, full: int, single: int) -> tuple[Tensor, ...]:
    """Split a chunk (B, C, T, H, W) of at most `full` frames for a stream: for a compiled model one that is shorter
    into parts of `single` frames, so that all chunks have one of two lengths."""
    if not model.compiled or chunk.shape[2] == full:
        return (chunk,)
    return chunk.split(single, dim=2)
