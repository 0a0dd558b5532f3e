"""What exists already of the videos that are asked for, and which of them are rendered together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from odvae.data.video.reader import VideoReader
from odvae.utils.errors import UserError
from odvae.utils.files import fingerprint

from ..sampling.params import VideoFileParams
from ..sampling.pipeline import LVDMPipeline
from .drift import Drift
from .latent_store import LatentChunks, LatentMetadata, made_with, read_latent_metadata, read_latents, read_made_by
from .render import VideoOutput
from .requests import GenerationRequest, with_model_defaults

COLUMNS = 11  # frames of a video in a contact sheet


class PendingVideo:
    """A request, what of its video exists already, and what is collected while it is rendered.

    Attributes:
        complete: all latents are stored, so they are only decoded.
        finished: so is the video, made from the same.
    """

    def __init__(self, request: GenerationRequest, metadata: LatentMetadata, overwrite: bool) -> None:
        self.request, self.metadata = request, metadata
        self._chunks: LatentChunks | None = None
        self._thumbnails: dict[int, np.ndarray] = {}
        stored = None if overwrite else read_latent_metadata(request.latents)
        self.complete = stored is not None and request.latents.is_file()
        if overwrite:
            LatentChunks.remove_of(request.latents)
        elif stored is None and request.target.exists():
            raise UserError(f"{request.target} is there already, without latents that it could be compared by; choose "
                            "another --out, or --overwrite it")
        elif stored is not None and (different := metadata.differences(stored)):
            raise UserError(f"{request.target} is there already, made otherwise ({'; '.join(different)}); choose "
                            "another --out, or --overwrite it")
        self.finished = (self.complete and request.target.is_file()
                         and read_made_by(request.target) == metadata.fingerprint)
        if self.complete:
            read_latents(request.latents)  # raises where they cannot be used: a finished video of them is no good then
        if self.finished:
            LatentChunks.remove_of(request.latents)

    def open(self, write: Callable[[np.ndarray], object], drift: Drift | None) -> VideoOutput:
        """Begin to render it, or resume. `write` takes the frames."""
        written = 0

        def write_and_sample(frames: np.ndarray) -> None:
            nonlocal written
            write(frames)
            self._sample_thumbnails(frames, written)
            written += len(frames)

        if self.complete:
            return VideoOutput(self.metadata, write_and_sample, complete=read_latents(self.request.latents)[1],
                               drift=drift)
        self._chunks = LatentChunks(self.request.latents, self.metadata, self.request.context_latents)
        return VideoOutput(self.metadata, write_and_sample, self._chunks, drift=drift)

    def discard(self, *, everything: bool = False) -> None:
        """Delete the stored groups where none was generated, or with `everything`."""
        if self._chunks is not None and (everything or self._chunks.length <= self.request.length):
            self._chunks.remove()

    def _sample_thumbnails(self, frames: np.ndarray, first: int) -> None:
        """Keep those of the frames, of which `first` is the number of the first, that the contact sheet shows."""
        numbers = np.linspace(0, self.metadata.settings.frames - 1, COLUMNS).round().astype(int)
        self._thumbnails |= {i: frames[i - first].copy() for i in numbers if first <= i < first + len(frames)}

    def thumbnails(self) -> np.ndarray:
        """Some frames (t, H, W, 3), evenly spaced; of a video that was finished before, read from its file."""
        if not self._thumbnails:
            first, scale = 0, self.metadata.settings.scale
            with VideoReader(self.request.target) as video:
                for frames in video.iter_chunks():
                    self._sample_thumbnails(frames[:, ::scale, ::scale], first)
                    first += len(frames)
        return np.stack(list(self._thumbnails.values()))


def batches(videos: Sequence[PendingVideo], batch: int) -> Iterator[list[PendingVideo]]:
    """Videos that are rendered together, at most `batch`: those with the same parameters but for prompts and seed, that
    continue as many latents. Finished ones count too, so that a resumed command forms the same batches."""
    alike: dict[tuple[VideoFileParams, int], list[PendingVideo]] = {}
    for video in videos:
        alike.setdefault((video.metadata.settings.batch_key, video.request.length), []).append(video)
    for group in alike.values():
        for first in range(0, len(group), batch):
            yield group[first:first + batch]


def build_metadata(pipeline: LVDMPipeline, request: GenerationRequest, parts: dict[str, str]) -> LatentMetadata:
    """What the request's latents will say of themselves. `parts`: the pipeline's `fingerprints`."""
    settings, given = with_model_defaults(request.settings, pipeline), request.length - request.generated_latents
    if given and request.context_latents is not None and not settings.source:  # latents that came without a file
        content = fingerprint({"latents": request.context_latents[0, :, :given].float()}, {})
        settings = settings.model_copy(update={"source": f"latents {content}"})
    if settings.scheduler is not None:
        parts = parts | {"scheduler": settings.scheduler}
    return LatentMetadata(settings=settings, given=given, latents=pipeline.vae.latent_frames(settings.frames),
                          parts=parts, made_with=made_with())
