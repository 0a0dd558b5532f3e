"""As a script, in several processes on CPUs: a tiny transformer with its tokens spread over them equals a whole one."""

from __future__ import annotations

import copy

import torch
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig
from torch import Tensor, distributed, nn

from lvdm.model.transformer import LVDMTransformer3DModel
from odvae.trainer.distributed import shutdown, start_processes


def tiny_model() -> LVDMTransformer3DModel:
    torch.manual_seed(0)
    model = LVDMTransformer3DModel(hidden_size=48, num_layers=2, num_attention_heads=4, text_dim=8)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.double()


def enable_parallelism(model: LVDMTransformer3DModel, processes: int) -> None:
    """diffusers' own method, which takes any accelerator but no CPU, on a mesh of CPUs."""
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=processes))
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1, processes), mesh_dim_names=("ring", "ulysses"))
    config.setup(distributed.get_rank(), processes, torch.device("cpu"), mesh=mesh)
    model._resolve_parallel_config = lambda _: config  # type: ignore[method-assign]
    model.enable_parallelism(config=config)


def outputs(model: LVDMTransformer3DModel, text: Tensor) -> list[Tensor]:
    """Three latents, two of them a group, then two more that see them as history; and the gradients, of the latents'
    first."""
    rng = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 5, 4, 8, generator=rng, dtype=torch.float64, requires_grad=True)
    timestep = torch.rand(2, 5, generator=rng, dtype=torch.float64)
    first = model(latents[:, :, :3], timestep[:, :3], text, groups=(1, 2), return_history=True)
    second = model(latents[:, :, 3:], timestep[:, 3:], text, groups=(2,), positions=(3, 4), history=first.history)
    parameters = [latents, *model.parameters()]
    loss = first.sample.square().mean() + second.sample.square().mean()
    return [first.sample, second.sample, *torch.autograd.grad(loss, parameters)]


def main() -> None:
    processes = start_processes().num_processes
    text = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = tiny_model()
    spread = copy.deepcopy(whole)
    enable_parallelism(spread, processes)
    expected, found = outputs(whole, text), outputs(spread, text)
    for i, (one, other) in enumerate(zip(expected, found, strict=True)):
        if i >= 2:  # a process has the part of a gradient that its tokens contribute
            distributed.all_reduce(other)
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)
    assert max(float(gradient.abs().max()) for gradient in found[2:]) > 1e-3
    shutdown()


if __name__ == "__main__":
    main()
