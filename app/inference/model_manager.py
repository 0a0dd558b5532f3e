"""The models behind the queue, in the worker: loaded when first needed, and what to do when memory runs out."""

from __future__ import annotations

import errno
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.inference.latent_preview import colour_matrix
from app.storage.store import JobStore
from lvdm.generation.latent_store import fingerprints
from lvdm.sampling.loading import load_pipeline
from lvdm.sampling.pipeline import LVDMPipeline
from odvae.inference.memory import AUTO, MemoryOptions
from odvae.model.autoencoder import AutoencoderKLODVAE
from odvae.trainer.distributed import best_device
from odvae.utils.errors import NonFiniteError, UserError
from odvae.utils.precision import compute_dtype
from odvae.weights import NATURAL_VAE

logger = logging.getLogger(__name__)

LEAST_TILE = 64  # pixels a side
MEASURED = 9  # figures of this machine that are kept of a model

Load = Callable[[Path | None], LVDMPipeline]


@dataclass(frozen=True)
class MemoryFallback:
    """A way to do with less memory. The first is what was wished for; each helps where the one before ran out."""

    effect: str  # "it went on ..."
    helps: frozenset[str] = frozenset()  # of sampling, decoding
    memory: MemoryOptions = AUTO  # of decoding
    offload: str = "none"  # none | model | sequential
    decode_on_cpu: bool = False


