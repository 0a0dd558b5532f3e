"""Videos on their way: watched while they are made, ended early, broken off, gone on with, short of memory."""

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

import app.worker.worker
from app.inference.fragmented_mp4 import read_settings
from app.inference.model_manager import ModelManager, explain
from app.storage.jobs import JobKind, JobSignal, JobState
from odvae.data.video.reader import VideoReader
from odvae.utils.errors import UserError

LONG = {"seconds": 4, "steps": 2, "seed": 11}  # 33 frames in 5 groups


def pixels(path) -> np.ndarray:
    with VideoReader(path) as video:
        return np.concatenate(list(video.iter_chunks()))


def latents(bench, job):
    return load_file(bench.file(job, "final.safetensors"))["latents"]


@pytest.fixture
def whole(bench):
    """What is made without a break."""
    bench.work()
    job = bench.ended(bench.submit("red", **LONG))
    bench.rest()
    assert job.state is JobState.DONE, job.error
    return job


def test_a_video_is_watched_while_it_is_made_and_carries_its_settings(bench, gate, until, monkeypatch):
    monkeypatch.setattr(app.worker.worker, "KEPT", 0.0)
    bench.work()
    job = bench.submit("a red circle, waits 2", negative_prompt="blue", **LONG)
    until(lambda: bench.now(job).result.get("chunks") == 2 and bench.now(job).progress.group == 3, "two groups")
    chunks = [bench.service.library.chunk(job, number) for number in range(3)]
    assert chunks[2] is None
    with av.open(io.BytesIO(b"".join(path.read_bytes() for path in chunks[:2]))) as growing:
        assert sum(1 for _ in growing.decode(video=0)) == 9
    now = bench.now(job)
    assert now.progress.groups == 5 and now.result["frames"] == 9 and now.progress.seconds_left > 0
    assert bench.file(job, "preview.webp").is_file() and bench.file(job, "poster.webp").is_file()
    gate(2)
    job = bench.ended(job)
    assert (job.state, job.result["frames"], job.progress.fraction) == (JobState.DONE, 33, 1.0)
    told = read_settings(bench.file(job))
    assert (told["prompt"], told["seed"], told["frames"], told["made_by"]) == (job.title, 11, 33, "lvdm-app")
    assert json.loads(bench.file(job, "params.json").read_text())["seed"] == 11
    again = bench.ended(bench.service.duplicate(job.id, "me"))
    until(lambda: not bench.file(job, "chunks").exists(), "its chunks go")
    assert sorted(path.name for path in bench.service.library.folder(job).iterdir()) == [
        "final.mp4", "final.safetensors", "log.txt", "params.json", "poster.webp"]
    assert again.params == job.params and torch.equal(latents(bench, again), latents(bench, job))
    assert np.array_equal(pixels(bench.file(again)), pixels(bench.file(job)))


@pytest.mark.parametrize("way", ["pause", "quit", "stop"])
def test_what_was_broken_off_goes_on_to_the_same_video(bench, gate, until, whole, way):
    worker = bench.work()
    job = bench.submit("red, waits 3", **LONG)
    until(lambda: bench.now(job).progress.group == 4 and bench.now(job).progress.step == 0, "three groups")
    if way == "quit":
        worker.quit.set()
    else:
        bench.service.signal(job.id, JobSignal(way), "me")
    gate(3)
    wanted = {"pause": JobState.PAUSED, "quit": JobState.QUEUED, "stop": JobState.STOPPED}[way]
    until(lambda: bench.now(job).state is wanted, f"{way} is heard")
    kept = len(list(bench.file(job, "final.parts").glob("*.safetensors")))
    assert kept >= 3
    if way == "stop":
        frames = bench.now(job).result["frames"]
        assert len(pixels(bench.file(job))) == frames == read_settings(bench.file(job))["frames"] < 33
        assert latents(bench, job).shape[1] == 1 + (frames - 1) // 4
    if way == "quit":
        bench.rest()
        bench.work()
    else:
        bench.service.resume(job.id, "me")
    job = bench.ended(job)
    assert (job.state, job.result["frames"]) == (JobState.DONE, 33), job.error
    # The prompt is another one, so compare with a run of the same words that was not broken off.
    same = bench.ended(bench.submit("red, waits 3", **LONG))
    assert torch.equal(latents(bench, job), latents(bench, same))
    assert np.array_equal(pixels(bench.file(job)), pixels(bench.file(same)))


