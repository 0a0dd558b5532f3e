"""The models of the worker: loaded when first needed, and moved or offloaded when memory runs out."""

from __future__ import annotations

import errno
import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.inference.latent_preview import fit_color_matrix
from app.storage.store import JobStore
from lvdm.adapter_files import LoraFile, lora_modified
from lvdm.generation.fingerprints import fingerprints
from lvdm.sampling.diffusers_adapter import DiffusersAdapter
from lvdm.sampling.loading import AnyPipeline, load_pipeline
from lvdm.sampling.lora import load_adapters, set_weights, unload_adapters
from odvae.inference.fingerprint import vae_fingerprint
from odvae.inference.memory import AUTO, MemoryOptions
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.trainer.distributed import best_device
from odvae.utils.devices import empty_cache
from odvae.utils.errors import NonFiniteError, UserError
from odvae.utils.precision import dtype_of, set_precision, use_precision
from odvae.weights import NATURAL_VAE

logger = logging.getLogger(__name__)

MIN_TILE = 64  # pixels a side
MAX_TIMINGS = 9  # measurements that are stored for each model

Load = Callable[[Path | None], AnyPipeline]


@dataclass(frozen=True)
class MemoryFallback:
    """A configuration that needs less memory than the one before it. The first is the requested one."""

    effect: str  # "continued ..."
    helps: frozenset[str] = frozenset()  # stages that need less memory: sampling, decoding
    memory: MemoryOptions = AUTO  # for decoding
    offload: str = "none"  # none | model | sequential
    decode_on_cpu: bool = False


