"""A pipeline of diffusers in the app: the same queue, files and metadata, what is hidden, and what is refused."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from tiny_diffusers import LENGTHS, save_diffusers_pipeline
from worker_harness import OWNER, WorkerHarness

from app.storage.jobs import JobKind, JobState
from app.tasks.generate import validate
from app.tasks.pipeline_spec import describe_limits, load_pipeline_spec
from app.ui import form_values
from app.ui.html.buttons import EXTEND, job_buttons
from app.ui.page import Page
from app.ui.tabs import generate
from lvdm.generation.latent_store import read_latents, read_settings
from lvdm.sampling.loading import load_pipeline
from odvae.data.video.reader import VideoReader
from odvae.utils.errors import UserError

SMALL = {"height": 64, "width": 32, "num_frames": 9, "num_inference_steps": 3}


@pytest.fixture(scope="session")
def diffusers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers")
    for kind in LENGTHS:
        save_diffusers_pipeline(kind, folder / kind)
    return folder


@pytest.fixture
def wan(tmp_path, diffusers_folder):
    harness = WorkerHarness(tmp_path, diffusers_folder / "WanPipeline")
    yield harness
    harness.stop_workers()


def frames_of(path: Path) -> np.ndarray:
    with VideoReader(path) as video:
        return np.concatenate(list(video.iter_chunks()))


def test_a_job_and_its_latents_decoded_again(wan):
    job = wan.submit("red", **SMALL)
    assert job.params["guidance_scale"] == 5.0 and job.params["frame_rate"] == 16.0, "the pipeline's own"
    wan.start_worker()
    job = wan.wait(job)
    assert job.state is JobState.DONE and (job.progress.step, job.progress.steps, job.progress.groups) == (0, 3, 1)
    assert job.result["frames"] == 9 and job.result["settings"]["num_inference_steps"] == 3
    assert read_settings(wan.file(job))["seed"] == 7
    metadata, latents = read_latents(wan.file(job))
    assert latents.shape == (16, 3, 8, 4) and {"vae", "transformer", "text encoder", "tokenizer"} <= set(metadata.parts)
    again = wan.wait(wan.submit(kind=JobKind.DECODE, job=job.id))
    np.testing.assert_array_equal(frames_of(wan.file(again)), frames_of(wan.file(job)))
    assert EXTEND not in [button for row in job_buttons(job) for button in row]
    with pytest.raises(UserError, match=r"cannot start from a video: .*whole video at once"):
        wan.submit("blue", job=job.id, num_frames=17)


def test_out_of_memory_in_decoding_falls_back_to_tiles(wan, monkeypatch):
    from lvdm.sampling import diffusers_adapter

    decode = diffusers_adapter.decode

    def decode_in_tiles(pipeline, latents, tile=None, *options):
        if tile is None:
            raise MemoryError
        return decode(pipeline, latents, tile, *options)

    monkeypatch.setattr(diffusers_adapter, "decode", decode_in_tiles)
    wan.start_worker()
    job = wan.wait(wan.submit("red", **SMALL | {"height": 128, "width": 128, "num_frames": 1}))
    assert job.state is JobState.DONE and "tiles of 64x64" in job.notes[0]


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_frames": 10}, r"must be 1 \+ 4k, but 10 was given; the nearest is 9"),
    ({"height": 40}, "multiple of 16"), ({"sections": [[0.2, "blue"]]}, "sections: a WanPipeline cannot"),
    ({"scheduler": "heun"}, "scheduler"), ({"history_groups": 5}, "history_groups")])
def test_what_it_cannot_do_is_refused(wan, changes, message):
    with pytest.raises(UserError, match=message):
        wan.submit("red", **SMALL | changes)


def test_the_form_leaves_out_what_is_hidden(wan):
    spec = load_pipeline_spec(wan.config.pipeline)
    values = form_values.DEFAULTS | {"prompt": "red", "sections": [[0.1, "blue"]], "history_groups": 5,
                                     "start_from": form_values.HISTORY, "job": "0" * 32}
    checked = form_values.check_form(values, wan.service.services, OWNER)
    assert checked.params.sections == () and (checked.params.height, checked.params.width) == (480, 832)
    assert (checked.params.num_frames, checked.params.job) == (65, "")
    assert validate({"prompt": "red"}, wan.service.services, OWNER)[0]["num_frames"] == 81, "its own length"
    line = describe_limits(spec)
    assert "history groups, history noise, history follow, sink period: this model denoises the whole" in line


def test_the_form_shows_the_pipelines_own_values_and_hides_what_it_cannot_do(wan):
    handlers = generate.Handlers(Page(wan.service, None))
    line, *shown = handlers.hide_unsupported("", form_values.FILE)
    names = (*generate.PANELS, *generate.HIDEABLE)
    visible = dict(zip(names, [update["visible"] for update in shown], strict=True))
    assert [name for name, value in visible.items() if value] == ["negative_prompt", "loras"] and "no sections" in line
    assert handlers.own_values("") == (50, 5.0, 5.062, "", "") and handlers.initial["num_inference_steps"] == 50
    wan.service.store.set_value("options", {"pipeline": "own"})
    assert handlers.restore_draft(None) == [gr.skip()] * len(form_values.NAMES)


def test_a_new_pipeline_in_the_settings_gives_a_new_form_its_values(harness, diffusers_folder):
    handlers = generate.Handlers(Page(harness.service, None))
    harness.config = harness.config.model_copy(update={"folders": (diffusers_folder,)})
    services = handlers.service.services = type(handlers.service.services).from_config(harness.config)
    ltx = next(asset.id for asset in services.assets.list("pipeline") if asset.name.endswith("LTXPipeline"))
    services.store.set_value("options", {"pipeline": ltx})
    values = dict(zip(form_values.NAMES, handlers.restore_draft(None), strict=True))
    assert (values["num_inference_steps"], values["guidance_scale"]) == (50, 3.0)
    assert handlers.hide_unsupported("own", form_values.FILE)[3]["visible"], "the app's own pipeline can do all"


@pytest.mark.parametrize("kind", LENGTHS)
def test_the_spec_equals_the_loaded_pipelines_grid(diffusers_folder, kind):
    spec, grid = load_pipeline_spec(diffusers_folder / kind), load_pipeline(diffusers_folder / kind).grid
    assert all(getattr(spec, name) == value for name, value in vars(grid).items())
    assert spec.kind == kind and spec.groups(LENGTHS[kind]) == 1


def test_assets_hold_the_pipelines_by_class(wan, diffusers_folder):
    wan.config = wan.config.model_copy(update={"folders": (diffusers_folder,)})
    services = type(wan.service.services).from_config(wan.config)
    found = {asset.name.rsplit("/")[-1]: asset for asset in services.assets.list("pipeline")}
    assert {name: asset.detail for name, asset in found.items()} == {kind: kind for kind in LENGTHS}
    params, _ = validate({"prompt": "red", "pipeline": found["LTXPipeline"].id, "height": 64, "width": 64,
                          "num_frames": 17}, services, OWNER)
    assert (params["num_inference_steps"], params["guidance_scale"], params["frame_rate"]) == (50, 3.0, 25.0)
