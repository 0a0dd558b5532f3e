"""diffusers' flow-matching schedulers: which are supported, and how one denoises a group."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from odvae.utils.errors import UserError
from odvae.utils.seeding import generator

from ..defaults import FLOW_SCHEDULERS

_FLOW = FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
_MULTISTEP = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}  # not only for flows
_SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = dict(zip(FLOW_SCHEDULERS, (
    (FlowMatchEulerDiscreteScheduler, {}),
    (FlowMatchHeunDiscreteScheduler, {}),          # two evaluations of the model a step
    (UniPCMultistepScheduler, _MULTISTEP),         # 2302.04867
    (DPMSolverMultistepScheduler, _MULTISTEP),     # DPM-Solver++, 2211.01095
), strict=True))


def make_scheduler(name: str) -> Any:
    """Return a scheduler by its name in `FLOW_SCHEDULERS`. Raises UserError for any other name."""
    if name not in _SCHEDULERS:
        raise UserError(f"unknown scheduler {name!r}; choose from {', '.join(_SCHEDULERS)}")
    kind, config = _SCHEDULERS[name]
    return kind(**config)


def check_scheduler(scheduler: Any, flow_map: bool = False) -> None:
    """Raise UserError unless the scheduler solves flows: predictions e - x_0, noise levels from 0 to 1. Of a `flow_map`
    only Euler's step takes the prediction, which is an average over that step."""
    config = getattr(scheduler, "config", {})
    if flow_map and (type(scheduler) is not FlowMatchEulerDiscreteScheduler or config.get("stochastic_sampling")):
        raise UserError(f"{type(scheduler).__name__} takes velocities at a noise level, and this transformer is a flow "
                        "map, which predicts averages over a step; use the scheduler \"euler\", without "
                        "stochastic_sampling")
    if not isinstance(scheduler, _FLOW) and any(config.get(key) != value for key, value in _MULTISTEP.items()):
        raise UserError(f"{type(scheduler).__name__} is not configured for flow matching; use a FlowMatch scheduler, "
                        "or one with prediction_type=\"flow_prediction\" and use_flow_sigmas=True")


_EPSILON: dict[str, tuple[Any, dict[str, Any]]] = {
    "euler-ancestral": (EulerAncestralDiscreteScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "unipc": (UniPCMultistepScheduler, {}),
    "dpm": (DPMSolverMultistepScheduler, {}),
}


_PREDICTIONS = ("epsilon", "v_prediction")
_TRAINED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
            "rescale_betas_zero_snr")  # what a model was trained with


def make_epsilon_scheduler(name: str, own: Any) -> Any:
    """Return a scheduler for a denoising model by its name, with the noise schedule and prediction of the model's own.
    Raises UserError for any other name."""
    if name not in _EPSILON:
        raise UserError(f"unknown scheduler {name!r}; choose from {', '.join(_EPSILON)}")
    kind, config = _EPSILON[name]
    takes = inspect.signature(kind.__init__).parameters
    return kind(**config, **{key: own.config[key] for key in _TRAINED if key in own.config and key in takes})


def check_epsilon_scheduler(scheduler: Any, predictions: Sequence[str] = _PREDICTIONS) -> None:
    """Raise UserError unless the scheduler takes one of these predictions: of the noise (epsilon), or of v."""
    prediction = getattr(scheduler, "config", {}).get("prediction_type")
    if prediction not in predictions:
        expected = " or ".join(f'"{name}"' for name in predictions)
        raise UserError(f"{type(scheduler).__name__} is configured for prediction_type={prediction!r}; this model "
                        f"predicts {expected}")


def num_function_evaluations(scheduler: Any, steps: int) -> int:
    """How often the model is evaluated in `steps` steps."""
    return 2 * steps - 1 if scheduler.order == 2 else steps


def place_sigmas(scheduler: Any, device: torch.device) -> None:
    """Move the noise levels of UniPC to the device, once: it copies each that it reads there, and waits for it. Others
    compute with them on the CPU, as numbers."""
    if isinstance(scheduler, UniPCMultistepScheduler):
        scheduler.sigmas = scheduler.sigmas.to(device)


def step_arguments(scheduler: Any, seeds: Sequence[int], group: int = 0) -> dict[str, Any]:
    """Return further arguments of the scheduler's `step`: what a stochastic one draws is a pure function of (seed,
    group)."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    return {"generator": [generator(seed, "solver", group) for seed in seeds]}


class Solver:
    """Denoises one group. Schedulers have state, so every group has a fresh copy.

    The scheduler's config decides how it solves; the noise levels are the given ones with every scheduler.

    Args:
        sigmas: noise levels of the steps, descending from noise to 0; a second-order scheduler evaluates the model
            twice in each step but the last.
        seeds: one per sample; what a stochastic scheduler draws is a pure function of (seed, group).

    Attributes:
        sigmas: noise level, 1 = pure noise, of each evaluation of the model.
        targets: noise level that a step of first order goes to after it.
    """

    def __init__(self, scheduler: Any, sigmas: Tensor, seeds: Sequence[int], group: int) -> None:
        plain = {"use_dynamic_shifting": False} if "use_dynamic_shifting" in scheduler.config else {}
        self._scheduler = type(scheduler).from_config(scheduler.config, **plain)
        self._scheduler.set_timesteps(len(sigmas) - 1)
        if self._scheduler.order == 2:  # it counts evaluations: two at each level but the ends
            sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        if not isinstance(scheduler, _FLOW):
            sigmas = sigmas.clamp(max=1 - 1e-6)  # they work with log(1 - sigma)
        self._scheduler.sigmas = sigmas
        self._scheduler.timesteps = sigmas[:-1] * self._scheduler.config.num_train_timesteps
        self._scheduler.set_begin_index(0)
        self.sigmas: list[float] = sigmas[:-1].tolist()
        self.targets: list[float] = sigmas[1:].tolist()
        self._step_arguments = step_arguments(self._scheduler, seeds, group)

    def step(self, index: int, x: Tensor, velocity: Tensor) -> Tensor:
        """Return x (B, c, t, h, w) after evaluation `index`, which gave `velocity`; evaluations come in order."""
        if index == 0:
            place_sigmas(self._scheduler, x.device)
        timestep = self._scheduler.timesteps[index]
        out: Tensor = self._scheduler.step(velocity, timestep, x, return_dict=False, **self._step_arguments)[0]
        return out
