"""Train an LVDM on latent caches, from scratch or from trained weights, fully or with a LoRA; also the transformer of
Open-Sora-Plan."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from odvae.inference.memory import free_memory
from odvae.trainer.distributed import best_device, is_main_process, main_process_first
from odvae.trainer.evaluation import EvaluationGroup
from odvae.trainer.memory import settle_checkpointing
from odvae.trainer.metrics import sample_path
from odvae.trainer.trainer import fit, start_run
from odvae.utils.errors import NonFiniteError, UserError
from odvae.utils.plots import contact_sheet, curves

from .config import TrainConfig
from .objective import held_out_losses
from .open_sora import OpenSoraSetup, is_open_sora
from .setup import LVDMSetup, TrainingSetup

__all__ = ["TrainConfig", "set_up", "train"]

logger = logging.getLogger("odvae")


def set_up(config: TrainConfig, *, weights: bool = True) -> TrainingSetup:
    """Load the data and the model, by the kind of the model that the training starts from. Raises UserError.

    Args:
        weights: False: new weights need not have values, see `LVDMSetup`.
    """
    return OpenSoraSetup(config) if is_open_sora(config.model.init_from) else LVDMSetup(config, weights=weights)


def train(config: TrainConfig, change_schedule: bool = False) -> Path:
    """Run or resume a training; return the folder of the trained pipeline, `output`/pipeline. `change_schedule`: see
    `start_run`."""
    setup = set_up(config)
    windows = setup.windows
    if config.model.attention is not None:
        set_attention(setup.model, config.model.attention)
    start_run(config.output, config, change_schedule)
    for line in windows.describe().splitlines():
        logger.info("%s", line)
    held_out = windows.held_out_batches()
    prompts = _sample_prompts(config, [caption for batch in held_out for caption in batch.captions])
    with main_process_first():  # the others find its embeddings of the captions
        sampler = setup.make_sampler(prompts)
    objective = setup.make_objective()
    setup.pipeline.set_progress_bar_config(disable=True)

    def evaluate(step: int, group: EvaluationGroup) -> dict[str, float]:
        figures, part = {}, 0.5 if held_out and prompts else 1.0
        if held_out:
            with torch.no_grad():
                figures = held_out_losses(objective, sampler, held_out, group, part)
        if prompts:
            videos = _samples(setup, objective.model, prompts, step, group, part)
            if videos and is_main_process():
                contact_sheet(videos, sample_path(config.output, step), prompts[: len(videos)])
        return figures

    # With windows.tokens, batches do not have loop.micro_batch_size samples: `fit` then counts micro-batches.
    loop = config.loop if config.windows.tokens is None else config.loop.model_copy(update={"micro_batch_size": 1})
    loop = settle_checkpointing(objective, loop, free_memory(best_device()))
    log = fit(config.output, loop, objective,
              lambda step, micro_batch, count: sampler(windows.batch(step, micro_batch, count), step), evaluate)
    if is_main_process():
        _plot_losses(log, config.output / "loss.png", objective.label)
        setup.save(config.output / "pipeline", config.output / "lora", getattr(torch, config.save_dtype))
    return config.output / "pipeline"


def _samples(setup: TrainingSetup, model: nn.Module, prompts: Sequence[str], step: int, group: EvaluationGroup,
             part: float) -> list[np.ndarray]:
    """Generate a video for each prompt, or for as many as `part` of the evaluation's budget allows, spread over the
    processes; none if not all of these can be."""
    full_model = setup.pipeline.transformer

    def run(indices: list[int]) -> Sequence[Any]:
        try:
            return setup.sample([prompts[i] for i in indices], indices)
        except (NonFiniteError, torch.OutOfMemoryError) as error:  # later it may work; else the training stops itself
            return [str(error)] * len(indices)

    setup.pipeline.transformer = model  # with sharding another one
    try:
        videos: list[Any] = [*group.evaluate("samples", len(prompts), run, range, part).values()]
    finally:
        setup.pipeline.transformer = full_model
    if errors := [video for video in videos if isinstance(video, str)]:
        logger.warning("no samples at step %d: %s", step, errors[0])
        return []
    return videos


def _sample_prompts(config: TrainConfig, captions: list[str]) -> list[str]:
    """The prompts of the samples during training: those configured, else the held-out clips' captions."""
    if config.condition == "none":
        if any(config.sample.prompts):
            raise UserError("condition=none: the model takes no prompts; remove sample.prompts")
        return [""] * config.sample.count
    return list(config.sample.prompts or captions)[: config.sample.count]


def _plot_losses(log: list[dict[str, float]], path: Path, label: str) -> None:
    names = [key for key in ("loss", "loss_heldout") if any(key in line for line in log)]
    curves({key: ([line["step"] for line in log if key in line], [line[key] for line in log if key in line])
            for key in names}, path, label, "step", "loss")


def set_attention(model: Any, backend: str) -> None:
    """Set the attention backend. Raises UserError if diffusers has no such backend, or its requirements are not met."""
    if backend == "flex" and not torch.cuda.is_available():
        raise UserError("model.attention=flex: FlexAttention trains only on an accelerator, and there is none; omit it "
                        "for torch's own kernels, which give the same result")
    try:
        model.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"model.attention={backend}: {error}") from error
