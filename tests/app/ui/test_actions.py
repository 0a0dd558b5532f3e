"""The actions and handlers of the tabs Generate and History, without a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest

from app.api.service import JobService
from app.inference.fragmented_mp4 import FragmentedMp4Writer, read_settings
from app.storage.jobs import JobKind, JobState
from app.tasks.context import Services
from app.ui import form_values
from app.ui.actions import GenerateActions
from app.ui.html.queue import expected_starts, queue_entries
from app.ui.page import Page
from app.ui.tabs import generate, history
from odvae.utils.errors import UserError

ME = "me"
FORM = {"prompt": " a red circle ", "seconds": 2, "num_inference_steps": 3, "seed": "11",
          "sections": [[1.2, "a blue circle"]],
          "negative_prompt": "blur", "size": "custom", "width": 64, "height": 32, "frame_rate": "16",
          "guidance_scale": 3.5, "scheduler": "heun", "guidance_rescale": 0.2, "shift": "2", "history_groups": 3,
          "history_noise": 0.05, "tile": 64}  # fmt: skip


def values(**changes: Any) -> dict[str, Any]:
    return {**form_values.DEFAULTS, **changes}


def test_hint_shows_size_and_estimated_cost(harness):
    services = harness.service.services
    html = form_values.hint(values(seconds=4), services, ME)  # an empty prompt is not an error yet
    assert "33 frames on the model&#39;s grid (1+4k), plays 4.1 s at 8 fps, 32x32" in html
    assert "no measurements from this machine yet" in html
    figures = {"device": "cpu", "pixels": 32 * 32, "guided": True, "step": 0.5, "decode": 1.0}
    services.store.set_value(f"measured {harness.config.pipeline}", [figures])
    memory = {"weights": 2**29, "history": 2**26, "decoding": 2**26, "pixels": 32 * 32}
    services.store.set_value(f"memory {harness.config.pipeline}", memory)
    html = form_values.hint(
        values(seconds=4, num_inference_steps=10), services, ME
    )  # 5 groups of 10 steps and a decoding
    assert "about 30 s, 640.0 MiB of memory" in html


@pytest.mark.parametrize(("changes", "words"), [
    ({"size": "custom", "width": 33, "height": 32}, "width: must be a multiple of 16"),
    ({"seconds": 1e6}, "seconds: must be at most 60"),
    ({"seconds": "long"}, "seconds: must be a number"),
    ({"frame_rate": "quick"}, "frame_rate: must be a number"),
    ({"sections": [[9.0, "late"]]}, "the last begins at second 9"),
    ({"sections": "<b>"}, "sections"),
    ({"start_from": form_values.FILE}, "upload a file"),
    ({"start_from": form_values.HISTORY, "job": "../../etc"}, "is not an id of this app"),
    ({"size": "9x<script>"}, "&lt;script&gt;"),
])  # fmt: skip
def test_hint_shows_what_is_invalid(harness, changes, words):
    html = form_values.hint(values(**changes), harness.service.services, ME)
    assert words in html
    assert "<script>" not in html


def test_submitted_values_are_stored_and_fill_the_form_again(harness):
    actions = GenerateActions(harness.service)
    done = actions.generate(values(**FORM), None, "", ME)
    job = harness.service.find(done.followed, ME)
    expected = {"prompt": "a red circle", "sections": [[1.2, "a blue circle"]], "seed": 11, "num_frames": 33,
              "height": 32, "width": 64, "frame_rate": 16.0, "num_inference_steps": 3, "scheduler": "heun",
              "shift": 2.0, "tile": 64}  # fmt: skip
    assert {name: job.params[name] for name in expected} == expected
    again = actions.act("reuse", job.id, "", None, ME)
    assert again.show
    params = form_values.check_form(again.values, harness.service.services, ME).params
    assert params.model_dump(mode="json") == job.params
    assert actions.act("reseed", job.id, "", None, ME).values == again.values | {"seed": ""}
    assert actions.last_seed(ME) == "11"
    twin = harness.service.find(actions.act("duplicate", job.id, "", "", ME).followed, ME)
    assert job.id == twin.id or twin.params == job.params


def test_a_queued_job_is_edited_in_the_form(harness):
    actions = GenerateActions(harness.service)
    first, second = harness.submit("one"), harness.submit("two", seed=9)
    opened = actions.act("edit", second.id, "", None, ME)
    assert (opened.editing, opened.values["prompt"], opened.values["seed"]) == (second.id, "two", "9")
    saved = actions.generate(opened.values | {"prompt": "three"}, first.id, opened.editing, ME)
    assert saved.editing == ""
    assert (harness.reload(second).title, harness.reload(second).params["seed"]) == ("three", 9)
    actions.act("first", second.id, "", None, ME)
    assert [turn.job.title for turn in queue_entries(harness.service, ME)] == ["three", "one"]
    actions.act("pause", first.id, "", None, ME)
    actions.act("cancel", second.id, "", None, ME)
    assert [harness.reload(job).state for job in (first, second)] == [JobState.PAUSED, JobState.CANCELLED]
    with pytest.raises(UserError, match="Duplicate"):
        actions.act("edit", second.id, "", None, ME)


def test_a_finished_video_is_extended_and_decoded_again(harness):
    harness.start_worker()
    job = harness.wait(harness.submit("red", sections=[[1.0, "blue"]]))
    actions = GenerateActions(harness.service)
    assert [name for _, name in form_values.video_choices(harness.service.history(ME))] == [job.id]
    opened = actions.act("extend", job.id, "", None, ME)
    assert opened.values["job"] == job.id
    assert opened.values["seconds"] > job.params["seconds"]
    checked = form_values.check_form(opened.values, harness.service.services, ME)
    whole = form_values.check_form(opened.values | {"start_from": form_values.TEXT}, harness.service.services, ME)
    assert checked.estimate.groups < whole.estimate.groups  # what is there is not made again
    decoding = harness.service.find(actions.act("decode", job.id, "64", job.id, ME).followed, ME)
    assert (decoding.kind, decoding.params) == (JobKind.DECODE, {"job": job.id, "tile": 64})
    harness.wait(decoding)
    look = generate.Handlers(Page(harness.service, None)).update(decoding.id, _request())
    assert look[0]["final"].startswith(f"media/{decoding.id}/final.mp4")
    assert "Finished" in look[1]


def test_current_job_prefers_the_running_one_and_keeps_an_active_one(harness, gate):
    actions = GenerateActions(harness.service)
    assert actions.current_job(None, ME) is None
    job = harness.submit("waits 1")
    assert actions.current_job("0" * 32, ME).id == job.id  # what was followed is gone
    html = actions.generate(values(prompt="two"), job.id, "", ME)
    assert html.followed == job.id
    assert "1 job before it" in html.notice
    harness.service.signal(job.id, "cancel", ME)
    third = actions.generate(values(prompt="three"), job.id, "", ME)
    assert harness.service.find(third.followed, ME).title == "three"


def test_expected_starts_follow_from_measurements(harness):
    jobs = [harness.submit(prompt, seconds=2, num_inference_steps=10) for prompt in "abc"]
    assert expected_starts(harness.service.services) == {jobs[0].id: 0.0}
    figures = {"device": "cpu", "pixels": 32 * 32, "guided": True, "step": 0.5, "decode": 1.0}
    harness.service.store.set_value(f"measured {harness.config.pipeline}", [figures])
    assert list(expected_starts(harness.service.services).values()) == [0.0, 18.0, 36.0]  # 3 groups each
    for number in range(2):
        harness.service.store.set_worker(number, "ready")
    assert list(expected_starts(harness.service.services).values()) == [0.0, 0.0, 18.0]
    assert harness.service.store.claim(1).id == jobs[0].id
    assert list(expected_starts(harness.service.services).values()) == [0.0, 18.0]


def test_jobs_of_other_users_are_out_of_reach(harness):
    private = JobService(Services.from_config(harness.config.model_copy(update={"auth": ("me:x", "you:y")})))
    actions, job = GenerateActions(private), harness.submit("red")
    for action in ("open", "edit", "reuse", "extend", "cancel", "delete", "decode", "duplicate", "earlier", "favorite"):
        with pytest.raises(UserError, match="There is no job"):
            actions.act(action, job.id, "", None, "you")
    assert actions.current_job(job.id, "you") is None
    mine = actions.generate(values(prompt="blue"), None, "", "you")
    (turn,) = queue_entries(private, "you")
    assert (turn.job.id, turn.before, turn.others) == (mine.followed, 1, 1)


@pytest.mark.parametrize("action", ["", "open\n", "__init__", "submit", "<b>"])
def test_other_actions_are_refused(harness, action):
    actions = GenerateActions(harness.service)
    with pytest.raises(UserError):
        actions.act(action, harness.submit().id, "", None, ME)
    with pytest.raises(UserError):
        actions.act("open", "../jobs", "", None, ME)


SETTINGS = {"prompt": "red", "sections": [[1.0, "blue"]], "seed": 4, "num_frames": 41, "height": 32, "width": 80,
            "frame_rate": 10.0, "num_inference_steps": 7, "guidance_scale": 2.5, "made_by": "lvdm-app",
            "notes": ["n"], "scale": 2, "source": "cat.png 00ff", "flavour": "sweet"}  # fmt: skip


def dropped(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    with FragmentedMp4Writer(folder, 8.0) as video:
        video.append(np.zeros((5, 32, 64, 3), np.uint8))
        video.finish(folder / "dropped.mp4", settings)
    return read_settings(folder / "dropped.mp4")


def test_settings_are_restored_from_a_video(harness, tmp_path):
    actions, settings = GenerateActions(harness.service), dropped(tmp_path, SETTINGS)
    done = actions.restore(settings, seed=True)
    expected = {"prompt": "red", "sections": [[1.0, "blue"]], "seed": "4", "seconds": 4.1, "frame_rate": "10",
                "num_inference_steps": 7, "guidance_scale": 2.5, "size": "custom", "width": 80,
                "height": 32}  # fmt: skip
    assert {name: done.values[name] for name in expected} == expected
    assert "flavour" in done.notice
    assert "cat.png" in done.notice
    assert form_values.check_form(done.values, harness.service.services, ME).params.num_frames == 41
    assert actions.restore(settings, seed=False).values == done.values | {"seed": ""}


def test_a_hostile_file_leaves_the_form_usable(harness, tmp_path):
    wrong = {"prompt": ["x"], "seed": -5, "num_inference_steps": 10**9, "num_frames": 1e400,
             "sections": {"a": 1}, "job": "0" * 32, "upload": "../../x", "pipeline": "/etc", "frame_rate": 0, "<b>": 1,
             "guidance_scale": 4}  # fmt: skip
    done = GenerateActions(harness.service).restore(dropped(tmp_path, wrong), seed=True)
    assert done.values == values(guidance_scale=4.0)
    assert "num_inference_steps" in done.notice


@pytest.mark.parametrize("draft", [None, 3, [], {"prompt": 1}, [[]] * len(form_values.NAMES),
                                   [1e400] * len(form_values.NAMES)])
def test_an_invalid_draft_leaves_the_initial_form(harness, draft):
    handlers = generate.Handlers(Page(harness.service, None))
    assert handlers.restore_draft(draft) == [gr.skip()] * len(form_values.NAMES)  # nothing is changed
    typed = handlers.initial | {"prompt": "half a se", "seed": "3", "sections": [[1.0, "b"]]}
    draft = handlers.on_change(_request(), *typed.values())[1]
    kept = dict(zip(form_values.NAMES, handlers.restore_draft(draft), strict=True))
    assert {name: value for name, value in kept.items() if value != gr.skip()} == {
        "prompt": "half a se", "seed": "3", "sections": [[1.0, "b"]]}  # fmt: skip


def _request() -> Any:
    return gr.Request()


def test_the_history_is_searched_and_its_limit_set(harness):
    handlers = history.Handlers(harness.service)
    red, blue = harness.submit("red"), harness.submit("blue")
    for job in red, blue:
        harness.service.signal(job.id, "cancel", ME)
    harness.service.favorite(blue.id, True, ME)
    cards, more, disk = handlers.update(None, "", history.VIDEOS, 0, _request())
    assert red.id in cards
    assert not more["visible"]
    assert "of 20.0 GiB" in disk
    assert red.id not in handlers.update(None, "blu", history.VIDEOS, 0, _request())[0]
    assert red.id not in handlers.update(None, "", history.FAVORITES, 0, _request())[0]
    assert "must be a number" in handlers.set_limit(float("nan"))
    harness.service.store.set_value("options", {"device": "cpu"})
    handlers.set_limit(0.5)
    assert harness.service.store.get_value("options") == {"device": "cpu", "max_disk": 2**29}
    assert "of 512.0 MiB" in handlers.disk()


def test_every_field_has_a_label_and_a_unique_id(harness):
    with gr.Blocks() as blocks:
        page = Page(harness.service, blocks)
        with gr.Tabs() as page.tabs, gr.Tab("Generate", id=generate.TAB):
            generate.build(page)
            history.build(page)
    kinds = gr.components.FormComponent | gr.Button | gr.File
    fields = [block for block in blocks.blocks.values() if isinstance(block, kinds)]
    ids = [block.elem_id for block in fields]
    assert None not in ids
    assert len(set(ids)) == len(ids)
    assert all(getattr(block, "label", None) or getattr(block, "value", None) for block in fields)


def test_the_longest_video_can_be_requested_again(harness):
    job = harness.submit("red", seconds=harness.config.max_seconds)
    assert job.params["seconds"] > harness.config.max_seconds  # the nearest length of the grid
    again = GenerateActions(harness.service).act("reuse", job.id, "", None, ME).values
    assert form_values.check_form(again, harness.service.services, ME).params.num_frames == job.params["num_frames"]