class ModelManager:
    """Loads pipelines and VAEs, one at a time, with the options in the store."""

    def __init__(self, store: JobStore, load: Load | None = None) -> None:
        self._store = store
        self._load = load or (lambda folder: load_pipeline(folder, to_device=False, dtype=self.dtype))
        self._key: tuple[Any, ...] | None = None
        self._model: Any = None
        self._vae_fingerprint = ""
        self._placement = ""  # device, dtype and offload of the model
        self._color_matrix: Tensor | None = None
        self._loaded_parts: dict[str, str] = {}  # without adapters
        self._parts: dict[str, str] = {}
        self._adapters: tuple[tuple[LoraFile, int], ...] = ()  # with the times of their files

    @property
    def options(self) -> dict[str, Any]:
        """The options for all jobs: device, precision, offload, tile, pipeline."""
        return dict(self._store.get_value("options") or {})

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.options.get("device") == "cpu" else best_device()

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(use_precision(self.options.get("precision", "auto"), self.device))

    def pipeline(self, folder: Path | None, adapters: Sequence[LoraFile] = ()) -> AnyPipeline:
        """Return the pipeline of a folder (None: the shipped one) with these adapters and no others. A failed load is
        tried again at the next call."""
        modified = (folder / "model_index.json").stat().st_mtime_ns if folder is not None else 0

        def load() -> AnyPipeline:
            pipeline = self._load(folder)
            self._cast(pipeline)
            self._loaded_parts = self._parts = fingerprints(pipeline)  # now: offloaded weights cannot be read
            grid, need = pipeline.grid, pipeline.requirements()
            self._store.set_value(f"memory {folder or ''}", {
                "weights": sum(need.weights.values()), "history": need.history, "decoding": need.decoding,
                "pixels": grid.height * grid.width})
            return pipeline

        pipeline: AnyPipeline = self._load_cached(("pipeline", str(folder), modified), load)
        self._adapt(pipeline, tuple((file, lora_modified(file.path)) for file in adapters))
        return pipeline

    def _adapt(self, pipeline: AnyPipeline, adapters: tuple[tuple[LoraFile, int], ...]) -> None:
        """Exchange the adapters; the pipeline stays loaded."""
        if adapters == self._adapters:
            return
        files = [file for file, _ in adapters]
        same = [(file.path, file.name, time) for file, time in adapters] \
            == [(file.path, file.name, time) for file, time in self._adapters]
        try:
            pipeline.remove_all_hooks()  # offloaded weights cannot be read; `place` offloads them again
            self._placement = ""
            if same:
                set_weights(pipeline, files)
            else:
                unload_adapters(pipeline)
                load_adapters(pipeline, files)
            self._parts = fingerprints(pipeline, self._loaded_parts) if files else self._loaded_parts
        except BaseException:
            self.unload()  # it may have some of them
            raise
        self._adapters = adapters

    def _cast(self, pipeline: AnyPipeline) -> None:
        """Give a pipeline the precision of the options; one of diffusers is loaded in its own."""
        if not isinstance(pipeline, DiffusersAdapter) and {pipeline.transformer.dtype, pipeline.vae.dtype} != {
                self.dtype}:
            pipeline.to(self.dtype)

    def parts(self) -> dict[str, str]:
        """Return the fingerprints of the pipeline's parts, see `lvdm.generation.latent_store`, and the precision."""
        precision = str(self.dtype).removeprefix("torch.")
        return dict(self._parts) if precision == "float32" else {**self._parts, "precision": precision}

    def vae(self, folder: Path | None) -> AutoencoderKLODVAE:
        """Return an OD-VAE on the device; None: the shipped one for natural footage."""

        def load() -> AutoencoderKLODVAE:
            from odvae.inference.reconstruct import load_video_vae

            model = load_video_vae(folder or NATURAL_VAE).to(self.device)
            self._vae_fingerprint = vae_fingerprint(model)  # of float32: whatever computes, it is the same VAE
            set_precision(model, self.options.get("precision", "auto"))
            return model

        return self._load_cached(("vae", str(folder)), load).to(self.device)

    def vae_fingerprint(self, folder: Path | None) -> str:
        """Return the fingerprint of the VAE in a folder, as for `vae`."""
        self.vae(folder)
        return self._vae_fingerprint

    def _load_cached(self, key: tuple[Any, ...], load: Callable[[], Any]) -> Any:
        key = (*key, str(self.device), str(self.dtype))
        if key != self._key:
            self.unload()
            self._model = load()
            self._key = key
            logger.info("loaded %s", " ".join(map(str, key)))
        return self._model

    # ---- memory ----

    def memory_fallbacks(self, height: int, width: int, tile: int | None = None) -> list[MemoryFallback]:
        """Return the requested configuration and its fallbacks, down to the least memory, for a video of this size.

        Args:
            tile: side of the decoding tiles in pixels; None: as in the options, or to fit the memory.
        """
        gpu = self.device.type != "cpu"
        tile, offload = tile or self.options.get("tile"), self.options.get("offload", "none") if gpu else "none"
        requested = MemoryOptions(tile=(tile, tile)) if tile else AUTO
        fallbacks = [MemoryFallback("as requested", memory=requested, offload=offload)]
        side = min(height, width, tile or max(height, width)) // 2
        smaller = requested
        if side >= MIN_TILE:
            side = side // MIN_TILE * MIN_TILE
            smaller = MemoryOptions(tile=(side, side))
            fallbacks.append(
                MemoryFallback(f"with decoding in tiles of {side}x{side} pixels", frozenset({"decoding"}), smaller,
                               offload)
            )
        if not gpu:
            return fallbacks
        if offload == "none":
            fallbacks.append(MemoryFallback("with each model on the accelerator only while it runs",
                              frozenset({"sampling", "decoding"}), smaller, "model"))
        decoding, by_block = frozenset({"decoding"}), "with one block of the model on the accelerator at a time"
        if offload != "sequential":
            fallbacks += [MemoryFallback("with decoding on the CPU", decoding, smaller, "model", True),
                          MemoryFallback(by_block, frozenset({"sampling"}), smaller, "sequential")]
        last = "with decoding on the CPU" if offload == "sequential" else f"{by_block}, and decoding on the CPU"
        fallbacks.append(MemoryFallback(last, decoding, smaller, "sequential", True))
        return fallbacks

    def place(self, pipeline: AnyPipeline, fallback: MemoryFallback) -> None:
        """Move the weights to the devices of a fallback."""
        placement = f"{self.device} {self.dtype} {fallback.offload} {fallback.decode_on_cpu}"
        if placement == self._placement:
            return
        if fallback.offload != "none" or "none" not in self._placement:
            pipeline.remove_all_hooks()
        self._cast(pipeline)
        pipeline.decode_on_cpu = fallback.decode_on_cpu
        if fallback.offload == "none":
            pipeline.to(self.device)
        elif fallback.offload == "model":
            pipeline.enable_model_cpu_offload(device=self.device)
        else:
            pipeline.enable_sequential_cpu_offload(device=self.device)
        self._placement = placement

    def free_memory(self) -> None:
        """Free the memory that a failure has left."""
        gc.collect()
        empty_cache()

    def unload(self) -> None:
        """Unload the model."""
        self._model = self._key = self._color_matrix = None
        self._placement, self._adapters = "", ()
        self.free_memory()

    # ---- previews and estimates ----

    def color_matrix(self, pipeline: AnyPipeline) -> Tensor:
        """Return the matrix from the pipeline's latents to colors, see `latent_preview`."""
        if self._color_matrix is None:
            self._color_matrix = fit_color_matrix(pipeline.vae)
        return self._color_matrix

    def measure(self, folder: Path | None, params: dict[str, Any], step: list[float], decode: list[float], *,
                guided: bool) -> None:
        """Store the median times of a video, for `estimate`; `guided`: a step evaluates the model twice."""
        if not step:
            return
        name = f"measured {folder or ''}"
        timing = {"device": f"{self.device} {self.dtype}", "pixels": params["height"] * params["width"],
                  "frames": params["num_frames"],
                  "guided": guided, "step": sorted(step)[len(step) // 2],
                  "decode": sorted(decode)[len(decode) // 2] if decode else 0.0}
        self._store.set_value(name, [*(self._store.get_value(name) or []), timing][-MAX_TIMINGS:])


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return (isinstance(error, MemoryError | torch.OutOfMemoryError)
            or "out of memory" in text or "can't allocate memory" in text)


def explain(error: BaseException) -> tuple[str, str]:
    """Return what went wrong and what to do, for the user."""
    text = str(error).strip()
    if is_out_of_memory(error):
        return "The machine ran out of memory.", ("Choose a smaller size, or offload or smaller tiles in the "
                                                  "settings, or close other programs, then retry: the job resumes "
                                                  "from its finished part.")
    if isinstance(error, UserError):
        return text, ""
    if isinstance(error, NonFiniteError):
        return f"{text[:1].upper()}{text[1:]}.", "The video is discarded."
    # safetensors wraps system errors in its own type: only the text is left
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return "The disk is full.", "Delete videos from the history or free space elsewhere, then retry this one."
    if isinstance(error, ImportError):
        return f"A package is missing: {text}", "Install the project again, then restart the app."
    return f"{type(error).__name__}: {text}".removesuffix(": "), "Try again; the job's log has the details."
