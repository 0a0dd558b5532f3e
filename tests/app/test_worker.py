"""One worker, one queue: in order, cancelled in mid-way, and not stopped by an error."""

import errno
import re
from functools import partial

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from app.engine import Engine, explain, load_pipeline
from app.jobs import State
from odvae.runtime.errors import UserError

ASK = {"prompt": "a red circle", "seed": 5, "seconds": 4, "steps": 2}  # 33 frames in groups of 1, 8, 8, 8, 8


def frames_in(path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def ended(worker, job, until):
    until(lambda: not worker.store.get(job.id).state.active, "the job ends")
    return worker.store.get(job.id)


def test_jobs_run_in_order_with_the_settings_asked(start_worker, fake, until):
    worker = start_worker(fake)
    jobs = [worker.submit({**ASK, "prompt": f"number {k}", "negative_prompt": "blur", "guidance": 2}) for k in range(3)]
    for job in jobs:
        job = ended(worker, job, until)
        assert job.state is State.DONE and job.progress.fraction == 1.0
        assert frames_in(worker.library.video(job)) == job.params.frames == job.progress.frames == 33
        assert worker.library.poster(job).is_file()
        for group in range(1, 6):
            with safe_open(worker.library.latents(job, group), "pt") as file:
                assert file.get_tensor("latents").shape == (4, 1 if group == 1 else 2, 4, 4)
    assert [asked["prompt"] for asked in fake.asked] == ["number 0", "number 1", "number 2"]
    assert fake.asked[0] == {
        "prompt": "number 0", "negative_prompt": "blur", "frames": 33, "steps": 2, "seed": 5, "guidance_scale": 2.0,
    }  # fmt: skip


def test_the_video_grows_and_cancel_keeps_what_is_finished(start_worker, paced, until):
    worker = start_worker(paced)
    job, waiting = worker.submit(ASK), worker.submit(ASK)
    for group, frames in enumerate((1, 9, 17), start=1):
        paced.allow(1)
        until(lambda made=frames: worker.store.get(job.id).progress.frames == made, f"group {group} is in the video")
        assert worker.store.get(job.id).revision == group
        assert frames_in(worker.library.video(job)) == frames
    worker.cancel(waiting.id)
    worker.cancel(job.id)
    assert ended(worker, job, until).state is State.CANCELLED
    assert frames_in(worker.library.finished_video(job.id)) == 17
    assert worker.library.latents(job, 3).is_file()
    assert ended(worker, waiting, until).state is State.CANCELLED
    with pytest.raises(UserError, match="without a video"):
        worker.library.finished_video(waiting.id)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "out of memory.*fewer seconds"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), "out of memory.*fewer seconds"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full.*Delete videos"),
        (UserError("frames must be 1+4k: 17 is the nearest"), "17 is the nearest"),
        (KeyError("weights"), "KeyError.*log"),
    ],
)
def test_an_error_ends_its_job_readably_and_the_next_one_runs(start_worker, fake, until, error, told):
    fake.fails["bad"] = error
    worker = start_worker(fake)
    bad, good = worker.submit({**ASK, "prompt": "bad"}), worker.submit(ASK)
    bad = ended(worker, bad, until)
    assert bad.state is State.FAILED
    assert re.search(told, f"{bad.error} {bad.advice}")
    assert frames_in(worker.library.video(bad)) == 1, "what was finished before is kept"
    assert ended(worker, good, until).state is State.DONE
    assert explain(error) == (bad.error, bad.advice)


def test_a_stopped_server_leaves_interrupted_work_and_its_queue_goes_on(start_worker, fake, paced, until):
    first = start_worker(paced)
    job, queued = first.submit(ASK), first.submit({**ASK, "prompt": "later"})
    paced.allow(2)
    until(lambda: first.store.get(job.id).progress.frames == 9, "two groups are made")
    first.stop()
    first.library.close()

    second = start_worker(fake)
    assert second.store.get(job.id).state is State.INTERRUPTED
    assert frames_in(second.library.finished_video(job.id)) == 9
    assert ended(second, queued, until).state is State.DONE
    again = ended(second, second.again(job.id), until)
    assert again.state is State.DONE and again.id != job.id and again.params == job.params


