"""Import and export checkpoints of the public code (Open-Sora-Plan v1.1 and v1.2); every key is accounted for.

The foreign layout is described here alone: `_NAMES` maps module names, `_read_config` and `_write_config` map config
fields. The model knows nothing of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..model.autoencoder import AutoencoderKLODVAE
from ..model.conv import CausalConv3d
from ..model.variants import VARIANTS, Kind, make_variant
from ..utils.errors import UserError
from ..utils.files import atomic_folder, read_json, write_json

SCALE = 0.18215  # a latent there is a posterior sample times this
GROUPS = 32

# Our module names -> theirs, applied in this order. (Theirs count the levels of `up` from the pixels, ours from the
# latent.)
_NAMES = (
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"down_blocks\.(\d+)\.downsamplers\.1", r"down.\1.time_downsample"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"up_blocks\.(\d+)\.upsamplers\.1", r"up.\1.time_upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)

_RESNETS: dict[str, Kind] = {"ResnetBlock2D": "2d", "ResnetBlock3D": "3d"}
_IGNORED = {"dropout", "resolution", "_class_name", "_diffusers_version", "_name_or_path", "lr", "loss_type",
            "loss_params"}  # describe the training, or the class


def import_checkpoint(source: Path | str) -> AutoencoderKLODVAE:
    """Read a folder with config.json and one weight file (safetensors, or a .ckpt, whose EMA weights are preferred).

    `normalize` of the result does what the public code's scale factor does.

    Raises:
        UserError: no such folder or file; a config field that is missing, unknown or has a value our model does not
            support; a key that is missing, unexpected or of another shape. The message says which.
    """
    source = Path(source)
    config_file = source / "config.json"
    if not config_file.is_file():
        raise UserError(f"{source} has no config.json; give the folder that holds it and the weights")
    vae = AutoencoderKLODVAE(**_read_config(read_json(config_file), config_file))
    theirs = _read_weights(source)
    layout = _layout(vae)
    expected = {entry.key for entry in layout.values()}
    missing, unexpected = sorted(expected - theirs.keys()), sorted(theirs.keys() - expected)
    if missing or unexpected:
        raise UserError(f"the weights in {source} do not match its config.json: missing keys {_few(missing)}; "
                        f"unexpected keys {_few(unexpected)}")
    state: dict[str, Tensor] = {}
    for ours, parameter in vae.state_dict().items():
        entry = layout[ours]
        tensor = theirs[entry.key].float()
        if tuple(tensor.shape) != entry.shape:
            raise UserError(f"{entry.key} in {source} has shape {tuple(tensor.shape)}; its config.json says "
                            f"{entry.shape}")
        state[ours] = tensor.reshape(parameter.shape)
    vae.load_state_dict(state)
    return vae.eval()


def export_checkpoint(vae: AutoencoderKLODVAE, target: Path | str) -> None:
    """Write a folder that the public code loads: config.json and diffusion_pytorch_model.safetensors.

    Raises:
        UserError: `target` exists; the public code does not support the model (another norm or upsampling, folded
            pixels, another number of groups, a half 3D variant).
    """
    target = Path(target)
    if target.exists():
        raise UserError(f"{target} exists already; give a new folder")
    config = _write_config(vae)
    layout = _layout(vae)
    tensors = {layout[name].key: tensor.detach().float().cpu().reshape(layout[name].shape).contiguous()
               for name, tensor in vae.state_dict().items()}
    with atomic_folder(target) as folder:
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", config)


@dataclass(frozen=True)
class _Entry:
    """A parameter in the public code's checkpoint."""

    key: str
    shape: tuple[int, ...]


def _layout(vae: AutoencoderKLODVAE) -> dict[str, _Entry]:
    """Map each of our parameters to theirs. Their causal conv is a module around a conv, a 2D conv is not, and the
    projections of the attention are causal convs."""
    last = len(vae.config.block_out_channels) - 1
    kinds = make_variant(vae.config.variant, last + 1)
    layout = {}
    for name, tensor in vae.state_dict().items():
        ours, _, leaf = name.rpartition(".")
        module, theirs, shape = vae.get_submodule(ours), ours, tuple(tensor.shape)
        for pattern, replacement in _NAMES:
            theirs = re.sub(pattern, replacement, theirs)
        theirs = re.sub(r"^(decoder\.up)\.(\d+)", lambda match: f"{match[1]}.{last - int(match[2])}", theirs)
        level = int(match[1]) if (match := re.search(r"\.(?:down|up)\.(\d+)", theirs)) else 0
        kind = (kinds.encoder if theirs.startswith("encoder") else kinds.decoder)[level]
        if isinstance(module, nn.Linear):
            theirs, shape = f"{theirs}.conv", (*shape, 1, 1, 1)[: 5 if leaf == "weight" else 1]
        elif isinstance(module, CausalConv3d) and not theirs.endswith("time_downsample.conv"):
            flat = kind == "2d" if ".block." in theirs or theirs in ("encoder.conv_in", "decoder.conv_out") else (
                theirs.endswith("downsample.conv") and module.kernel_size[0] == 1)
            if not flat:
                theirs = f"{theirs}.conv"
            elif leaf == "weight":
                shape = shape[:2] + shape[3:]
        layout[name] = _Entry(f"{theirs}.{leaf}", shape)
    return layout


