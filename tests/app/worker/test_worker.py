"""Generation jobs in the worker: growing, stopped, interrupted, resumed, out of memory."""

from __future__ import annotations

import errno
import io
import json
import re

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from waiting import wait_for
from worker_harness import WorkerHarness

import app.worker.worker
from app.inference.fragmented_mp4 import read_settings
from app.inference.model_manager import ModelManager, explain
from app.storage.jobs import JobKind, JobSignal, JobState
from odvae.data.video.reader import VideoReader
from odvae.utils.errors import UserError

LONG = {"seconds": 4, "num_inference_steps": 2, "seed": 11}  # 33 frames in 5 groups


def pixels(path) -> np.ndarray:
    with VideoReader(path) as video:
        return np.concatenate(list(video.iter_chunks()))


def latents(harness, job):
    return load_file(harness.file(job, "final.safetensors"))["latents"]


@pytest.fixture
def uninterrupted(harness):
    """A finished job that was not interrupted."""
    harness.start_worker()
    job = harness.wait(harness.submit("red", **LONG))
    harness.stop_workers()
    assert job.state is JobState.DONE, job.error
    return job


def test_a_growing_video_is_available_and_stores_its_settings(harness, gate, monkeypatch):
    monkeypatch.setattr(app.worker.worker, "CHUNK_LIFETIME", 0.0)
    harness.start_worker()
    job = harness.submit("a red circle, waits 2", negative_prompt="blue", **LONG)
    wait_for(lambda: harness.reload(job).result.get("chunks") == 2 and harness.reload(job).progress.group == 3,
             "two groups")
    chunks = [harness.service.job_files.chunk(job, number) for number in range(3)]
    assert chunks[2] is None
    with av.open(io.BytesIO(b"".join(path.read_bytes() for path in chunks[:2]))) as growing:
        assert sum(1 for _ in growing.decode(video=0)) == 9
    now = harness.reload(job)
    assert now.progress.groups == 5 and now.result["frames"] == 9 and now.progress.seconds_left > 0
    assert harness.file(job, "preview.webp").is_file() and harness.file(job, "poster.webp").is_file()
    gate(2)
    job = harness.wait(job)
    assert (job.state, job.result["frames"], job.progress.fraction) == (JobState.DONE, 33, 1.0)
    settings = read_settings(harness.file(job))
    expected = {"prompt": job.title, "seed": 11, "num_frames": 33, "made_by": "lvdm-app"}
    assert expected.items() <= settings.items()
    assert json.loads(harness.file(job, "params.json").read_text())["seed"] == 11
    again = harness.wait(harness.service.duplicate(job.id, "me"))
    wait_for(lambda: not harness.file(job, "chunks").exists(), "its chunks go")
    assert sorted(path.name for path in harness.service.job_files.folder(job).iterdir()) == [
        "final.mp4", "final.safetensors", "log.txt", "params.json", "poster.webp"]
    assert again.params == job.params and torch.equal(latents(harness, again), latents(harness, job))
    assert np.array_equal(pixels(harness.file(again)), pixels(harness.file(job)))


@pytest.fixture(scope="module")
def reference(tmp_path_factory, gates, pipeline_folder):
    """Latents and pixels of a job that was not interrupted."""
    (gates / "3").touch()
    harness = WorkerHarness(tmp_path_factory.mktemp("reference"), pipeline_folder)
    harness.start_worker()
    job = harness.wait(harness.submit("red, waits 3", **LONG))
    harness.stop_workers()
    return latents(harness, job), pixels(harness.file(job))


@pytest.mark.parametrize("way", ["pause", "quit", "stop"])
def test_an_interrupted_job_resumes_to_the_same_video(harness, gate, reference, way):
    worker = harness.start_worker()
    job = harness.submit("red, waits 3", **LONG)
    wait_for(lambda: harness.reload(job).progress.group == 4 and harness.reload(job).progress.step == 0, "three groups")
    if way == "quit":
        worker.quit.set()
    else:
        harness.service.signal(job.id, JobSignal(way), "me")
    gate(3)
    expected = {"pause": JobState.PAUSED, "quit": JobState.QUEUED, "stop": JobState.STOPPED}[way]
    wait_for(lambda: harness.reload(job).state is expected, f"{way} is heard")
    kept = len(list(harness.file(job, "final.parts").glob("*.safetensors")))
    assert kept >= 3
    if way == "stop":
        frames = harness.reload(job).result["frames"]
        assert len(pixels(harness.file(job))) == frames == read_settings(harness.file(job))["num_frames"] < 33
        assert latents(harness, job).shape[1] == 1 + (frames - 1) // 4
    if way == "quit":
        harness.stop_workers()
        harness.start_worker()
    else:
        harness.service.resume(job.id, "me")
    job = harness.wait(job)
    assert (job.state, job.result["frames"]) == (JobState.DONE, 33), job.error
    assert torch.equal(latents(harness, job), reference[0])
    assert np.array_equal(pixels(harness.file(job)), reference[1])