class ModelManager:
    """Loads pipelines and VAEs, one at a time, with the options that are set in the store."""

    def __init__(self, store: JobStore, load: Load | None = None) -> None:
        self._store = store
        self._load = load or (lambda folder: load_pipeline(folder, to_device=False))
        self._key: tuple[Any, ...] | None = None
        self._model: Any = None
        self._placed = ""  # the offload that the model is under
        self._matrix: Tensor | None = None
        self._parts: dict[str, str] = {}

    @property
    def options(self) -> dict[str, Any]:
        """What was set for all jobs: device, precision, offload, tile, pipeline."""
        return dict(self._store.get_value("options") or {})

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.options.get("device") == "cpu" else best_device()

    @property
    def dtype(self) -> torch.dtype:
        wished = torch.bfloat16 if self.options.get("precision") == "bfloat16" else torch.float32
        return compute_dtype(wished, self.device)

    def pipeline(self, folder: Path | None) -> LVDMPipeline:
        """The pipeline of a folder (None: the one that ships), on the device. Whatever goes wrong is raised, and tried
        again at the next call."""
        changed = (folder / "model_index.json").stat().st_mtime_ns if folder is not None else 0

        def load() -> LVDMPipeline:
            pipeline = self._load(folder)
            self._parts = fingerprints(pipeline)  # now: offloaded weights cannot be read
            config, need = pipeline.transformer.config, pipeline.requirements()
            self._store.set_value(f"memory {folder or ''}", {
                "weights": sum(need.weights.values()), "history": need.history, "decoding": need.decoding,
                "pixels": config.sample_height * config.sample_width})
            return pipeline

        return self._load_cached(("pipeline", str(folder), changed), load)

    def parts(self) -> dict[str, str]:
        """Fingerprints of the loaded pipeline's parts, see `lvdm.generation.latent_store`, and the precision."""
        precision = str(self.dtype).removeprefix("torch.")
        return dict(self._parts) if precision == "float32" else {**self._parts, "precision": precision}

    def vae(self, folder: Path | None) -> AutoencoderKLODVAE:
        """An OD-VAE by itself; None: the one for natural footage that ships."""

        def load() -> AutoencoderKLODVAE:
            from odvae.inference.reconstruct import load_video_vae

            return load_video_vae(folder or NATURAL_VAE)

        return self._load_cached(("vae", str(folder)), load).to(self.device)

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
        """From what is wished for down to the least memory, for a video of so many pixels.

        Args:
            tile: pixels a side to decode in; None: as the options say, or as fits the memory.
        """
        gpu = self.device.type != "cpu"
        tile, offload = tile or self.options.get("tile"), self.options.get("offload", "none") if gpu else "none"
        wished = MemoryOptions(tile=(tile, tile)) if tile else AUTO
        rungs = [MemoryFallback("as wished", memory=wished, offload=offload)]
        side = min(height, width, tile or max(height, width)) // 2
        smaller = wished
        if side >= LEAST_TILE:
            side = side // LEAST_TILE * LEAST_TILE
            smaller = MemoryOptions(tile=(side, side))
            rungs.append(
                MemoryFallback(f"decoding in tiles of {side}x{side} pixels", frozenset({"decoding"}), smaller, offload)
            )
        if not gpu:
            return rungs
        if offload == "none":
            rungs.append(MemoryFallback("with each model on the accelerator only while it works",
                              frozenset({"sampling", "decoding"}), smaller, "model"))
        rungs.append(MemoryFallback("decoding on the CPU", frozenset({"decoding"}), smaller, "model", True))
        if offload != "sequential":
            rungs.append(
                MemoryFallback(
                    "with one block of the model on the accelerator at a time",
                    frozenset({"sampling"}),
                    smaller,
                    "sequential",
                )
            )
        return rungs

    def place(self, pipeline: LVDMPipeline, rung: MemoryFallback) -> None:
        """Bring the weights to where the rung wants them."""
        wanted = f"{self.device} {self.dtype} {rung.offload} {rung.decode_on_cpu}"
        if wanted == self._placed:
            return
        if rung.offload != "none" or "none" not in self._placed:
            pipeline.remove_all_hooks()
        if {pipeline.transformer.dtype, pipeline.vae.dtype} != {self.dtype}:
            pipeline.to(self.dtype)
        if rung.offload == "none":
            pipeline.to(self.device)
        elif rung.offload == "model":
            pipeline.enable_model_cpu_offload(device=self.device)
        else:
            pipeline.enable_sequential_cpu_offload(device=self.device)
        if rung.decode_on_cpu:
            pipeline.vae.to("cpu", compute_dtype(self.dtype, "cpu"))
        self._placed = wanted

    def free_memory(self) -> None:
        """After a failure: give back what it left behind."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def unload(self) -> None:
        """Let every model go."""
        self._model = self._key = self._matrix = None
        self._placed = ""
        self.free_memory()

    # ---- what the page wants to know ----

    def colours(self, pipeline: LVDMPipeline) -> Tensor:
        """How the pipeline's latents look, see `preview`."""
        if self._matrix is None:
            self._matrix = colour_matrix(pipeline.vae)
        return self._matrix

    def measure(self, folder: Path | None, params: dict[str, Any], step: list[float], decode: list[float]) -> None:
        """Note what a video took here, for the estimates of those to come, see `estimate`."""
        if not step:
            return
        name = f"measured {folder or ''}"
        one = {"device": f"{self.device} {self.dtype}", "pixels": params["height"] * params["width"],
               "guided": params["guidance_scale"] != 1, "step": sorted(step)[len(step) // 2],
               "decode": sorted(decode)[len(decode) // 2] if decode else 0.0}
        self._store.set_value(name, [*(self._store.get_value(name) or []), one][-MEASURED:])


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return (isinstance(error, MemoryError | torch.OutOfMemoryError)
            or "out of memory" in text or "can't allocate memory" in text)


def explain(error: BaseException) -> tuple[str, str]:
    """What went wrong and what to do about it, for the one who asked."""
    text = str(error).strip()
    if is_out_of_memory(error):
        return "The machine ran out of memory.", ("Ask for a smaller size, choose offload or smaller tiles in the "
                                                  "settings, or close other programs; then retry: what is kept of it "
                                                  "is not made again.")
    if isinstance(error, UserError):
        return text, ""
    if isinstance(error, NonFiniteError):
        return f"{text[:1].upper()}{text[1:]}.", "Nothing of the video is kept."
    # safetensors wraps the system's error into a type of its own: only the text tells
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return "The disk is full.", "Delete videos from the history or free space elsewhere, then retry this one."
    if isinstance(error, ImportError):
        return f"A part of the program is missing: {text}", "Install the project again, then restart the app."
    return f"{type(error).__name__}: {text}".removesuffix(": "), "Try again; the job's log has the details."