def test_cancel_throws_away_and_the_next_one_runs(bench, gate, until):
    bench.work()
    job, after = bench.submit("waits 1", **LONG), bench.submit("blue")
    until(lambda: bench.now(job).progress.group == 2, "a group")
    bench.service.signal(job.id, JobSignal.CANCEL, "me")
    gate(1)
    assert bench.ended(job).state is JobState.CANCELLED and not bench.service.library.folder(job).exists()
    assert bench.ended(after).state is JobState.DONE
    assert bench.ended(bench.service.resume(job.id, "me")).result["frames"] == 33, "its settings are still there"


def test_out_of_memory_takes_the_next_rung_and_says_so(bench):
    bench.work()
    decode = bench.submit("no memory to decode", height=128, width=128)
    sample, after = bench.submit("no memory to sample"), bench.submit("red")
    decode = bench.ended(decode)
    assert decode.state is JobState.DONE and decode.result["frames"] == 17
    told = "Memory ran out in decoding, at group 1 of 3; it went on decoding in tiles of 64x64 pixels."
    assert decode.notes == (told,) and read_settings(bench.file(decode))["notes"] == [told]
    sample = bench.ended(sample)
    assert (sample.state, sample.error) == (JobState.FAILED, "The machine ran out of memory.")
    assert "smaller size" in sample.advice
    assert bench.ended(after).state is JobState.DONE


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), "out of memory.*smaller size"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full.*Delete videos"),
        (UserError("frames must be 1+4k: 17 is the nearest"), "17 is the nearest"),
        (KeyError("weights"), "KeyError.*log"),
    ],
)
def test_errors_are_told_with_what_to_do(error, told):
    assert re.search(told, " ".join(explain(error)))


def test_an_error_keeps_what_is_finished_and_its_log(bench):
    bench.work()
    job = bench.ended(bench.submit("breaks"))
    assert (job.state, job.error) == (JobState.FAILED, "KeyError: 'weights'")
    assert len(pixels(bench.file(job))) == 1 and "KeyError" in bench.file(job, "log.txt").read_text()


@pytest.mark.parametrize(("prompt", "told"), [
    ("no numbers to sample", "The transformer gave NaN or infinity at noise level .*project_out.bias is not finite"),
    ("no numbers to decode", "The VAE's decoder gave NaN or infinity .*decoder.conv_out.bias is not finite")])
def test_numbers_that_are_none_fail_the_job_by_the_part_and_leave_no_video(bench, prompt, told):
    bench.work()
    job, after = bench.ended(bench.submit(prompt, **LONG)), bench.ended(bench.submit("red", **LONG))
    assert job.state is JobState.FAILED and re.match(told, job.error)
    assert sorted(path.name for path in bench.service.library.folder(job).iterdir()) == ["log.txt", "params.json"]
    assert "NonFiniteError" in bench.file(job, "log.txt").read_text()
    assert after.state is JobState.DONE and len(pixels(bench.file(after))) == 33


def test_a_precision_that_was_set_meanwhile_begins_a_video_anew(bench, gate, until, monkeypatch):
    worker = bench.work()
    job = bench.submit("red, waits 2", **LONG)
    until(lambda: bench.now(job).progress.group == 3 and bench.now(job).progress.step == 0, "two groups")
    worker.quit.set()
    gate(2)
    until(lambda: bench.now(job).state is JobState.QUEUED, "it stops")
    bench.rest()
    monkeypatch.setattr(ModelManager, "dtype", torch.bfloat16)
    bench.work()
    job = bench.ended(job)
    assert (job.state, job.result["frames"]) == (JobState.DONE, 33), job.error
    assert job.notes == ("The model has changed since this job began, so it began anew.",)


def test_longer_from_a_finished_video_is_as_if_it_had_been_so_long(bench, whole):
    bench.work()
    longer = bench.ended(bench.submit("red", job=whole.id, **LONG | {"seconds": 6}))
    straight = bench.ended(bench.submit("red", **LONG | {"seconds": 6}))
    assert longer.result["frames"] == 49 and torch.equal(latents(bench, longer), latents(bench, straight))
    turned = bench.ended(bench.submit("blue", job=whole.id, **LONG | {"seconds": 6}))
    assert turned.result["settings"]["sections"] == [[4.125, "blue"]] and turned.title == "blue"
    assert torch.equal(latents(bench, turned)[:, :9], latents(bench, whole)), "what was there stays"
    bench.service.delete(whole.id, "me")
    with pytest.raises(UserError, match="There is no job"):
        bench.submit("red", job=whole.id, seconds=8)


