"""Compression jobs: streamed metrics equal those of the whole clip, latents equal the codec's, input is validated."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_vae
from chromium import AUTOPLAY, launch_chromium
from PIL import Image
from waiting import TIMEOUT

from app.config import AppConfig
from app.storage.job_files import JobFiles
from app.storage.jobs import Job, JobKind, JobSignal, JobState
from app.tasks import compress, compress_worker, get_task
from app.tasks.context import JobContext, JobInterrupted, Services
from odvae.data.transforms import resize_crop, to_tensor
from odvae.data.video.reader import probe, read_clip, write_video
from odvae.inference.codec import decoded_frames, encode_video, read_header
from odvae.inference.fingerprint import vae_fingerprint
from odvae.metrics.psnr import psnr
from odvae.metrics.ssim import ssim
from odvae.utils.errors import UserError

ME, FRAMES, RATE = "ada", 22, 8.0


def write_clip(path: Path, frames: int = FRAMES, height: int = 40, width: int = 64) -> Path:
    """A moving gradient with noise."""
    y, x, t = (np.arange(n) for n in (height, width, frames))
    level = 3 * (x + y[:, None] + 2 * t[:, None, None])
    noise = np.random.default_rng(0).integers(0, 40, (frames, height, width))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, [np.stack([level + noise, level * 2, 255 - level], -1).astype(np.uint8)], RATE)
    return path


@dataclass
class FakeUploads:
    """Uploads by id, each with an owner."""

    uploads: dict[str, Any] = field(default_factory=dict)

    def put(self, path: Path, name: str = "film.mp4", owner: str = ME, kind: str = "video") -> str:
        info, name_of = probe(path), f"u{len(self.uploads)}"
        self.uploads[name_of] = SimpleNamespace(
            id=name_of, path=path, name=name, owner=owner, kind=kind, frames=info.frames, width=info.width,
            height=info.height, frame_rate=info.frame_rate, seconds=info.duration,
        )  # fmt: skip
        return name_of

    def find(self, upload_id: str, owner: str) -> Any:
        if upload_id not in self.uploads or self.uploads[upload_id].owner != owner:
            raise UserError("upload: there is no such file here.")
        return self.uploads[upload_id]


class NoAssets:
    def find(self, asset_id: str, kind: str) -> Path:
        raise UserError(f"{kind}: there is no such folder here.")


class FakeModels:
    """A model manager with one VAE."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.model, self.unloads = tiny_vae(), 0

    def vae_fingerprint(self, folder):
        return vae_fingerprint(self.vae(folder))

    def vae(self, folder: Path | None) -> Any:
        return self.model

    def unload(self) -> None:
        self.unloads += 1


@pytest.fixture
def services(tmp_path: Path) -> Services:
    config = AppConfig(data_dir=tmp_path / "data", max_side=512, auth=("ada:1", "bob:2"))
    return Services(config, JobFiles(config.data_dir), FakeUploads(), NoAssets())  # type: ignore[arg-type]


@pytest.fixture
def context_for(services: Services) -> Callable[..., JobContext]:
    """A job of those settings, claimed."""

    def make(**raw: Any) -> JobContext:
        params, title = get_task(JobKind.COMPRESS).validate(raw, services, ME)
        services.store.submit(JobKind.COMPRESS, ME, params, title)
        job = services.store.claim()
        assert job is not None
        services.job_files.prepare(job)
        return JobContext(job, services, FakeModels())  # type: ignore[arg-type]

    return make


def result_of(context: JobContext) -> Job:
    found = context.services.store.get(context.job.id)
    assert found is not None
    return found


