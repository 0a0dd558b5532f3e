"""Check the arguments of `lvdm generate` and build the requests for its videos. Slow imports wait."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odvae.utils.errors import UserError

from ..adapter_files import LoraFile, check_adapters
from ..capabilities import pipeline_kind, read_capabilities

if TYPE_CHECKING:
    from ..sampling.loading import AnyPipeline
    from .requests import GenerationRequest

Arguments = argparse.Namespace
NO_OPTION = ("prompt", "sections", "source")  # parameters that have no option of their own


def check_supported(args: Arguments) -> None:
    """Raise UserError if the pipeline cannot do what is requested, or an adapter does not fit it; nothing is loaded."""
    sources = [name for name, given in (("image", args.image), ("video", args.video or args.continued)) if given]
    from ..sampling import params

    params.check_supported(pipeline_kind(args.pipeline), _options(args), *sources,
                           able=read_capabilities(args.pipeline))
    if args.compile and args.offload == "sequential":
        raise UserError("--compile with --offload sequential: layers whose weights come one by one cannot be compiled; "
                        "give --offload model, or leave out --compile")
    check_adapters([LoraFile.parse(lora) for lora in args.lora], args.pipeline)


def _options(args: Arguments) -> dict[str, Any]:
    """The parameters that are given as options."""
    from ..sampling.params import VideoFileParams

    return {name: value for name in VideoFileParams.model_fields if name not in NO_OPTION
            and (value := getattr(args, name)) is not None}


def check_source(args: Arguments) -> None:
    """Raise UserError if --image or --video is not a file of that kind."""
    from odvae.data.files import is_image
    from odvae.data.video.image import is_animated

    path = args.image or args.video
    if path is None:
        return
    if not path.is_file():
        raise UserError(f"{'--image' if args.image else '--video'} {path}: "
                        f"{'that is a folder' if path.is_dir() else 'there is no such file'}")
    photo = is_image(path) and not is_animated(path)
    if args.image and not photo:
        raise UserError(f"--image {path}: not a readable photo; give a PNG, JPEG, WebP or BMP, or a video to continue "
                        "with --video")
    if args.video and photo:
        raise UserError(f"--video {path}: that is a photo; give it with --image")


def load_requests(args: Arguments) -> tuple[AnyPipeline, list[GenerationRequest]]:
    """Load the pipeline of the command line with its adapters, and build the requests."""
    from odvae.trainer.distributed import best_device
    from odvae.utils.precision import dtype_of, use_precision

    from ..sampling.loading import attach_decoder, load_pipeline
    from ..sampling.lora import load_adapters

    dtype = dtype_of(use_precision(args.dtype, best_device(), "the pipeline"))
    pipeline = load_pipeline(args.pipeline, to_device=args.offload is None, dtype=dtype)
    load_adapters(pipeline, [LoraFile.parse(lora) for lora in args.lora])
    if args.decoder is not None:
        attach_decoder(pipeline, args.decoder)
    requests = requests_of(args, pipeline)
    if args.compile and not args.dry_run:
        from odvae.model.autoencoder import AutoencoderKLODVAE
        from odvae.model.compilation import compile_vae

        from ..model.compilation import compile_transformer

        compile_transformer(pipeline.transformer)
        if isinstance(pipeline.vae, AutoencoderKLODVAE):
            compile_vae(pipeline.vae)
    return pipeline, requests


def sheet_path(args: Arguments, requests: Sequence[GenerationRequest]) -> Path | None:
    """Return the contact sheet's file; None for a continued video."""
    return None if args.continued else requests[0].target.with_name("contact_sheet.png")


def requests_of(args: Arguments, pipeline: AnyPipeline) -> list[GenerationRequest]:
    """Build the requests of the command line."""
    from odvae.utils.config import override

    from ..sampling.params import VideoFileParams, read_prompts
    from .requests import build_requests, continuation, describe_file, load_context_frames

    options = _options(args)
    if args.continued:
        changes = options | ({"prompt": args.prompts[0]} if args.prompts else {})
        return [continuation(pipeline, args.continued, changes, args.out)]
    base = override(VideoFileParams(), options, "the command line")
    out, context_latents = args.out or Path("outputs/generate"), None
    source = args.image or args.video
    if source is not None:
        context_latents = pipeline.encode_video(load_context_frames(pipeline, source, base))
        base = base.model_copy(update={"source": describe_file(source)})
    if args.prompt_file:
        return build_requests(out, read_prompts(args.prompt_file, base), context_latents)
    if not args.prompts:
        raise UserError("give a prompt, or --prompts FILE; \"\" is a prompt")
    params = [base.model_copy(update={"prompt": prompt, "seed": base.seed + i}) for i, prompt in
              enumerate(args.prompts)]
    return build_requests(out, params, context_latents)


def dry_run(pipeline: AnyPipeline, requests: Sequence[GenerationRequest], batch: int) -> list[str]:
    """Describe what would be generated, and the memory it would take."""
    from .requests import with_model_defaults

    lines: list[str] = []
    counts: dict[tuple[int, int], int] = {}
    for request in requests:
        params = with_model_defaults(request.settings, pipeline)
        assert params.height and params.width
        lines.append(
            f"{request.target}: {params.num_frames} frames, {params.length / (params.frame_rate or 1):.1f} s, "
            f"{params.height}x{params.width}"
        )
        counts[params.height, params.width] = counts.get((params.height, params.width), 0) + 1
    for (height, width), count in counts.items():
        size = min(batch, count)
        lines.append(f"memory for a batch of {size} x {height}x{width}: {pipeline.requirements(height, width, size)}")
    return lines
