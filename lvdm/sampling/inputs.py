"""The pipeline's inputs and their checks, before anything is computed. Each raises UserError and names what would
fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from odvae.data.transforms import resize_crop
from odvae.inference.memory import AUTO, MemoryOptions
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.utils.errors import UserError

from ..defaults import GUIDANCE_RESCALE, GUIDANCE_SCALE, HISTORY_GROUPS, HISTORY_NOISE
from ..model.transformer import LVDMTransformer3DModel
from .prompts import Prompt, PromptSchedule, as_list

CALLBACK_TENSORS = ("latents", "prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds",
                    "negative_prompt_embeds_mask")  # that a callback may ask for and replace


@dataclass(frozen=True, kw_only=True)
class SamplingInputs:
    """The arguments of a pipeline's `stream`; those of `__call__` are the same, with the same defaults."""

    prompt: Prompt | Sequence[Prompt] | None = None  # per video, text or a schedule of (from second, text)
    negative_prompt: str | Sequence[str] | None = None  # what guidance leads away from; one for all, or one per prompt
    height: int | None = None           # pixels; None: those of the image or video, or the transformer's own
    width: int | None = None
    num_frames: int = 17                # of the whole result, 1 + 4k, including what it continues
    num_inference_steps: int | None = None  # of the scheduler, per group of latents; None: the pipeline's own
    sigmas: Sequence[float] | None = None  # noise levels of the steps, descending in (0, 1], in place of their number
    guidance_scale: float = GUIDANCE_SCALE  # 1: no guidance, at half the cost unless it is learned in
    num_videos_per_prompt: int = 1
    generator: torch.Generator | Sequence[torch.Generator] | None = None  # draws the seeds; one, or one per video
    latents: Tensor | None = None       # (B, c, t, h, w) noise that the new latents start from
    prompt_embeds: Tensor | None = None  # (B, M, D), in place of the prompts
    prompt_embeds_mask: Tensor | None = None  # (B, M), False at padding; None: no padding
    negative_prompt_embeds: Tensor | None = None  # (1 or B, M, D)
    negative_prompt_embeds_mask: Tensor | None = None
    callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None  # (pipeline, step, timestep, tensors)
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)  # of `CALLBACK_TENSORS`; it may return others
    attention_kwargs: dict[str, Any] | None = None  # "scale": of the LoRA adapters
    max_sequence_length: int | None = None  # tokens of a prompt; None: the text encoder's own limit
    seed: int | Sequence[int] | None = None  # one per video, or the first's: the next has the next; None: drawn
    frame_rate: float | None = None     # frames per second; None: the transformer's
    scheduler: Any = None               # diffusers' or a name, see `schedulers`; None: the pipeline's
    memory: MemoryOptions = AUTO        # what decoding may take

    def schedules(self) -> list[PromptSchedule]:
        """The prompt schedule of every video; of given embeddings, as many empty ones."""
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise UserError("give either prompt or prompt_embeds")
        if self.num_videos_per_prompt < 1:
            raise UserError(f"num_videos_per_prompt must be at least 1, got {self.num_videos_per_prompt}")
        prompts: Sequence[PromptSchedule]
        if self.prompt is not None:
            prompts = as_list(self.prompt)
        else:
            prompts = [((0.0, ""),)] * (0 if self.prompt_embeds is None else len(self.prompt_embeds))
        return [prompt for prompt in prompts for _ in range(self.num_videos_per_prompt)]

    def negative_prompts(self, count: int) -> list[str]:
        """One for all videos, or one for each of `count`."""
        given = self.negative_prompt or ""
        if isinstance(given, str):
            return [given]
        prompts = [prompt for prompt in given for _ in range(self.num_videos_per_prompt)]
        if len(prompts) != count:
            raise UserError(
                f"{len(given)} negative prompts for {count // self.num_videos_per_prompt} prompts; give one "
                f"per prompt, or one for all"
            )
        return prompts

    def seeds(self, count: int) -> list[int]:
        """One per video: those given, or drawn from the generators, or from torch's own."""
        if self.generator is not None and self.seed is not None:
            raise UserError("give either seed or generator")
        many = self.seed if isinstance(self.seed, Sequence) else self.generator
        if isinstance(many, Sequence) and len(many) != count:
            raise UserError(f"{len(many)} {'seeds' if many is self.seed else 'generators'} for {count} videos; give "
                            "one per video")
        if isinstance(self.seed, int):
            return [self.seed + i for i in range(count)]
        if self.seed is not None:
            return list(self.seed)
        generators = self.generator if isinstance(self.generator, Sequence) else [self.generator] * count
        return [int(torch.randint(2**62, (), generator=one, device=one.device if one else "cpu"))
                for one in generators]

    def check(self) -> None:
        """Raise UserError for what no model could take; the pipeline's `check_inputs` checks the rest."""
        if unknown := set(self.callback_on_step_end_tensor_inputs) - set(CALLBACK_TENSORS):
            raise UserError(f"callback_on_step_end_tensor_inputs: there is no {', '.join(sorted(unknown))}; choose "
                            f"from {', '.join(CALLBACK_TENSORS)}")
        for name in "prompt", "negative_prompt":
            embeds, mask = getattr(self, f"{name}_embeds"), getattr(self, f"{name}_embeds_mask")
            if mask is not None and (embeds is None or mask.shape != embeds.shape[:2]):
                raise UserError(f"{name}_embeds_mask must be (B, M), as {name}_embeds are (B, M, D)")
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise UserError("give either negative_prompt or negative_prompt_embeds")