def test_a_model_that_cannot_be_loaded_is_told_by_the_job(start_worker, until):
    def broken():
        raise UserError("weights: the folder is empty.")

    worker = start_worker(None, begin=False)
    worker.engine = Engine(broken)
    worker.start()
    job = ended(worker, worker.submit(ASK), until)
    assert (job.state, job.error) == (State.FAILED, "weights: the folder is empty.")


def test_lengths_are_put_on_the_grid_of_the_model_that_is_loaded(start_worker, fake, until):
    fake.transformer.config.frame_rate = 16.0
    worker = start_worker(fake, begin=False)
    job = worker.submit(ASK)  # the model is not loaded yet: planned at 8 frames a second
    worker.start()
    job = ended(worker, job, until)
    assert (job.params.frames, job.params.frame_rate) == (65, 16.0) and fake.asked[0]["frames"] == 65


def test_delete_takes_the_files_and_only_of_what_does_not_run(start_worker, paced, until):
    worker = start_worker(paced)
    job = worker.submit(ASK)
    until(lambda: worker.store.get(job.id).state is State.RUNNING, "the job runs")
    with pytest.raises(UserError, match="Cancel it first"):
        worker.library.delete(job.id)
    paced.allow(5)
    ended(worker, job, until)
    worker.library.delete(job.id)
    assert not worker.library.folder(job).exists() and worker.store.get(job.id) is None
    with pytest.raises(UserError, match="no video"):
        worker.again(job.id)


def test_one_folder_has_one_server(start_worker, fake):
    start_worker(fake)
    with pytest.raises(UserError, match="Another lvdm-app"):
        start_worker(fake)


def test_a_full_queue_is_told(start_worker, fake):
    worker = start_worker(fake, begin=False)
    worker._max_queued = 1
    worker.submit(ASK)
    with pytest.raises(UserError, match="queue is full"):
        worker.submit(ASK)


def test_a_real_pipeline_from_a_folder_gives_what_it_gives_alone(start_worker, tmp_path, until):
    from lvdm import LVDMPipeline, LVDMTransformer3DModel
    from lvdm.text import WordHashEncoder
    from odvae import AutoencoderKLODVAE

    torch.manual_seed(0)
    vae = AutoencoderKLODVAE(
        latent_channels=2, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        latents_mean=[0.1, -0.2], latents_std=[0.5, 2.0],
    )  # fmt: skip
    transformer = LVDMTransformer3DModel(
        in_channels=2, hidden_size=24, num_layers=1, num_attention_heads=2, text_dim=16,
        sample_height=16, sample_width=32,
    )  # fmt: skip
    pipeline = LVDMPipeline(vae.eval(), transformer.eval(), WordHashEncoder(dim=16))
    pipeline.save_pretrained(tmp_path / "pipeline")

    worker = start_worker(None, begin=False)
    worker.engine = Engine(partial(load_pipeline, str(tmp_path / "pipeline")))
    worker.start()
    asked = {"prompt": "a red circle", "negative_prompt": "blue", "seed": 5, "seconds": 2, "steps": 2, "guidance": 2}
    job = ended(worker, worker.submit(asked), until)
    assert (job.state, job.error) == (State.DONE, "")
    alone = pipeline("a red circle", negative_prompt="blue", seed=5, frames=17, steps=2, guidance_scale=2.0)
    kept = [load_file(worker.library.latents(job, group))["latents"] for group in range(1, job.progress.groups + 1)]
    torch.testing.assert_close(torch.cat(kept, dim=1), alone.latents[0], rtol=0, atol=1e-5)
    with av.open(str(worker.library.video(job))) as video:
        shown = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
    assert shown.shape == (17, 256, 512, 3)
    assert np.abs(shown[:, 8::16, 8::16].astype(int) - alone.frames[0]).mean() < 4, "the same pictures, but for H.264"


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model_index\.json"):
        load_pipeline(str(tmp_path))