def test_streamed_metrics_and_latents_equal_those_of_the_whole_clip(services, context_for, tmp_path):
    clip = write_clip(tmp_path / "film.mp4")
    context = context_for(upload=services.uploads.put(clip))
    compress_worker.run(context)

    vae, folder, result = context.models.model, context.folder, result_of(context).result
    vae.unfuse()
    encode_video(clip, tmp_path / "codec.safetensors", vae, vae_fingerprint(vae))
    assert (folder / "latents.safetensors").read_bytes() == (tmp_path / "codec.safetensors").read_bytes()
    vae.fuse()
    made = np.concatenate(list(decoded_frames(folder / "latents.safetensors", vae, vae_fingerprint(vae))))
    a, b = to_tensor(read_clip(clip))[None], to_tensor(made)[None]
    report = json.loads((folder / "report.json").read_text())
    np.testing.assert_allclose(report["per_frame"]["psnr"], psnr(a, b)[0], atol=2e-3)
    np.testing.assert_allclose(report["per_frame"]["ssim"], ssim(a, b)[0], atol=2e-5)
    assert result["worst_frame"] == int(psnr(a, b)[0].argmin())
    assert result["psnr"] == pytest.approx(float(psnr(a, b).mean()), abs=2e-3)

    # 22 frames are padded to 25, which are 7 of latents, a pixel in 64 each
    shape = [7, vae.latent_channels, 5, 8]
    assert result["latents_shape"] == shape
    assert result["ratio"] == pytest.approx(FRAMES * 40 * 64 * 3 / np.prod(shape), abs=1e-3)
    assert result["latents_bytes"] == 2 * np.prod(shape) and result["source_bytes"] == clip.stat().st_size
    for name in ("original.mp4", "reconstruction.mp4"):
        info = probe(folder / name)
        assert (info.frames, info.height, info.width, info.frame_rate) == (FRAMES, 40, 64, RATE)
    assert {*result["files"], "log.txt", "params.json"} == {path.name for path in folder.iterdir()}
    assert Image.open(folder / "frames.webp").size == (6 * 64 + 5 * 4, 3 * 40 + 2 * 4)
    assert Image.open(folder / "poster.webp").size == (64, 40)


def test_a_resized_and_resampled_span_equals_reading_it_so(services, context_for, tmp_path):
    clip = write_clip(tmp_path / "film.mp4")
    context = context_for(upload=services.uploads.put(clip, "holiday.mov"), start=0.5, seconds=1.5, height=32, width=32,
                    frame_rate=4, tile=64)  # fmt: skip
    compress_worker.run(context)
    header = read_header(context.folder / "latents.safetensors")
    assert (header.frames, header.height, header.width, header.frame_rate) == (6, 32, 32, 4)
    assert header.source == "holiday.mov" and header.content == "", "a part must not pass for the whole file"
    original = read_clip(context.folder / "original.mp4").astype(int)
    expected = resize_crop(read_clip(clip, 0.5, 6, 4.0), 32, 32).astype(int)
    assert original.shape == expected.shape
    error, motion = np.abs(original - expected).mean(), np.abs(expected[1:] - expected[:-1]).mean()
    assert error < motion / 3, "but for what H.264 loses"
    assert "tiles of 64x64" in result_of(context).result["plan"]


@pytest.mark.parametrize(("given", "frames"), [({"start": 0.25}, 20), ({"start": 0.3, "seconds": 0.5}, 5),
                                               ({"seconds": 1.0}, 8), ({"seconds": 0.001}, 1), ({"start": 2.74}, 1),
                                               ({"seconds": 99.0, "frame_rate": 16.0}, 44)])  # fmt: skip
def test_a_span_has_the_frames_visible_in_it(given, frames, services, tmp_path):
    from app.tasks.compress_worker import Clip, VideoReader

    upload = services.uploads.put(write_clip(tmp_path / "film.mp4"))
    params, _ = compress.validate({"upload": upload, **given}, services, ME)
    with VideoReader(tmp_path / "film.mp4") as video:
        clip = Clip(video, compress.CompressParams(**params))
        assert clip.count == frames == sum(len(chunk) for chunk in clip.chunks())


