"""The HTML and the forms of the tabs Caches and Training."""

from __future__ import annotations

import re

import gradio as gr
import pytest

from app.storage.jobs import Job, JobKind, JobState, Progress
from app.tasks.cache import CacheParams
from app.tasks.train import TrainParams
from app.ui.html import job_list
from app.ui.page import View
from app.ui.tabs import caches, training
from odvae.utils.errors import UserError

EVIL = "<img src=x onerror=alert(1)>\"'"


def job(kind: JobKind, state: JobState, **more) -> Job:
    return Job("0" * 32, kind, "", state, {"model": "lvdm"}, EVIL, 1.0, started=2.0, **more)


def test_job_text_never_becomes_markup():
    result = {"report": [EVIL], "stats": [EVIL], "rejects": [{"path": EVIL, "reason": EVIL, "advice": EVIL}],
              "rejected": [[EVIL, 2]], "clips": 3, "asset_name": EVIL,
              "losses": {"loss": 1.0}}
    one = job(JobKind.CACHE, JobState.RUNNING, result=result, notes=(EVIL,), error=EVIL, advice=EVIL,
              progress=Progress(phase=EVIL, done=1, total=2, seconds_left=61))
    html = job_list.card(one, True) + caches.detail(one) + training.detail(one)
    assert "<img" not in html and html.count("&lt;img") >= 11 and "1 min 01 s left" in html


def test_buttons_depend_on_the_state():
    def buttons(state: JobState) -> list[str]:
        return re.findall(r'data-action="(\w+)"', job_list.card(job(JobKind.TRAIN, state), False))[1:]

    assert buttons(JobState.RUNNING) == buttons(JobState.QUEUED) == ["pause", "stop"]
    assert buttons(JobState.PAUSED) == ["resume", "stop"] and buttons(JobState.DONE) == ["delete"]
    assert buttons(JobState.STOPPED) == buttons(JobState.FAILED) == ["resume", "delete"]


def test_growing_curves_are_sent_again():
    series = {"loss": [[step, 1.0] for step in range(200)], "loss_heldout": []}
    one = job(JobKind.TRAIN, JobState.RUNNING, result={"series": series})
    update = job_list.plot(training.curves(one))
    assert update["visible"] and update["value"].values.tolist()[7] == [7, 1.0, "loss"]
    assert not job_list.plot(training.curves(job(JobKind.TRAIN, JobState.QUEUED)))["visible"]
    view = View(lambda request: job_list.plot(training.curves(one)), [], [None])
    _, seen = view.refresh(None, {})
    assert view.refresh(None, seen)[0] == gr.skip()
    series["loss"][100][1] = 2.0
    assert view.refresh(None, seen)[0] != gr.skip()


def test_form_values_are_valid_params():
    form = ("a", "", " new ", "64x64, 96 x 128", "17, 33", 8, "every", 2.5, "", "mean", "float16", 8, 128, 120, False,
            True)  # fmt: skip
    params = CacheParams.model_validate(caches.to_params(*form))
    assert (params.name, params.sizes, params.frames, params.clips) == ("new", [(64, 64), (96, 128)], [17, 33],
                                                                        "every:2.5")
    assert "sizes" not in caches.to_params(form[0], "old", *form[2:])  # they are the old cache's
    for sizes in "", "64", "64x", "64x64;;", "9" * 99 + "x1":
        with pytest.raises(UserError, match="Sizes: write"):
            caches.parse_sizes(sizes)
    for frames in "", "x", "1.5":
        with pytest.raises(UserError, match="Frames per clip: write"):
            caches.parse_lengths(frames)
    default = TrainParams().model_dump()
    for model in "lvdm", "odvae":
        form = {key: default[key] for key in training.FIELDS} | {"model": model, "name": " x ", "videos": None}
        assert TrainParams.model_validate(training.to_params(form)).name == "x"