def test_cancel_discards_the_job_and_the_next_one_runs(harness, gate):
    harness.start_worker()
    job, after = harness.submit("waits 1", **LONG), harness.submit("blue")
    wait_for(lambda: harness.reload(job).progress.group == 2, "a group")
    harness.service.signal(job.id, JobSignal.CANCEL, "me")
    gate(1)
    assert harness.wait(job).state is JobState.CANCELLED and not harness.service.job_files.folder(job).exists()
    assert harness.wait(after).state is JobState.DONE
    assert harness.wait(harness.service.resume(job.id, "me")).result["frames"] == 33, "its settings are still there"


def test_out_of_memory_uses_the_next_fallback_and_notes_it(harness):
    harness.start_worker()
    decode = harness.submit("no memory to decode", height=128, width=128)
    sample, after = harness.submit("no memory to sample"), harness.submit("red")
    decode = harness.wait(decode)
    assert decode.state is JobState.DONE and decode.result["frames"] == 17
    message = "Out of memory in decoding, at group 1 of 3; continued with decoding in tiles of 64x64 pixels."
    assert decode.notes == (message,) and read_settings(harness.file(decode))["notes"] == [message]
    sample = harness.wait(sample)
    assert (sample.state, sample.error) == (JobState.FAILED, "The machine ran out of memory.")
    assert "smaller size" in sample.advice
    assert harness.wait(after).state is JobState.DONE


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), "out of memory.*smaller size"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full.*Delete videos"),
        (UserError("frames must be 1+4k: 17 is the nearest"), "17 is the nearest"),
        (KeyError("weights"), "KeyError.*log"),
    ],
)
def test_errors_come_with_advice(error, message):
    assert re.search(message, " ".join(explain(error)))


def test_an_error_keeps_the_finished_part_and_the_log(harness):
    harness.start_worker()
    job = harness.wait(harness.submit("breaks"))
    assert (job.state, job.error) == (JobState.FAILED, "KeyError: 'weights'")
    assert len(pixels(harness.file(job))) == 1 and "KeyError" in harness.file(job, "log.txt").read_text()


@pytest.mark.parametrize(("prompt", "message"), [
    ("no numbers to sample", "The transformer gave NaN or infinity at noise level .*project_out.bias is not finite"),
    ("no numbers to decode", "The VAE's decoder gave NaN or infinity .*decoder.conv_out.bias is not finite")])
def test_non_finite_values_fail_the_job_and_leave_no_video(harness, prompt, message):
    harness.start_worker()
    job, after = harness.wait(harness.submit(prompt, **LONG)), harness.wait(harness.submit("red", **LONG))
    assert job.state is JobState.FAILED and re.match(message, job.error)
    assert sorted(path.name for path in harness.service.job_files.folder(job).iterdir()) == ["log.txt", "params.json"]
    assert "NonFiniteError" in harness.file(job, "log.txt").read_text()
    assert after.state is JobState.DONE and len(pixels(harness.file(after))) == 33


def test_a_change_of_precision_restarts_the_video(harness, gate, monkeypatch):
    worker = harness.start_worker()
    job = harness.submit("red, waits 2", **LONG)
    wait_for(lambda: harness.reload(job).progress.group == 3 and harness.reload(job).progress.step == 0, "two groups")
    worker.quit.set()
    gate(2)
    wait_for(lambda: harness.reload(job).state is JobState.QUEUED, "it stops")
    harness.stop_workers()
    monkeypatch.setattr(ModelManager, "dtype", torch.bfloat16)
    harness.start_worker()
    job = harness.wait(job)
    assert (job.state, job.result["frames"]) == (JobState.DONE, 33), job.error
    assert job.notes == ("The model has changed since this job started, so it was restarted.",)


def test_an_extended_video_equals_one_generated_at_that_length(harness, uninterrupted):
    harness.start_worker()
    longer = harness.wait(harness.submit("red", job=uninterrupted.id, **LONG | {"seconds": 6}))
    straight = harness.wait(harness.submit("red", **LONG | {"seconds": 6}))
    assert longer.result["frames"] == 49 and torch.equal(latents(harness, longer), latents(harness, straight))
    turned = harness.wait(harness.submit("blue", job=uninterrupted.id, **LONG | {"seconds": 6}))
    assert turned.result["settings"]["sections"] == [[4.125, "blue"]] and turned.title == "blue"
    assert torch.equal(latents(harness, turned)[:, :9], latents(harness, uninterrupted)), "what was there stays"
    harness.service.delete(uninterrupted.id, "me")
    with pytest.raises(UserError, match="There is no job"):
        harness.submit("red", job=uninterrupted.id, seconds=8)


