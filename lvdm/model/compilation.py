"""torch.compile for the blocks of a transformer: few graphs, whatever the length of a video.

Blocks that are alike share their graphs (regional compilation). A block is compiled for each number of groups that it
gets at once and, with sizes as symbols from the second on, for no more. A rollout passes its history at every group,
which grows at first: `forward_by_group` passes it group by group, on the keys and values of those before, as a step
passes the group that it denoises. So a rollout has two graphs: a clip's first latent, and a group with history.

CUDA graphs (`mode="reduce-overhead"`) need tensors of fixed shapes and addresses. Shapes repeat once the history is
full, one graph is recorded for each length before; but history is kept between calls, and its memory is that of a
graph's output, which the next replay overwrites: clone it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from odvae.utils.compiler import check_compiler
from odvae.utils.errors import UserError

RECOMPILE_LIMIT = 64  # per kind of block; torch's own, 8, is fewer than a training with buckets needs


class CompiledBlocksMixin:
    """diffusers' `compile_repeated_blocks`, as this project's transformers need it."""

    compiled = False  # whether blocks are compiled

    def compile_repeated_blocks(self, *args: Any, **options: Any) -> None:
        """Compile every block, as one graph without breaks; `options` go to torch.compile."""
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)
        super().compile_repeated_blocks(*args, **{"fullgraph": True} | options)  # type: ignore[misc]
        self.compiled = True


def mark_history(history: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Let a graph take a history of any length."""
    for keys, values in history:
        for tensor in (keys, values):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)


def forward_by_group(model: Any, latents: Tensor, timestep: Tensor, target_timestep: Tensor | None,
                     groups: Sequence[int], positions: Sequence[int], history: Any,
                     options: dict[str, Any]) -> tuple[Tensor, Any]:
    """Evaluate one group after another; return the velocity of all, and the history with theirs."""
    samples = []
    start = 0
    for frames in groups:
        part = slice(start, start + frames)
        target = None if target_timestep is None else target_timestep[:, part]
        sample, history = model(latents[:, :, part], timestep[:, part], target_timestep=target, groups=(frames,),
                                positions=positions[part], history=history, return_history=True, return_dict=False,
                                **options)
        samples.append(sample)
        start += frames
    return torch.cat(samples, dim=2), history


def compile_transformer(model: Any, **options: Any) -> None:
    """Compile the repeated blocks of a pipeline's transformer; `options` go to torch.compile.

    Raises:
        UserError: it has none; the compiler that torch.compile's own backend needs is not there.
    """
    if not getattr(model, "_repeated_blocks", None):
        raise UserError(f"{type(model).__name__} has no repeated blocks to compile; leave out --compile")
    if "backend" not in options:
        check_compiler(torch.device(model.device))
    model.compile_repeated_blocks(**options)
