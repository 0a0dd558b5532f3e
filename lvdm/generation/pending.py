"""What exists already of the requested videos, and which of them are rendered together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from odvae.data.video.reader import VideoReader
from odvae.utils.errors import UserError
from odvae.utils.files import fingerprint, remove_abandoned

from ..sampling.loading import AnyPipeline
from ..sampling.params import VideoFileParams
from .drift import Drift
from .latent_store import (
    LatentChunks,
    LatentMetadata,
    made_with,
    parts_folder,
    read_fingerprint,
    read_latent_metadata,
    read_latents,
)
from .render import VideoOutput
from .requests import GenerationRequest, with_model_defaults

COLUMNS = 11  # frames of a video in a contact sheet


class PendingVideo:
    """A request, what exists already of its video, and the thumbnails collected while it is rendered.

    Attributes:
        complete: all latents are stored and only have to be decoded.
        finished: the video exists too, generated from these latents.
    """

    def __init__(self, request: GenerationRequest, metadata: LatentMetadata, overwrite: bool) -> None:
        self.request, self.metadata = request, metadata
        self._chunks: LatentChunks | None = None
        self._thumbnails: dict[int, np.ndarray] = {}
        for path in (request.target, request.latents, parts_folder(request.latents)):
            remove_abandoned(path)
        stored = None if overwrite else read_latent_metadata(request.latents)
        self.complete = stored is not None and request.latents.is_file()
        if overwrite:
            LatentChunks.remove_of(request.latents)
        elif stored is None and request.target.exists():
            raise UserError(f"{request.target} already exists, but not its latents, which tell its settings; choose "
                            "another --out, or --overwrite it")
        elif stored is not None and (different := metadata.differences(stored)):
            raise UserError(f"{request.target} already exists with other settings ({'; '.join(different)}); choose "
                            "another --out, or --overwrite it")
        self.finished = (self.complete and request.target.is_file()
                         and read_fingerprint(request.target) == metadata.fingerprint)
        if self.complete:
            read_latents(request.latents)  # raises if they are unusable, as a finished video is then too
        if self.finished:
            LatentChunks.remove_of(request.latents)

    def open(self, write: Callable[[np.ndarray], object], drift: Drift | None) -> VideoOutput:
        """Start or resume rendering. `write` takes the frames."""
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
        """Delete the stored groups if none of them was generated, or with `everything`."""
        if self._chunks is not None and (everything or self._chunks.length <= self.request.context_length):
            self._chunks.remove()

    def _sample_thumbnails(self, frames: np.ndarray, first: int) -> None:
        """Keep the frames that the contact sheet shows; `first` is the index of the first one given."""
        indices = np.linspace(0, self.metadata.settings.length - 1, COLUMNS).round().astype(int)
        self._thumbnails |= {i: frames[i - first].copy() for i in indices if first <= i < first + len(frames)}

    def thumbnails(self) -> np.ndarray:
        """Return evenly spaced frames (t, H, W, 3); those of a video finished earlier are read from its file."""
        if not self._thumbnails:
            first, scale = 0, self.metadata.settings.scale
            with VideoReader(self.request.target) as video:
                for frames in video.iter_chunks():
                    self._sample_thumbnails(frames[:, ::scale, ::scale], first)
                    first += len(frames)
        return np.stack(list(self._thumbnails.values()))


def batches(videos: Sequence[PendingVideo], batch: int) -> Iterator[list[PendingVideo]]:
    """Group videos into batches of at most `batch`: those that differ only in prompts and seed and continue as many
    latents. Finished ones count too, so that a resumed command forms the same batches."""
    groups: dict[tuple[VideoFileParams, int], list[PendingVideo]] = {}
    for video in videos:
        groups.setdefault((video.metadata.settings.batch_key, video.request.context_length), []).append(video)
    for group in groups.values():
        for first in range(0, len(group), batch):
            yield group[first:first + batch]


def build_metadata(pipeline: AnyPipeline, request: GenerationRequest, parts: dict[str, str]) -> LatentMetadata:
    """Build the metadata of the request's latents. `parts`: the pipeline's `fingerprints`."""
    settings = with_model_defaults(request.settings, pipeline)
    given = request.context_length - request.generated_latents
    if given and request.context_latents is not None and not settings.source:  # latents without a file
        content = fingerprint({"latents": request.context_latents[0, :, :given].float()}, {})
        settings = settings.model_copy(update={"source": f"latents {content}"})
    if settings.scheduler is not None:
        parts = parts | {"scheduler": settings.scheduler}
    return LatentMetadata(settings=settings, given=given, latents=pipeline.grid.latent_frames(settings.length),
                          parts=parts, made_with=made_with())
