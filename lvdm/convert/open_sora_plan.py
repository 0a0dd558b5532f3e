"""Import Open-Sora-Plan v1.2: its transformer, its VAE and its text encoder become one pipeline; every key is accounted
for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from odvae.convert.open_sora_plan import import_checkpoint
from odvae.inference.loading import load_vae
from odvae.utils.errors import UserError
from odvae.utils.files import atomic_folder, read_json

from ..model.open_sora import OpenSoraT2VTransformer3DModel
from ..sampling.open_sora import OpenSoraPipeline
from ..text import TransformersEncoder

CLASS = "OpenSoraT2V"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# The values that the model implements; the other fields of the public config are its arguments.
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",), "attention_type": ("default",), "double_self_attention": (False,),
    "downsampler": (None,), "norm_elementwise_affine": (False,), "norm_type": ("ada_norm_single",),
    "num_vector_embeds": (None,), "only_cross_attention": (False,), "patch_size_t": (1, None),
    "upcast_attention": (False,), "use_additional_conditions": (None, False), "use_linear_projection": (False,),
    "use_rope": (True,)}
# How the public code computes, trained and is called; nothing of it is in the weights.
_IGNORED = {"attention_mode", "dropout", "norm_num_groups", "num_embeds_ada_norm", "use_stable_fp32",
            "cross_attention_dim", "_class_name", "_diffusers_version", "_name_or_path"}


def import_pipeline(source: str, target: Path, *, vae: str, text_encoder: str,
                    dtype: torch.dtype = torch.float32) -> OpenSoraPipeline:
    """Write the pipeline of a transformer, a VAE and a text encoder to a new folder, and return it.

    Args:
        source, vae, text_encoder: folders, or hub names such as LanguageBind/Open-Sora-Plan-v1.2.0/93x480p. The VAE is
            in the public layout, or one of ours.
        dtype: of the transformer's and the text encoder's weights.

    Raises:
        UserError: `target` exists; one of them cannot be read; they do not match.
    """
    if target.exists():
        raise UserError(f"{target} exists already; give a new folder")
    transformer = import_transformer(find_folder(source), dtype)
    folder = find_folder(vae)
    public = read_json(folder / "config.json").get("_class_name") != "AutoencoderKLODVAE"
    autoencoder: Any = import_checkpoint(folder) if public else load_vae(folder)
    encoder = TransformersEncoder.from_pretrained(text_encoder, dtype)
    pipeline = OpenSoraPipeline(autoencoder, transformer, encoder.model, encoder.tokenizer)
    with atomic_folder(target) as folder:
        pipeline.save_pretrained(folder)
    return pipeline


def find_folder(name: str) -> Path:
    """Return a folder, or the folder that a hub name owner/repository[/subfolder] is downloaded to.

    Raises:
        UserError: there is neither; the message says which was tried.
    """
    if Path(name).is_dir():
        return Path(name)
    parts = name.split("/")
    if len(parts) < 2 or name.startswith((".", "/")):
        raise UserError(f"{name} is no folder; give one, or a hub name owner/repository/subfolder")
    subfolder = "/".join(parts[2:])
    try:
        root = snapshot_download("/".join(parts[:2]), allow_patterns=[f"{subfolder}/*"] if subfolder else None)
    except (OSError, ValueError) as error:  # of the network, of the name, not in the cache while offline
        raise UserError(f"{name} is neither a folder nor can it be downloaded: {error}") from error
    return Path(root, subfolder)


def import_transformer(source: Path | str, dtype: torch.dtype = torch.float32) -> OpenSoraT2VTransformer3DModel:
    """Read a folder with config.json and weights in safetensors, one file or shards with an index.

    Raises:
        UserError: no such folder or file; a config field that is unknown or has a value that the model does not
            implement; a key that is missing, unexpected or of another shape. The message says which.
    """
    source = Path(source)
    if not (source / "config.json").is_file():
        raise UserError(f"{source} has no config.json; give the folder of the transformer, such as 93x480p of "
                        "LanguageBind/Open-Sora-Plan-v1.2.0")
    config = read_json(source / "config.json")
    with init_empty_weights():
        model = OpenSoraT2VTransformer3DModel(**read_config(config, source / "config.json"))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    state = {}
    for name, tensor in _read_weights(source):
        if name not in shapes:
            raise UserError(f"the weights in {source} have an unexpected key {name}")
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(f"{name} in {source} has shape {tuple(tensor.shape)}; its config.json says {shapes[name]}")
        state[name] = tensor.to(dtype)
    if missing := sorted(shapes.keys() - state.keys()):
        raise UserError(f"the weights in {source} lack {len(missing)} keys, such as {', '.join(missing[:3])}")
    model.load_state_dict(state, assign=True)
    return model.eval()


def read_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the arguments of the model that a public config describes; raise UserError for one that it does not
    implement."""
    if config.get("_class_name") != CLASS:
        raise UserError(f"{path} describes a {config.get('_class_name')}; expected {CLASS}, the transformer of "
                        "Open-Sora-Plan v1.2")
    known = OpenSoraT2VTransformer3DModel._get_init_keys(OpenSoraT2VTransformer3DModel) - {"self"}
    if unknown := sorted(config.keys() - known - _FIXED.keys() - _IGNORED):
        raise UserError(f"{path} has unknown fields {', '.join(unknown)}")
    for name, values in _FIXED.items():
        if config.get(name, values[0]) not in values:
            raise UserError(f"{path} says {name}: {config[name]!r}; only {values[0]!r} is supported")
    width = config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)
    if config.get("cross_attention_dim", width) != width:
        raise UserError(f"{path} says cross_attention_dim: {config['cross_attention_dim']}; only heads times "
                        f"width = {width} is supported")
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in config.items() if name in known}


def _read_weights(source: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the folder, one at a time."""
    index = source / f"{WEIGHTS}.index.json"
    files = sorted({*read_json(index)["weight_map"].values()}) if index.is_file() else [WEIGHTS]
    for name in files:
        path = source / name
        if not path.is_file():
            raise UserError(f"{source} has no {name}; weights are read from safetensors only")
        try:
            with safe_open(path, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  (no mapping)
                    yield key, tensors.get_tensor(key)
        except SafetensorError as error:
            raise UserError(f"{path} is not a safetensors file: {error}") from error
