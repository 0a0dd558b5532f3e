"""From a prompt, an image or a video to a video of any length: text encoder, transformer and VAE in one folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from odvae.data.transforms import to_tensor, to_uint8
from odvae.memory import Part, Plan, auto_plan, free_memory
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.model.conv import handed_over
from odvae.runtime.errors import UserError
from odvae.streaming import encode_stream

from .defaults import GUIDANCE_RESCALE, GUIDANCE_SCALE, STEPS
from .model.transformer import LVDMTransformer3DModel
from .rollout import RolloutGroup, RolloutStep, rollout
from .text import TextEncoder, TransformersEncoder, WordHashEncoder

DECODED_AT_ONCE = 2  # latent frames; bounds the memory
ENCODED_AT_ONCE = 8  # frames


@dataclass(frozen=True)
class VideoPiece:
    """The frames of group `group` of `groups` (from 1; group 0 is the image or video that was given, as the VAE shows
    it): uint8 (B, t, H, W, 3), and their normalised latents (B, c, t', h, w)."""

    group: int
    groups: int
    frames: np.ndarray
    latents: Tensor


@dataclass
class LVDMPipelineOutput(BaseOutput):
    """`frames`: uint8 (B, T, H, W, 3). `latents`: normalised, (B, c, 1 + (T-1)/4, H/8, W/8)."""

    frames: np.ndarray
    latents: Tensor


class LVDMPipeline(DiffusionPipeline):
    """Text to video, image to video, and continuation of a video, all by the same rollout.

    Args:
        vae: `odvae.AutoencoderKLODVAE`.
        transformer: `LVDMTransformer3DModel`, trained on that VAE's normalised latents.
        text_encoder: what the transformer was trained with: a `WordHashEncoder` or a transformers encoder.
        tokenizer: the latter's; None for a `WordHashEncoder`. `build` takes the two as one.

    Raises:
        UserError: where the components do not fit each other.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer"]  # noqa: RUF012  (diffusers reads this name)

    def __init__(self, vae: AutoencoderKLODVAE, transformer: LVDMTransformer3DModel,
                 text_encoder: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer)
        for name, made, wanted in (
                ("the VAE's latents have", vae.latent_channels, transformer.config.in_channels),
                ("the text encoder's states have", self._text_encoder().dim, transformer.config.text_dim)):
            if made != wanted:
                raise UserError(f"{name} {made} channels, the transformer was made for {wanted}: "
                                "load the components that it was trained with")

    @classmethod
    def build(cls, vae: AutoencoderKLODVAE, transformer: LVDMTransformer3DModel,
              text_encoder: WordHashEncoder | TransformersEncoder) -> LVDMPipeline:
        """From what `lvdm.text.load_text_encoder` returns."""
        if isinstance(text_encoder, TransformersEncoder):
            return cls(vae, transformer, text_encoder.model, text_encoder.tokenizer)
        return cls(vae, transformer, text_encoder)

    def _text_encoder(self) -> TextEncoder:
        if self.tokenizer is None:
            return self.text_encoder
        return TransformersEncoder(self.text_encoder, self.tokenizer)

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        frames: int = 17,                   # of the whole result, 1 + 4k, with the image or video that is given
        negative_prompt: str = "",          # what guidance leads away from
        steps: int = STEPS,                 # Euler steps a group of latents
        guidance_scale: float = GUIDANCE_SCALE,  # 1: none, at half the cost
        shift: float = 1.0,                 # > 1: more of the steps near noise
        seed: int | Sequence[int] = 0,      # one a prompt; an int stands for seed, seed + 1, ...
        height: int | None = None,          # pixels; None: the image's or video's, or the transformer's own size
        width: int | None = None,
        image: np.ndarray | None = None,    # uint8 (H, W, 3): the first frame
        video: np.ndarray | None = None,    # uint8 (T, H, W, 3), T = 1 + 4k: goes on from its end
        guidance_rescale: float = GUIDANCE_RESCALE,  # share of the contrast that guidance adds and that is taken back
        window: int = 2,                    # groups of latents that a group looks back on
        history_noise: float = 0.1,         # noise level of what it looks back on
    ) -> Iterator[RolloutStep | VideoPiece]:
        """Make a video and hand it out while it is made: a `RolloutStep` after every step, a `VideoPiece` after every
        group of latents. Memory and the time a piece takes do not depend on the length.

        The joined pieces are `__call__`'s result. An image or video that is given is encoded once, for all prompts, and
        comes back as the first piece.

        Raises:
            UserError: at once, for lengths, sizes or numbers that do not fit; it names the nearest that do. And where
                the VAE does not fit the memory that is free, not even in tiles.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = list(seed) if isinstance(seed, Sequence) else [seed + i for i in range(len(prompts))]
        if not prompts:
            raise UserError("no prompt was given; \"\" is a prompt")
        if image is not None and video is not None:
            raise UserError("give an image or a video to go on from, not both")
        given = image[None] if image is not None else video
        self._check_given(given, height, width)
        config, vae = self.transformer.config, self.vae
        if height is None:
            height = config.sample_height if given is None else given.shape[1]
        if width is None:
            width = config.sample_width if given is None else given.shape[2]
        latents = vae.latent_frames(frames)
        self._check_size(height, width)
        if given is not None:
            latents -= vae.latent_frames(len(given))
            if latents < 1:
                raise UserError(f"frames={frames} is the length of the whole result and must be more than the "
                                f"{len(given)} given; the next is {len(given) + vae.temporal_compression_ratio}")
        plan = self._plan("decode", height, width, len(prompts), DECODED_AT_ONCE * vae.temporal_compression_ratio)
        with torch.no_grad():
            initial = None if given is None else self._encode(given).expand(len(prompts), -1, -1, -1, -1)
            encoder = self._text_encoder()
            texts = encoder.encode(prompts), encoder.encode([negative_prompt])
        device = self._execution_device
        events = rollout(
            self.transformer, *(x.to(device) for text in texts for x in text), latents=latents,
            height=height // vae.spatial_compression_ratio, width=width // vae.spatial_compression_ratio, seeds=seeds,
            steps=steps, guidance_scale=guidance_scale, guidance_rescale=guidance_rescale, shift=shift, window=window,
            history_noise=history_noise, initial=initial)
        return self._decoded(events, initial, plan)

    @torch.no_grad()
    def _decoded(self, events: Iterator[RolloutStep | RolloutGroup], initial: Tensor | None,
                 plan: Plan) -> Iterator[RolloutStep | VideoPiece]:
        past: object = ()
        for event in events:
            if isinstance(event, RolloutStep):
                yield event
                continue
            if initial is not None:  # with the first group, when the number of groups is known
                frames, past = self._decode(initial, past, plan)
                yield VideoPiece(0, event.groups, frames, initial)
                initial = None
            frames, past = self._decode(event.latents, past, plan)
            yield VideoPiece(event.group, event.groups, frames, event.latents)
        self.maybe_free_model_hooks()

    def __call__(self, prompt: str | Sequence[str], **kwargs) -> LVDMPipelineOutput:  # type: ignore[no-untyped-def]
        """The whole video at once; the arguments are those of `stream`."""
        pieces = [event for event in self.stream(prompt, **kwargs) if isinstance(event, VideoPiece)]
        return LVDMPipelineOutput(frames=np.concatenate([piece.frames for piece in pieces], axis=1),
                                  latents=torch.cat([piece.latents for piece in pieces], dim=2))

    def _plan(self, part: Part, height: int, width: int, batch: int = 1, frames: int | None = None) -> Plan:
        """How the VAE's work is cut so that it fits the memory that is free; at most `frames` at once."""
        free = free_memory(self._execution_device)
        return auto_plan(self.vae, part, height, width, batch=batch, free=free, frames=frames)

    def _encode(self, video: np.ndarray) -> Tensor:
        """uint8 (T, H, W, 3) -> normalised latents (1, c, t, h, w) float32."""
        plan = self._plan("encode", *video.shape[1:3])
        pieces = (to_tensor(video[i:i + ENCODED_AT_ONCE])[None].to(self._execution_device, self.vae.dtype)
                  for i in range(0, len(video), ENCODED_AT_ONCE))
        with plan.applied(self.vae):
            raw = torch.cat(list(encode_stream(self.vae, pieces, frames=plan.frames)), dim=2)
        return self.vae.normalize(raw.float())

    def _decode(self, latents: Tensor, past: object, plan: Plan) -> tuple[np.ndarray, object]:
        """Normalised latents (B, c, t, h, w) and the decoder's state -> uint8 (B, t', H, W, 3) and the next state."""
        frames, at_once = [], plan.frames // self.vae.temporal_compression_ratio
        with plan.applied(self.vae):
            for part in self.vae.denormalize(latents).to(self.vae.dtype).split(at_once, dim=2):
                past = handed_over(past)
                video, past = self.vae.decode_piece(part, past)
                frames.append(to_uint8(video))
        return np.concatenate(frames, axis=1), past

    def _check_given(self, given: np.ndarray | None, height: int | None, width: int | None) -> None:
        if given is None:
            return
        if given.dtype != np.uint8 or given.ndim != 4 or given.shape[3] != 3 or not len(given):
            raise UserError("an image must be uint8 (H, W, 3) and a video uint8 (T, H, W, 3), "
                            f"got {given.dtype} with {given.shape} as a video's shape")
        for name, asked, side in (("height", height, given.shape[1]), ("width", width, given.shape[2])):
            if asked not in (None, side):
                raise UserError(f"{name}={asked} was asked for, but the image or video that was given has {side}; "
                                "resize it first (odvae.data.transforms.resize_crop)")

    def _check_size(self, height: int, width: int) -> None:
        unit = self.vae.spatial_compression_ratio * self.transformer.config.patch_size
        if height < unit or width < unit or height % unit or width % unit:
            near = [max(unit, unit * round(side / unit)) for side in (height, width)]
            raise UserError(f"{height}x{width} pixels do not fit, sides must be multiples of {unit}; "
                            f"the nearest is {near[0]}x{near[1]}")
