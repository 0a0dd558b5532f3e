"""Export the newest checkpoint of an unfinished run as a pipeline."""

from __future__ import annotations

from pathlib import Path


def export(run: Path) -> Path | None:
    """Write RUN/stopped/step-00000200, a pipeline with the EMA weights of the newest checkpoint of an LVDM run,
    and return it; None if there is no checkpoint, or the run is finished. Loads the models on the CPU.

    Raises:
        UserError: the config, the caches or the checkpoint cannot be read.
    """
    import torch

    from lvdm.training.train import TrainConfig, set_up
    from odvae.trainer.checkpoints import latest_checkpoint, load_checkpoint
    from odvae.utils.config import load_config
    from odvae.utils.files import atomic_folder

    newest = latest_checkpoint(run / "checkpoints")
    if newest is None or (run / "pipeline").exists():
        return None
    target = run / "stopped" / newest.name
    if target.exists():
        return target
    setup = set_up(load_config(TrainConfig, run / "config.yaml"))
    model = setup.model
    tensors, _ = load_checkpoint(newest)
    with torch.no_grad():
        state = model.state_dict()
        for name, tensor in tensors["model"].items():
            state[name].copy_(tensor)
        for name, tensor in tensors["ema"].items():
            state[name].copy_(tensor)
    with atomic_folder(target) as folder:
        setup.save(folder, folder / "lora")
    return target