@dataclass(frozen=True, kw_only=True)
class RolloutInputs(SamplingInputs):
    """The arguments of `LVDMPipeline`."""

    image: Any = None                   # the first frame: PIL, or an array or tensor, see `to_frames`
    video: Any = None                   # 1 + 4k frames to continue
    video_latents: Tensor | None = None  # (B or 1, c, t, h, w) normalized latents to continue
    shift: float | None = None          # > 1: more of the steps near noise; None: by size, `flow.resolution_shift`
    guidance_rescale: float = GUIDANCE_RESCALE  # share of the contrast added by guidance that is removed again
    history_groups: int = HISTORY_GROUPS  # past groups of latents that a group attends to
    history_noise: float = HISTORY_NOISE  # noise level of that history
    history_follow: float = 0.0         # share of a group's own noise level that the history has, if that is more
    sink_period: int = 0                # groups after which a later latent takes the first one's place; 0: never

    def context(self) -> np.ndarray | None:
        """The frames to continue, uint8 (T, H, W, 3), of which an image is one; scaled and cropped to `height` and
        `width` where both are given."""
        if sum(value is not None for value in (self.image, self.video, self.video_latents)) > 1:
            raise UserError("give only one of image, video and video_latents to continue from")
        given = self.video if self.image is None else self.image
        if given is None:
            return None
        frames = to_frames(given)
        if self.image is not None and len(frames) > 1:
            raise UserError(f"image holds {len(frames)} frames; give them as video")
        if self.height and self.width and frames.shape[1:3] != (self.height, self.width):
            frames = resize_crop(frames, self.height, self.width)
        return frames


def to_frames(given: Any) -> np.ndarray:
    """Convert an image or a video to uint8 (T, H, W, 3).

    Args:
        given: a PIL image, or a list of them; an array (H, W, 3) or (T, H, W, 3); a tensor (3, H, W) or (T, 3, H, W).
            Integers are uint8, floats lie in [0, 1], as in diffusers.
    """
    if isinstance(given, list | tuple):
        parts = [to_frames(part) for part in given]
        if len({part.shape[1:] for part in parts}) != 1:
            raise UserError("the frames of a video must be of one size, and at least one")
        return np.concatenate(parts)
    if isinstance(given, Image.Image):
        return np.asarray(given.convert("RGB"))[None]
    if isinstance(given, Tensor):
        if given.ndim not in (3, 4) or given.shape[-3] != 3:
            raise UserError(f"a tensor must be (3, H, W) or (T, 3, H, W), got {tuple(given.shape)}")
        given = given.detach().cpu().float().movedim(-3, -1).numpy() if given.is_floating_point() else \
            given.cpu().movedim(-3, -1).numpy()
    given = np.asarray(given)
    if given.ndim == 3:
        given = given[None]
    if given.ndim != 4 or given.shape[3] != 3 or not given.size:
        raise UserError(f"an image must be (H, W, 3) and a video (T, H, W, 3), got {given.shape}")
    if given.dtype == np.uint8:
        return np.ascontiguousarray(given)
    if given.dtype.kind != "f" or not (given.min() >= 0 and given.max() <= 1):
        raise UserError(f"pixels must be uint8, or floats in [0, 1]; got {given.dtype} from {given.min()} to "
                        f"{given.max()}")
    return np.rint(given.astype(np.float32) * 255).astype(np.uint8)


def output_size(vae: AutoencoderKLODVAE, transformer: LVDMTransformer3DModel, height: int | None, width: int | None,
                context: np.ndarray | None, video_latents: Tensor | None) -> tuple[int, int]:
    """Pixels of the result: those requested, else those of what it continues, else the transformer's own."""
    sides = [transformer.config.sample_height, transformer.config.sample_width]
    if context is not None:
        sides = list(context.shape[1:3])
    elif video_latents is not None:
        sides = [vae.spatial_compression_ratio * side for side in video_latents.shape[-2:]]
    fixed = context is not None or video_latents is not None
    for i, (name, requested) in enumerate((("height", height), ("width", width))):
        if requested is not None and fixed and requested != sides[i]:
            raise UserError(f"{name}={requested} was requested, but the video to continue has {sides[i]}; "
                            "resize it first (odvae.data.transforms.resize_crop)")
        sides[i] = sides[i] if requested is None else requested
    check_size(vae, transformer, *sides)
    return sides[0], sides[1]


def check_size(vae: AutoencoderKLODVAE, transformer: LVDMTransformer3DModel, height: int, width: int) -> None:
    """Sides are multiples of a token's side in pixels."""
    check_multiples(vae.spatial_compression_ratio * transformer.config.patch_size, height, width)


def check_multiples(multiple: int, height: int, width: int) -> None:
    """Sides are multiples of so many pixels."""
    if height < multiple or width < multiple or height % multiple or width % multiple:
        near = [max(multiple, multiple * round(side / multiple)) for side in (height, width)]
        raise UserError(f"{height}x{width} pixels: sides must be multiples of {multiple}; "
                        f"the nearest is {near[0]}x{near[1]}")


def latent_lengths(vae: AutoencoderKLODVAE, num_frames: int, context: np.ndarray | None,
                   video_latents: Tensor | None) -> tuple[int, int]:
    """Latent frames of the whole result, and of what it continues."""
    total, given = vae.latent_frames(num_frames), 0
    if video_latents is not None:
        given = video_latents.shape[2]
    elif context is not None:
        given = vae.latent_frames(len(context))
    if total <= given:
        ratio = vae.temporal_compression_ratio
        raise UserError(f"num_frames={num_frames} is the length of the whole result and must exceed the "
                        f"{1 + ratio * (given - 1)} frames it continues; the next is {1 + ratio * given}")
    return total, given
