"""Open-Sora-Plan in the app: its own defaults, its schedulers in the form, and a job's progress over its groups."""

from __future__ import annotations

import pytest
from tiny_open_sora import make_open_sora_pipeline
from worker_harness import WorkerHarness

from app.storage.jobs import JobState
from app.tasks.context import JobContext
from app.tasks.pipeline_spec import load_pipeline_spec
from app.ui.form_values import schedulers
from app.ui.page import Page
from app.ui.tabs import generate
from lvdm.generation.latent_store import read_latents
from odvae.utils.errors import UserError


@pytest.fixture
def sora(tmp_path):
    make_open_sora_pipeline().save_pretrained(tmp_path / "sora")
    harness = WorkerHarness(tmp_path, tmp_path / "sora")
    yield harness
    harness.stop_workers()


def test_a_job_over_several_decoded_groups(sora, monkeypatch):
    seen = []
    before = JobContext.report_progress
    monkeypatch.setattr(JobContext, "report_progress", lambda self, **changes: (
        before(self, **changes), seen.append(self.progress))[0])
    job = sora.submit("red", seconds=1.5, scheduler="ddim")
    assert (job.params["num_frames"], job.params["guidance_scale"]) == (37, 7.5)
    sora.start_worker()
    job = sora.wait(job)
    assert job.state is JobState.DONE and job.result["frames"] == 37 and not job.result["extendable"]
    assert read_latents(sora.file(job))[0].parts["scheduler"] == "ddim"
    done = [progress.done for progress in seen if progress.total]
    assert done == sorted(done) and {progress.total for progress in seen if progress.total} == {2 + 2}
    assert done[-1] == 4 and {progress.groups for progress in seen if progress.phase == "sampling" and progress.step
                              } <= {1}
    with pytest.raises(UserError, match=r"scheduler: must be 'euler-ancestral'.* but 'heun' was given"):
        sora.submit("red", scheduler="heun")


def test_the_form_has_its_schedulers_defaults_and_length(sora):
    handlers = generate.Handlers(Page(sora.service, None))
    assert handlers.own_values("") == (100, 7.5, round(17 / 24, 3), "", "")
    choices = schedulers(load_pipeline_spec(sora.config.pipeline))
    assert choices[0] == ("Euler ancestral (default)", "")
    assert [value for _, value in choices[1:]] == ["euler-ancestral", "euler", "ddim", "ddpm", "unipc", "dpm"]
    scheduler, size, *_ = handlers.fit_choices("", "heun", "custom")
    assert scheduler["value"] == "" and "value" not in size and scheduler["choices"] == choices
    assert "value" not in handlers.fit_choices("", "ddim", "custom")[0]