def test_decoding_again_in_tiles_samples_nothing(harness, uninterrupted):
    harness.start_worker()
    again = harness.wait(harness.service.submit(JobKind.DECODE, {"job": uninterrupted.id}, "me"))
    assert again.state is JobState.DONE
    assert np.array_equal(pixels(harness.file(again)), pixels(harness.file(uninterrupted)))
    large = harness.wait(harness.submit("red", height=128, width=128))
    tiled = harness.wait(harness.service.submit(JobKind.DECODE, {"job": large.id, "tile": 64}, "me"))
    difference = np.abs(pixels(harness.file(tiled)).astype(int) - pixels(harness.file(large))).mean()
    difference = np.abs(pixels(harness.file(tiled)).astype(int) - pixels(harness.file(large))).mean()
    assert 0 < difference < 32, "tiles are not exact; with random weights they are only near"


def test_the_quota_deletes_the_oldest_jobs_but_no_favorites(harness, uninterrupted):
    harness.service.favorite(uninterrupted.id, True, "me")
    size = harness.service.job_files.size_of(uninterrupted)
    harness.config = harness.config.model_copy(update={"max_disk": size * 5 // 2})
    harness.start_worker()
    second, third = (harness.wait(harness.submit(f"red {i}", **LONG)) for i in (2, 3))
    wait_for(lambda: not harness.service.job_files.folder(second).exists(), "the limit of the configuration applies")
    assert harness.service.store.get(second.id) is None
    harness.service.store.set_value("options", {"max_disk": size * 3 // 2})
    fourth = harness.wait(harness.submit("red 4", **LONG))
    harness.stop_workers()
    left = {job.title for job in harness.service.history("me")}
    assert left == {uninterrupted.title, fourth.title} and not harness.service.job_files.folder(third).exists()


def test_a_failed_model_load_is_reported_by_the_job(harness, pipeline_folder, monkeypatch):
    import scripted_pipeline

    def broken(folder):
        raise UserError("weights: the folder is empty.")

    monkeypatch.setattr(scripted_pipeline, "load", broken)
    job = harness.submit()
    harness.start_worker()
    job = harness.wait(job)
    assert (job.state, job.error) == (JobState.FAILED, "weights: the folder is empty.")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"prompt": "  "}, "prompt: is empty"),
        ({"width": 40}, "width: must be a multiple of 16 up to 1440.*nearest is 32"),
        ({"width": 4096}, "width:.*nearest is 1440"),
        ({"num_frames": 18}, r"num_frames: must be 1 \+ 4k, but 18 was given; the nearest is 17"),
        ({"seconds": 1e9}, "seconds: must be at most 60"),
        ({"seconds": float("nan")}, "seconds: must be a finite number"),
        ({"num_inference_steps": 0}, "num_inference_steps: must be at least 1"),
        ({"num_inference_steps": "many"}, "num_inference_steps: must be a whole number"),
        ({"seed": 2**40}, "seed: must be at most"),
        ({"guidance_scale": float("inf")}, "guidance_scale: must be a finite number"),
        ({"scheduler": "ddim"}, "scheduler: must be 'euler'"),
        ({"sections": [[1.0, "a"], [0.5, "b"]]}, "sections: a prompt's sections must start at second 0 and ascend"),
        ({"sections": [[99.0, "a"]]}, "sections: the last begins at second 99"),
        ({"upload": "../../etc/passwd"}, "upload: is not an id"),
        ({"upload": "0" * 32}, "."),
        ({"job": "0" * 32}, "There is no job"),
        ({"pipeline": "/etc"}, "."),
        ({"temperature": 1}, "temperature: there is no such setting"),
        ({"prompt": "x" * 5000}, "prompt: is too long, at most 2000"),
        ({"prompt": ["x"]}, "prompt: must be a valid string"),
    ],
)
def test_invalid_settings_are_refused_with_one_line(harness, raw, message):
    with pytest.raises(UserError, match=message) as failure:
        harness.submit(**raw)
    assert len(str(failure.value)) < 400
    assert harness.service.history("me") == []


def test_validate_fills_defaults_and_accepts_its_own_output(harness):
    job = harness.service.submit(JobKind.GENERATE, {"prompt": " red ", "seed": "", "seconds": 3}, "me")
    params = job.params
    assert (params["prompt"], params["num_frames"], params["seconds"], params["frame_rate"]) == ("red", 25, 3.125, 8.0)
    assert (params["height"], params["width"]) == (32, 32) and 0 <= params["seed"] < 2**31
    assert harness.service.duplicate(job.id, "me").params == params
    assert harness.service.edit(job.id, {**params, "prompt": "blue"}, "me").title == "blue"