def test_out_of_memory_retries_with_a_smaller_plan_and_notes_it(services, context_for, tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "film.mp4", 9, 96, 128)
    context, plans, fails = context_for(upload=services.uploads.put(clip)), [], [1]

    def scarce(vae, path, *others, plan, work=compress_worker.decoded_frames):
        plans.append(plan)
        if len(plans) <= fails[0]:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate ...")
        yield from work(vae, path, *others, plan=plan)

    monkeypatch.setattr(compress_worker, "decoded_frames", scarce)
    compress_worker.run(context)
    job = result_of(context)
    assert len(plans) == len(set(plans)) == 2 and context.models.unloads == 1
    assert len(job.notes) == 1 and "Out of memory in decoding" in job.notes[0]
    assert job.result["frames"] == 9 and "decoding" in job.result["plan"]

    plans.clear()
    fails[0] = 99
    with pytest.raises(UserError, match="Choose a smaller size"):
        compress_worker.run(context)
    assert 1 < len(plans) == len(set(plans)), "no plan is tried twice"


def test_an_interrupted_compression_leaves_whole_files_and_restarts(services, context_for, tmp_path):
    context = context_for(upload=services.uploads.put(write_clip(tmp_path / "film.mp4")))
    context.shutting_down = lambda: context.progress.phase == "decoding" and context.progress.part > 0
    with pytest.raises(JobInterrupted) as caught:
        compress_worker.run(context)
    assert caught.value.signal is JobSignal.SHUTDOWN
    assert {p.name for p in context.folder.iterdir()} == {
        "params.json",
        "log.txt",
        "original.mp4",
        "latents.safetensors",
    }
    context.shutting_down = lambda: False
    compress_worker.run(context)
    assert result_of(context).result["frames"] == FRAMES
    assert not list(context.folder.glob(".*"))


def test_only_own_videos_of_the_history_can_be_compressed(services, tmp_path):
    job = services.store.submit(JobKind.GENERATE, ME, {}, "a red circle")
    write_clip(services.job_files.folder(job) / "final.mp4")
    with pytest.raises(UserError, match="not finished"):
        compress.validate({"job": job.id}, services, ME)
    services.store.claim()
    services.store.finish(job.id, JobState.DONE)
    params, title = compress.validate({"job": job.id}, services, ME)
    assert (params["height"], params["width"], title) == (40, 64, "a red circle.mp4")
    with pytest.raises(UserError, match="no job"):
        compress.validate({"job": job.id}, services, "bob")


def test_validation_is_idempotent(services, tmp_path):
    upload = services.uploads.put(write_clip(tmp_path / "film.mp4", 5, 46, 70))
    params, title = compress.validate({"upload": upload}, services, ME)
    assert (params["height"], params["width"], params["tile"], title) == (40, 64, "auto", "film.mp4")
    assert compress.validate(json.loads(json.dumps(params)), services, ME) == (params, title)
    large = services.uploads.put(write_clip(tmp_path / "large.mp4", 2, 400, 1000))
    params, _ = compress.validate({"upload": large}, services, ME)
    assert (params["height"], params["width"]) == (200, 512), "at most max_side, in the same proportion"


