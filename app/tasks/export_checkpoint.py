"""Export the newest checkpoint of an unfinished run as a pipeline."""

from __future__ import annotations

from pathlib import Path


def export(run: Path) -> Path | None:
    """Write RUN/stopped/step-00000200, an LVDMPipeline with the EMA weights of the newest checkpoint of an LVDM run,
    and return it; None if there is no checkpoint, or the run is finished. Loads the models on the CPU.

    Raises:
        UserError: the config, the caches or the checkpoint cannot be read.
    """
    import torch

    from lvdm.sampling.pipeline import LVDMPipeline
    from lvdm.text import load_text_encoder
    from lvdm.training.lora import merge_lora
    from lvdm.training.train import TrainConfig, make_model
    from odvae.inference.loading import load_vae
    from odvae.trainer.checkpoints import latest_checkpoint, load_checkpoint
    from odvae.utils.config import load_config
    from odvae.utils.files import atomic_folder

    newest = latest_checkpoint(run / "checkpoints")
    if newest is None or (run / "pipeline").exists():
        return None
    target = run / "stopped" / newest.name
    if target.exists():
        return target
    config = load_config(TrainConfig, run / "config.yaml")
    vae = load_vae(config.vae)
    encoder = load_text_encoder(config.text_encoder) if config.condition == "text" else None
    _, model = make_model(config, vae, encoder)
    tensors, _ = load_checkpoint(newest)
    with torch.no_grad():
        state = model.state_dict()
        for name, tensor in tensors["model"].items():
            state[name].copy_(tensor)
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(tensors["ema"][str(number)])
    model.eval()
    with atomic_folder(target) as folder:
        if config.model.lora is not None:
            merge_lora(model, folder / "lora")
        LVDMPipeline.build(vae, model, encoder).save_pretrained(folder)
    return target
