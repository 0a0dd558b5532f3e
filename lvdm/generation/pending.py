"""What is there already of the videos that are to be made, and which of them are made together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from odvae.data.video.reader import VideoReader
from odvae.utils.errors import UserError
from odvae.utils.files import fingerprint

from ..sampling.params import VideoFileParams
from ..sampling.pipeline import LVDMPipeline
from .latent_store import LatentChunks, LatentMetadata, made_with, read_latent_metadata, read_latents, read_made_by
from .requests import GenerationRequest, with_model_defaults

COLUMNS = 11  # frames of a video in a contact sheet


class PendingVideo:
    """A job, what of it is there already, and what is gathered while it is made."""

    def __init__(self, job: GenerationRequest, about: LatentMetadata, overwrite: bool) -> None:
        self.job, self.about = job, about
        self.parts: LatentChunks | None = None
        self._glimpses: dict[int, np.ndarray] = {}
        there = None if overwrite else read_latent_metadata(job.latents)
        self.complete = there is not None and job.latents.is_file()
        if overwrite:
            LatentChunks.remove_of(job.latents)
        elif there is None and job.target.exists():
            raise UserError(f"{job.target} is there already, without latents that it could be compared by; choose "
                            "another --out, or --overwrite it")
        elif there is not None and (different := about.differences(there)):
            raise UserError(
                f"{job.target} is there already, made otherwise ({'; '.join(different)}); choose another "
                "--out, or --overwrite it"
            )
        self.finished = self.complete and job.target.is_file() and read_made_by(job.target) == about.fingerprint
        if self.complete:
            read_latents(job.latents)  # raises where they cannot be used, so that a finished video of them is no good
        if self.finished:
            LatentChunks.remove_of(job.latents)

    def begin(self) -> Tensor | None:
        """(c, t, h, w), as far as it is made, or given."""
        if self.complete:
            return read_latents(self.job.latents)[1]
        self.parts = LatentChunks(self.job.latents, self.about)
        if self.parts.latents is None and self.job.context_latents is not None:
            self.parts.add(self.job.context_latents[0])
            return self.job.context_latents[0].float().cpu()
        return self.parts.latents

    def discard(self, *, everything: bool = False) -> None:
        """Leave nothing behind where no group was made, or of `everything` that was made."""
        if self.parts is not None and (everything or self.parts.length <= self.job.length):
            self.parts.remove()

    def thumbnail(self, frames: np.ndarray, first: int) -> None:
        wanted = np.linspace(0, self.about.settings.frames - 1, COLUMNS).round().astype(int)
        self._glimpses |= {i: frames[i - first].copy() for i in wanted if first <= i < first + len(frames)}

    def thumbnails(self) -> np.ndarray:
        """Some frames (t, H, W, 3), evenly spaced; of a video that was there, read from its file."""
        if not self._glimpses:
            first, scale = 0, self.about.settings.scale
            with VideoReader(self.job.target) as video:
                for piece in video.iter_chunks():
                    self.thumbnail(piece[:, ::scale, ::scale], first)
                    first += len(piece)
        return np.stack(list(self._glimpses.values()))


def batches(rows: Sequence[PendingVideo], batch: int) -> Iterator[list[PendingVideo]]:
    """Rows of the same settings but for prompts and seed, and from as many latents, at most `batch` together. Those
    that are finished count too, so that a command that goes on has the company that it had."""
    alike: dict[tuple[VideoFileParams, int], list[PendingVideo]] = {}
    for row in rows:
        alike.setdefault((row.about.settings.batch_key, row.job.length), []).append(row)
    for group in alike.values():
        for first in range(0, len(group), batch):
            yield group[first:first + batch]


def build_metadata(pipeline: LVDMPipeline, job: GenerationRequest, parts: dict[str, str]) -> LatentMetadata:
    settings, given = with_model_defaults(job.settings, pipeline), job.length - job.made
    if given and job.context_latents is not None and not settings.source:  # nobody told where these latents are from
        content = fingerprint({"latents": job.context_latents[0, :, :given].float()}, {})
        settings = settings.model_copy(update={"source": f"latents {content}"})
    if settings.scheduler is not None:
        parts = parts | {"scheduler": settings.scheduler}
    return LatentMetadata(settings=settings, given=given,
                 latents=pipeline.vae.latent_frames(settings.frames), parts=parts, made_with=made_with())