def test_decoding_again_in_tiles_samples_nothing(bench, whole):
    bench.work()
    again = bench.ended(bench.service.submit(JobKind.DECODE, {"job": whole.id}, "me"))
    assert np.array_equal(pixels(bench.file(again)), pixels(bench.file(whole))) and again.state is JobState.DONE
    large = bench.ended(bench.submit("red", height=128, width=128))
    tiled = bench.ended(bench.service.submit(JobKind.DECODE, {"job": large.id, "tile": 64}, "me"))
    difference = np.abs(pixels(bench.file(tiled)).astype(int) - pixels(bench.file(large))).mean()
    difference = np.abs(pixels(bench.file(tiled)).astype(int) - pixels(bench.file(large))).mean()
    assert 0 < difference < 32, "tiles are not exact; with random weights they are only near"


def test_the_oldest_go_first_when_there_is_no_room_and_favorites_stay(bench, whole):
    bench.service.favorite(whole.id, True, "me")
    bench.work()
    second, third = (bench.ended(bench.submit(f"red {i}", **LONG)) for i in (2, 3))
    limit = bench.service.library.bytes_of(whole) * 5 // 2
    bench.service.store.set_value("options", {"max_disk": limit})
    fourth = bench.ended(bench.submit("red 4", **LONG))
    bench.rest()
    left = {job.title for job in bench.service.history("me")}
    assert left == {whole.title, fourth.title} and not bench.service.library.folder(second).exists()
    assert bench.service.store.get(third.id) is None


def test_a_model_that_cannot_be_loaded_is_told_by_the_job(bench, small, monkeypatch):
    import small_engine

    def broken(folder):
        raise UserError("weights: the folder is empty.")

    monkeypatch.setattr(small_engine, "load", broken)
    job = bench.submit()
    bench.work()
    job = bench.ended(job)
    assert (job.state, job.error) == (JobState.FAILED, "weights: the folder is empty.")


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"prompt": "  "}, "prompt: is empty"),
        ({"width": 40}, "width: must be a multiple of 16 up to 1024.*nearest is 32"),
        ({"width": 4096}, "width:.*nearest is 1024"),
        ({"frames": 18}, r"frames: must be 1 \+ 4k, but 18 was given; the nearest is 17"),
        ({"seconds": 1e9}, "seconds: at most 60 here"),
        ({"seconds": float("nan")}, "seconds: must be a finite number"),
        ({"steps": 0}, "steps: must be at least 1"),
        ({"steps": "many"}, "steps: must be a whole number"),
        ({"seed": 2**40}, "seed: must be at most"),
        ({"guidance_scale": float("inf")}, "guidance_scale: must be a finite number"),
        ({"scheduler": "ddim"}, "scheduler: must be 'euler'"),
        ({"sections": [[1.0, "a"], [0.5, "b"]]}, "sections: a prompt's sections must start at second 0 and ascend"),
        ({"sections": [[99.0, "a"]]}, "sections: the last begins at second 99"),
        ({"upload": "../../etc/passwd"}, "upload: is no id"),
        ({"upload": "0" * 32}, "."),
        ({"job": "0" * 32}, "There is no job"),
        ({"pipeline": "/etc"}, "."),
        ({"temperature": 1}, "temperature: there is no such setting"),
        ({"prompt": "x" * 5000}, "prompt: is too long, at most 2000"),
        ({"prompt": ["x"]}, "prompt: must be a valid string"),
    ],
)
def test_settings_are_checked_with_one_clear_line(bench, raw, told):
    with pytest.raises(UserError, match=told) as failure:
        bench.submit(**raw)
    assert len(str(failure.value)) < 400
    assert bench.service.history("me") == []


def test_what_is_left_open_is_filled_and_its_own_output_is_taken_again(bench):
    job = bench.service.submit(JobKind.GENERATE, {"prompt": " red ", "seed": "", "seconds": 3}, "me")
    params = job.params
    assert (params["prompt"], params["frames"], params["seconds"], params["frame_rate"]) == ("red", 25, 3.125, 8.0)
    assert (params["height"], params["width"]) == (32, 32) and 0 <= params["seed"] < 2**31
    assert bench.service.duplicate(job.id, "me").params == params
    assert bench.service.edit(job.id, {**params, "prompt": "blue"}, "me").title == "blue"
