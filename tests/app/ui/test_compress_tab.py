"""The handlers of the Compress tab, without a browser."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from app.storage.jobs import JobKind, JobState
from app.ui import page
from app.ui.tabs.compress import ORIGINAL_SIZE, Handlers
from odvae.data.video.reader import write_video

REQUEST = gr.Request()
DEFAULTS = ("", ORIGINAL_SIZE, "", "", "", "whole frames")  # VAE, size, start, seconds, frame rate, tiles


@pytest.fixture
def handlers(harness: Any) -> Handlers:
    return Handlers(harness.service)


@pytest.fixture
def upload_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gradio's folder of uploads, with a video, a picture and a text."""
    folder = tmp_path / "gradio"
    folder.mkdir()
    write_video(folder / "film.mp4", [np.full((9, 64, 96, 3), 90, np.uint8)], 8.0)
    Image.new("RGB", (32, 32)).save(folder / "photo.png")
    (folder / "text.mp4").write_text("no video")
    monkeypatch.setattr(page, "get_upload_folder", lambda: str(folder))
    return folder


def file_data(path: Path) -> dict[str, str]:
    return {"path": str(path), "orig_name": path.name}


@pytest.fixture
def film(handlers: Handlers, upload_folder: Path) -> dict[str, str]:
    source, picked, notice = handlers.accept_upload(file_data(upload_folder / "film.mp4"), REQUEST)
    assert source.keys() == {"upload"} and (picked, notice) == (None, "")
    return source


def test_files_that_are_no_video_are_refused_with_a_reason(handlers: Handlers, upload_folder: Path) -> None:
    outside = upload_folder.parent / "outside.mp4"
    outside.write_bytes((upload_folder / "film.mp4").read_bytes())
    for file, reason in ((file_data(upload_folder / "photo.png"), "this is a picture"),
                         (file_data(upload_folder / "text.mp4"), "not a video or image"),
                         (file_data(outside), "incomplete"), ({"name": "no path"}, "incomplete")):
        source, _, notice = handlers.accept_upload(file, REQUEST)
        assert source == {} and reason in notice
    assert handlers.accept_upload(None, REQUEST) == ({}, None, "")


@pytest.mark.parametrize(("size", "height", "width"), [
    ("32 short side", 32, 48), ("48x32", 32, 48), (" 64 × 48 ", 48, 64), (ORIGINAL_SIZE, 64, 96)])
def test_sizes_as_they_are_written(handlers: Handlers, film: dict[str, str], size: str, height: int,
                                   width: int) -> None:
    params, _ = handlers.validate(page.owner_of(REQUEST), film, "", size, "", "", "", "whole frames")
    assert (params["height"], params["width"]) == (height, width)


@pytest.mark.parametrize(("change", "reason"), [
    ({1: "large"}, "is not a size"), ({1: "0 short side"}, "is not a size"), ({1: "<b>x32"}, "width"),
    ({2: "soon"}, "start"), ({3: "-1"}, "seconds"), ({4: "quick"}, "frame_rate")])
def test_fields_that_are_wrong_are_named_at_once_and_at_the_button(handlers: Handlers, film: dict[str, str],
                                                                   change: dict[int, str], reason: str) -> None:
    form = [change.get(k, value) for k, value in enumerate(DEFAULTS)]
    hint, notice = handlers.hint(REQUEST, film, *form)
    _, refusal = handlers.compress(REQUEST, film, *form)
    assert hint == "" and reason in notice and refusal == notice and "<b>x" not in notice


def test_a_job_is_queued_shown_and_acted_on(handlers: Handlers, film: dict[str, str]) -> None:
    _, notice = handlers.compress(REQUEST, {}, *DEFAULTS)
    assert "Choose a video first" in notice and handlers.hint(REQUEST, {}, *DEFAULTS)[0] == ""
    assert "film.mp4" in handlers.hint(REQUEST, film, *DEFAULTS)[0]
    first, second = (handlers.compress(REQUEST, film, *DEFAULTS)[0] for _ in range(2))
    _, status, recent, videos = handlers.update(second, REQUEST)
    assert "1 before this one" in status and recent.count("film.mp4") and videos["choices"] == []

    def act(job: str, action: str, shown: str = "") -> tuple[Any, str]:
        return handlers.act(shown, SimpleNamespace(_data={"job": job, "action": action}), REQUEST)  # type: ignore[arg-type]

    assert act(first, "open") == (first, "")
    assert act(first, "cancel") == (first, "")
    assert act(first, "delete", shown=first) == ("", "") and act("gone", "open", shown=second)[0] == second
    assert [job.id for job in handlers.service.history(page.owner_of(REQUEST), kinds=[JobKind.COMPRESS])] == [second]
    handlers.update(first, REQUEST)  # it was deleted: the newest is shown


def test_a_video_of_the_history_can_be_compressed(handlers: Handlers, harness: Any) -> None:
    job = harness.submit(owner=page.owner_of(REQUEST))
    harness.service.services.job_files.prepare(job)
    write_video(harness.file(job), [np.full((9, 32, 32, 3), 90, np.uint8)], 8.0)
    harness.service.services.store.claim()
    harness.service.services.store.finish(job.id, JobState.DONE)
    videos = handlers.update("", REQUEST)[3]
    assert [choice[1] for choice in videos["choices"]] == [job.id] and handlers.pick(None) == ({}, None)
    source, _ = handlers.pick(job.id)
    assert handlers.compress(REQUEST, source, *DEFAULTS)[1] == ""