def _read_config(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Translate their config to arguments of AutoencoderKLODVAE."""
    left = {key: value for key, value in config.items() if key not in _IGNORED}

    def take(key: str) -> Any:
        if key not in left:
            raise UserError(f"{file} lacks {key}, and the public code's default differs from its releases; use the "
                            "config.json that was published with these weights")
        return left.pop(key)

    def expect(key: str, *known: Any) -> Any:
        value = take(key)
        if value not in known:
            raise UserError(f"{file}: {key} is {value!r}; only {' or '.join(map(repr, known))} can be imported")
        return value

    name = config.get("_class_name", "CausalVAEModel")
    if name != "CausalVAEModel":
        raise UserError(f"{file} describes a {name}; expected the public code's CausalVAEModel")
    if "AttnBlock3D" in (config.get("encoder_attention"), config.get("decoder_attention")):
        raise UserError(f"{file} is a v1.0 model: its attention (AttnBlock3D) mixes time and channels, a bug that "
                        "later releases fixed; import v1.1 or v1.2")
    multipliers, latent, width, layers = map(take, ("hidden_size_mult", "z_channels", "hidden_size", "num_res_blocks"))
    levels = len(multipliers)
    if multipliers[0] != 1:
        raise UserError(f"{file}: hidden_size_mult starts with {multipliers[0]}; only 1 can be imported")
    expect("embed_dim", latent)
    expect("double_z", True)
    expect("attn_resolutions", [], ())
    if not left.pop("use_quant_layer", True):
        raise UserError(f"{file}: use_quant_layer is false; only true can be imported")
    for key in ("q_conv", "encoder_conv_out", "decoder_conv_in"):
        expect(key, "CausalConv3d")
    for key in ("encoder_attention", "decoder_attention"):
        expect(key, "AttnBlock3DFix")
    for key in ("encoder_mid_resnet", "decoder_mid_resnet"):
        expect(key, "ResnetBlock3D")
    variant: dict[str, list[Kind]] = {}
    for part in ("encoder", "decoder"):
        names = take(f"{part}_resnet_blocks")
        if len(names) != levels or not _RESNETS.keys() >= set(names):
            raise UserError(f"{file}: {part}_resnet_blocks is {names}; expected one of {sorted(_RESNETS)} for each of "
                            f"{levels} levels")
        variant[part] = [_RESNETS[name] for name in names]
    for key, part in (("encoder_conv_in", "encoder"), ("decoder_conv_out", "decoder")):
        expect(key, "Conv2d" if variant[part][0] == "2d" else "CausalConv3d")
    joint = _is_joint({key: take(key) for key in _samplers(levels, joint=True)}, levels, file)
    if left:
        raise UserError(f"{file} has unknown fields: {', '.join(sorted(left))}; import v1.1 or v1.2")
    return {
        "latent_channels": latent, "block_out_channels": tuple(width * m for m in multipliers),
        "layers_per_block": layers, "norm_num_groups": GROUPS, "variant": _variant_number(variant, levels),
        "norm": "clip", "upsample": "trilinear", "time_sampling": "joint" if joint else "residual",
        "latents_mean": [0.0] * latent, "latents_std": [1 / SCALE] * latent,
    }


def _is_joint(samplers: Mapping[str, Any], levels: int, file: Path) -> bool:
    """Whether the down- and upsamplers are those of v1.2; UserError if they are not those of v1.1 either."""
    layouts = {version: _samplers(levels, joint=version == "v1.2") for version in ("v1.1", "v1.2")}
    samplers = {key: list(names) for key, names in samplers.items()}
    if samplers not in layouts.values():
        odd = {version: [key for key in samplers if samplers[key] != layout[key]]
               for version, layout in layouts.items()}
        raise UserError(f"{file}: the down- and upsamplers match no release: " + "; ".join(
            f"{key} is {samplers[key]}, in {version} {layouts[version][key]}"
            for version, keys in odd.items() for key in keys if len(keys) == min(map(len, odd.values()))))
    return samplers == layouts["v1.2"]


def _variant_number(variant: dict[str, list[Kind]], levels: int) -> int | dict[str, list[Kind]]:
    """Return the number of a variant in `VARIANTS`, or the variant itself if it is custom."""
    for number in VARIANTS:
        row = make_variant(number, levels)
        if (list(row.encoder), list(row.decoder)) == (variant["encoder"], variant["decoder"]):
            return number
    return variant


def _samplers(levels: int, *, joint: bool) -> dict[str, list[str]]:
    """Return their names of the down- and upsamplers: v1.2's (joint) or v1.1's. Two halvings include time."""
    last = levels - 1
    timed = [last - 2 <= level < last for level in range(levels)]  # in the encoder; in the decoder one level deeper
    down = ["" if level == last else "Spatial2xTime2x3DDownsample" if joint and timed[level] else "Downsample"
            for level in range(levels)]
    up = ["" if not level else "Spatial2xTime2x3DUpsample" if joint and timed[level - 1] else "SpatialUpsample2x"
          for level in range(levels)]
    return {
        "encoder_spatial_downsample": down,
        "encoder_temporal_downsample": ["TimeDownsampleRes2x" if t and not joint else "" for t in timed],
        "decoder_spatial_upsample": up,
        "decoder_temporal_upsample": ["", *("TimeUpsampleRes2x" if t and not joint else "" for t in timed[:-1])],
    }


def _write_config(vae: AutoencoderKLODVAE) -> dict[str, Any]:
    """The inverse of `_read_config`."""
    config = vae.config
    levels = len(config.block_out_channels)
    kinds = make_variant(config.variant, levels)
    width = config.block_out_channels[0]
    for setting, is_supported in (
            (f"norm={config.norm!r}", config.norm == "clip"),
            (f"upsample={config.upsample!r}", config.upsample == "trilinear"),
            (f"patch_size={config.patch_size}", config.patch_size == 1),
            (f"norm_num_groups={config.norm_num_groups}", config.norm_num_groups == GROUPS),
            (f"time_compression={config.time_compression}", config.time_compression == 4),
            (f"variant={config.variant}", set(kinds.encoder + kinds.decoder) <= {"2d", "3d"}
             and kinds.encoder[-1] == kinds.decoder[-1] == "3d"),
            (f"block_out_channels={tuple(config.block_out_channels)}",
             not any(w % width for w in config.block_out_channels))):
        if not is_supported:
            raise UserError(f"the public code does not support {setting}, so this VAE cannot be exported to it; use "
                            "save_pretrained")
    names = {kind: name for name, kind in _RESNETS.items()}
    return {
        "_class_name": "CausalVAEModel", "hidden_size": width, "z_channels": config.latent_channels,
        "hidden_size_mult": [w // width for w in config.block_out_channels], "attn_resolutions": [], "dropout": 0.0,
        "resolution": 256, "double_z": True, "embed_dim": config.latent_channels,
        "num_res_blocks": config.layers_per_block, "q_conv": "CausalConv3d",
        "encoder_conv_in": "Conv2d" if kinds.encoder[0] == "2d" else "CausalConv3d",
        "encoder_conv_out": "CausalConv3d", "encoder_attention": "AttnBlock3DFix",
        "encoder_resnet_blocks": [names[kind] for kind in kinds.encoder], "encoder_mid_resnet": "ResnetBlock3D",
        "decoder_conv_in": "CausalConv3d",
        "decoder_conv_out": "Conv2d" if kinds.decoder[0] == "2d" else "CausalConv3d",
        "decoder_attention": "AttnBlock3DFix",
        "decoder_resnet_blocks": [names[kind] for kind in kinds.decoder], "decoder_mid_resnet": "ResnetBlock3D",
        **_samplers(levels, joint=config.time_sampling == "joint"), "use_quant_layer": True,
    }


def _read_weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".ckpt") and p.name != "io.safetensors")
    if len(files) != 1:
        raise UserError(f"{folder} holds {len(files)} weight files ({_few([p.name for p in files])}); leave exactly "
                        "one (.safetensors or .ckpt)")
    try:
        if files[0].suffix == ".safetensors":
            weights = load_file(files[0])
        else:
            weights = _generator_weights(torch.load(files[0], map_location="cpu", weights_only=True), files[0])
    except (SafetensorError, OSError, RuntimeError, EOFError, UnpicklingError) as error:  # a .ckpt may hold more than
        raise UserError(f"{files[0]} cannot be read: {error}") from error                # tensors, which is refused
    return {key: tensor for key, tensor in weights.items() if not key.startswith("loss.")}


def _generator_weights(checkpoint: Any, file: Path) -> dict[str, Tensor]:
    """Return the EMA weights if there are any, else the generator's, else a plain state dict."""
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"{file} holds {type(checkpoint).__name__}; expected a dictionary of weights")
    weights: Any = checkpoint.get("ema_state_dict")
    if not weights:
        weights = checkpoint.get("state_dict", checkpoint)
        weights = weights.get("gen_model", weights)
    return {key.removeprefix("module."): tensor for key, tensor in weights.items() if isinstance(tensor, Tensor)}


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
