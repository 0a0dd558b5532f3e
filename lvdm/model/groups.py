"""How a clip's latent frames are split into groups, their positions in time, and which groups see each other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from odvae.utils.errors import UserError


def frame_positions(frames: int, group_size: int, far: bool = False) -> tuple[int, ...]:
    """Positions in time of `frames` latent frames, of which the first is the clip's first: 0, 1, 2 ...

    If the others are `far`, that is from any later part of the clip, there is a gap of one group after the first,
    however many groups are left out: positions stay in the trained range in a video of any length. The first latent is
    the attention sink of a rollout (StreamingLLM, 2309.17453): it shows what is in the video, not where that is by now.
    (4, 2, True) -> (0, 3, 4, 5)."""
    gap = group_size if far else 0
    return (0, *range(1 + gap, frames + gap))


def group_sizes(frames: int, group_size: int, first_alone: bool = True) -> tuple[int, ...]:
    """Split `frames` latent frames into groups: the clip's first latent (a single video frame) alone if `first_alone`,
    then `group_size` each, the remainder last. (5, 2) -> (1, 2, 2); (4, 2, False) -> (2, 2)."""
    if frames < 1 or group_size < 1:
        raise UserError(f"frames and group_size must be at least 1, got {frames} and {group_size}")
    first = (1,) if first_alone else ()
    whole, rest = divmod(frames - len(first), group_size)
    return first + (group_size,) * whole + ((rest,) if rest else ())


@lru_cache(maxsize=64)
def block_mask(groups: tuple[int, ...], past: int, device: torch.device) -> BlockMask:
    """FlexAttention's mask for groups of these numbers of tokens: (N, past + N), True where a token attends: to the
    `past` tokens of history, its own group and earlier groups."""
    group = torch.tensor([g for g, tokens in enumerate(groups) for _ in range(tokens)], device=device)
    visible_from = torch.cat([group.new_zeros(past), group])  # the first group that sees a key

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible_from[key] <= group[query]

    return create_block_mask(attends, None, None, len(group), len(visible_from), device=str(device))


def attention_pairs(groups: Sequence[int], past: int = 0) -> int:
    """Count the (query, key) pairs of attention over groups of these numbers of tokens."""
    pairs, end = 0, past
    for tokens in groups:
        end += tokens
        pairs += tokens * end
    return pairs