@pytest.mark.parametrize(("raw", "message"), [
    ({}, "video: give the id of either"),
    ({"upload": "u0", "job": "a" * 32}, "of either"),
    ({"upload": "../../etc/passwd"}, "no such file"),
    ({"upload": "u" * 65}, "upload: is too long"),
    ({"upload": 7}, "upload: must be a valid string"),
    ({"upload": "u1"}, "no such file"),
    ({"upload": "u2"}, "picture"),
    ({"upload": "u3"}, "16 a side are needed"),
    ({"job": "../../x"}, "There is no job that name"),
    ({"job": "a" * 32}, "There is no job"),
    ({"upload": "u0", "vae": "/etc"}, "vae: there is no such folder"),
    ({"upload": "u0", "vae": None}, "vae: must be a valid string"),
    ({"upload": "u0", "start": 2.75}, "must be before the end"),
    ({"upload": "u0", "start": -1}, "start: must be at least 0"),
    ({"upload": "u0", "start": float("nan")}, "start: must be a finite number"),
    ({"upload": "u0", "seconds": 0}, "seconds: must be more"),
    ({"upload": "u0", "seconds": float("inf")}, "seconds: must be"),
    ({"upload": "u0", "frame_rate": 1e9}, "frame_rate: must be at most"),
    ({"upload": "u0", "height": 64}, "give both"),
    ({"upload": "u0", "height": 60, "width": 64}, "height: must be a multiple of 8"),
    ({"upload": "u0", "height": 8, "width": 64}, "height: must be at least"),
    ({"upload": "u0", "height": 64, "width": 1024}, "larger than 512"),
    ({"upload": "u0", "tile": 20}, "tile: must be"),
    ({"upload": "u0", "tile": "fast"}, "tile: must be"),
    ({"upload": "u0", "tile": [1]}, "tile: must be"),
    ({"upload": "u0", "path": "/etc/passwd"}, "path: there is no such setting"),
    ({"upload": "u0", "\n" * 999: 1}, "no such setting"),
    ({"upload": "\ud800"}, "upload: must be a valid string"),
])  # fmt: skip
def test_invalid_values_are_refused(raw, message, services, tmp_path):
    clip = write_clip(tmp_path / "film.mp4")
    services.uploads.put(clip)
    services.uploads.put(clip, owner="bob")
    services.uploads.put(clip, kind="image")
    services.uploads.put(write_clip(tmp_path / "small.mp4", 2, 14, 40))
    with pytest.raises(UserError, match=message) as caught:
        compress.validate(raw, services, ME)
    assert len(str(caught.value)) < 400


def test_all_invalid_values_are_reported_at_once(services):
    with pytest.raises(UserError) as caught:
        compress.validate({"upload": "u0", "seconds": -1, "tile": 3, "more": 1}, services, ME)
    assert all(f"{name}: " in str(caught.value) for name in ("seconds", "tile", "more"))


@pytest.fixture
def page() -> Iterator[Any]:
    """A page in the system's chromium."""
    for browser in launch_chromium(AUTOPLAY):
        yield browser.new_page(viewport={"width": 1280, "height": 1000})


@pytest.mark.browser
def test_a_video_is_compressed_and_compared_in_the_viewer(page, start_server, tmp_path):
    from playwright.sync_api import expect

    server, errors = start_server(), []
    page.set_default_timeout(1000 * TIMEOUT)
    expect.set_options(timeout=1000 * TIMEOUT)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.goto(server.url)
    page.get_by_role("tab", name="Compress").click()
    page.locator("#compress-submit").click()
    expect(page.locator("#compress-notice")).to_contain_text("Choose a video first")
    page.locator("#compress-file input[type=file]").set_input_files(write_clip(tmp_path / "film.mp4", 9))
    expect(page.locator("#compress-hint")).to_contain_text("64×40, about 9 frames")
    page.locator("#compress-submit").click()
    view, message, handle = page.locator(".lvc-view"), page.locator(".lvc-position"), page.locator(".lvc-handle")
    for _ in range(2):
        expect(view).to_have_attribute("data-state", "video")
        expect(message).to_contain_text(re.compile(r"frame 1 of 9 · \d+\.\d dB"))
        page.reload()  # and it is found again
        page.get_by_role("tab", name="Compress").click()
    expect(message).to_contain_text("dB")
    handle.press("ArrowRight")
    expect(handle).to_have_attribute("aria-valuenow", "52")
    handle.press(".")
    handle.press(".")
    expect(message).to_contain_text("frame 3 of 9")
    times = page.evaluate("[...document.querySelectorAll('.lvc-stage video')].map(one => one.currentTime)")
    assert times == [pytest.approx(2.5 / RATE, abs=1e-3)] * 2
    handle.press(" ")
    expect(view).to_have_attribute("data-playing", "true")
    page.wait_for_function("[...document.querySelectorAll('.lvc-stage video')].every(one => one.currentTime > 0.5)")
    expect(page.locator(".lvc-card")).to_have_count(1)
    with page.expect_download() as caught:
        page.locator("#compress-status a", has_text="Latents").click()
    assert caught.value.suggested_filename == "film-latents.safetensors"
    assert read_header(caught.value.path()).frames == 9
    assert errors == []
