"""The average of a training's weights."""

from __future__ import annotations

from collections import Counter

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counted[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_shards_are_averaged_all_at_once(tmp_path):
    """`State` does so on an accelerator: two calls for all shards, with the values of one by one."""
    init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
        fully_shard(model)
        averages = [EMAModel(model.parameters(), decay=0.5, foreach=foreach) for foreach in (False, True)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        averages[0].step(model.parameters())
        with Calls() as calls:
            averages[1].step(model.parameters())
        assert calls.counted.total() == 2
        for one, other in zip(*(average.shadow_params for average in averages), strict=True):
            assert one.full_tensor().equal(other.full_tensor())
    finally:
        destroy_process_group()
