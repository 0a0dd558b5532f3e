"""The requests and responses of the HTTP API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from app.api.service import JobService
from app.storage.asset_scanner import AssetKind
from app.storage.job_files import PUBLIC_FILES
from app.storage.jobs import Job, JobKind, JobState
from app.tasks.cache import CacheParams
from app.tasks.compress import CompressParams
from app.tasks.decode import DecodeParams
from app.tasks.generate import GenerateParams
from app.tasks.train import TrainParams

SETTINGS: dict[JobKind, type[BaseModel]] = {
    JobKind.GENERATE: GenerateParams, JobKind.DECODE: DecodeParams, JobKind.COMPRESS: CompressParams,
    JobKind.CACHE: CacheParams, JobKind.TRAIN: TrainParams}  # fmt: skip


def _describe_kinds(schema: dict[str, Any]) -> None:
    """Replace a schema by one for each kind of job, with its settings."""
    schema.clear()
    schema["oneOf"] = []
    for kind, settings in SETTINGS.items():
        variant = settings.model_json_schema()
        variant = _inline(variant, variant.pop("$defs", {}))
        variant["properties"] = {"kind": {"const": kind.value}, **variant["properties"]}
        schema["oneOf"].append(variant | {"title": f"{kind}"})


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    """Replace references to the models inside a schema: they would be looked up at the root of the whole one."""
    match schema:
        case {"$ref": str(name)}:
            return _inline(definitions[name.rpartition("/")[2]], definitions)
        case dict():
            return {key: _inline(value, definitions) for key, value in schema.items()}
        case list():
            return [_inline(value, definitions) for value in schema]
    return schema


class JobRequest(BaseModel):
    """A job to queue. The settings of its kind stand beside `kind`; the task checks them."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_describe_kinds)

    kind: JobKind = JobKind.GENERATE


class _Response(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class ProgressInfo(_Response):
    """The progress of a job: `done` of `total` is for the whole job, the other numbers say where it is."""

    phase: str
    detail: str
    done: float
    total: float
    fraction: float  # in [0, 1]
    group: int
    groups: int
    step: int
    steps: int
    part: int
    parts: int
    frames: int  # in the video so far
    seconds_left: float | None


class JobInfo(_Response):
    """A job. Times are seconds since 1970."""

    id: str
    kind: JobKind
    state: JobState
    title: str
    params: dict[str, Any]
    progress: ProgressInfo
    result: dict[str, Any]
    notes: list[str]
    error: str
    advice: str
    created: float
    started: float | None
    finished: float | None
    revision: int
    favorite: bool
    parent: str
    worker: int | None  # that runs it, or ran it last
    files: dict[str, str] = {}  # the URL of each file that can be fetched

    @classmethod
    def of(cls, job: Job, service: JobService) -> JobInfo:
        """Describe a job, with the files that it has."""
        info = cls.model_validate(job)
        info.files = {name: f"/media/{job.id}/{name}" for name in PUBLIC_FILES
                      if service.job_files.public_file(job, name) is not None}  # fmt: skip
        return info


class QueuedJob(JobInfo):
    """A job that is queued."""

    before: int = 0  # running and queued jobs that end before it starts


class UploadInfo(_Response):
    """A file that was uploaded."""

    id: str  # for `upload` of a job
    name: str
    kind: Literal["video", "image"]
    width: int  # pixels, upright
    height: int
    frames: int | None
    frame_rate: float | None  # frames per second, the mean
    seconds: float | None


class AssetInfo(_Response):
    """A file or folder that can be picked."""

    id: str
    kind: AssetKind
    name: str
    detail: str


class Limits(BaseModel):
    """The limits of requests."""

    seconds: float  # of a video
    side: int  # pixels
    queued: int  # jobs
    upload_bytes: int
    upload_seconds: float


class ModelInfo(_Response):
    """What a pipeline generates."""

    pipeline: str = ""  # for `pipeline` of a job; "": that of the settings

    name: str
    frame_rate: float
    kind: str  # its class
    temporal_compression: int  # frames per latent frame
    min_frames: int  # a video has min_frames + frame_step * k frames
    frame_step: int
    fixed_size: bool  # whether it makes videos of its own sides only
    size_multiple: int  # pixels
    height: int  # pixels that it was trained at
    width: int
    group: int  # latent frames that are denoised together; 0: all
    num_inference_steps: int  # where none are given
    guidance_scale: float
    own_frames: int  # of a video where no length is given; 0: 4 seconds
    scheduler: str  # the class of its own one
    schedulers: list[str]  # those that can take its place
    unsupported: dict[str, str]  # parameters that it does not take, and image and video to continue, with the reasons
    classes: list[str]
    text: bool  # whether it takes prompts


class WorkerInfo(BaseModel):
    """A process that runs one job at a time."""

    number: int  # from 0
    state: Literal["starting", "loading", "ready", "restarting"]
    pid: int | None = None
    device: str = ""  # "" until it is known
    error: str = ""  # why it could not load the pipeline of the settings
    code: int | None = None  # the exit status of a crash


class ServerInfo(BaseModel):
    """The workers, the models and the limits."""

    workers: list[WorkerInfo]  # none while the accelerators are being counted
    model: ModelInfo  # the pipeline of the settings, where a job names none
    models: list[ModelInfo]  # the pipelines that a job can name
    limits: Limits


class ErrorInfo(BaseModel):
    """What is wrong, and what to do."""

    error: str
