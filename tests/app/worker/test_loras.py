"""LoRAs of jobs: found as assets, checked when a job is submitted, computed with, stored, and restored in the form."""

from __future__ import annotations

import shutil

import pytest
import torch
from pipelines import make_pipeline
from safetensors.torch import load_file, save_file
from tiny_adapters import save_adapter
from tiny_diffusers import make_diffusers_pipeline, save_diffusers_pipeline
from waiting import wait_for
from worker_harness import OWNER

from app.inference.fragmented_mp4 import read_settings
from app.storage.asset_scanner import ASSET_LABELS
from app.storage.jobs import JobKind, JobState
from app.ui import form_values
from app.ui.actions import GenerateActions
from app.ui.html.job import settings_parts
from app.ui.loras import lora_choices
from lvdm.generation.latent_store import read_latents
from odvae.utils.errors import UserError


@pytest.fixture
def loras(harness, tmp_path):
    """Adapters for the harness's pipeline: two with a file name of their own, one of a training, and others."""
    transformer = make_pipeline(sample_height=32, sample_width=32).transformer
    save_adapter(transformer, tmp_path / "styles", 1, name="ink.safetensors")
    save_adapter(transformer, tmp_path / "more", 2, name="ink.safetensors")
    save_adapter(transformer, tmp_path / "work/runs/mine/lora", 3, rank=4)
    run = tmp_path / "work/runs/mine"
    (run / "config.yaml").write_text("output: x\nmodel: {}\nloop: {}\nwindows: {}\n")
    (run / "metrics.jsonl").write_text("")
    save_adapter(make_diffusers_pipeline("WanPipeline").transformer, tmp_path / "styles", 4, name="wan.safetensors")
    save_file({"model.diffusion_model.weight": torch.zeros(2, 2)}, tmp_path / "styles/checkpoint.safetensors")
    harness.service.services.assets.invalidate()
    return {asset.name.removeprefix(f"{tmp_path.name}/"): asset
            for asset in harness.service.services.assets.list("lora")}


def test_adapters_are_found_below_the_folders_and_in_trainings(loras):
    assert {name: asset.detail for name, asset in loras.items()} == {
        "more/ink": "rank 2", "styles/ink": "rank 2", "styles/wan": "rank 2", "work/runs/mine/lora": "rank 4"}
    assert ASSET_LABELS["lora"] == "LoRA"


def latents_of(harness, job):
    return load_file(harness.file(job, "final.safetensors"))["latents"]


def test_jobs_with_adapters(harness, loras):
    first, second = ({"id": loras[f"{folder}/ink"].id, "weight": weight} for folder, weight in (("styles", 0.5),
                                                                                               ("more", 2)))
    chosen = {"plain": [], "one": [first], "both": [first, second], "weak": [first | {"weight": 0.1}], "again": []}
    jobs = {name: harness.submit("red", loras=value) for name, value in chosen.items()}
    assert [lora["name"] for lora in jobs["both"].params["loras"]] == [loras["styles/ink"].name, loras["more/ink"].name]
    harness.start_worker()
    jobs = {name: harness.wait(job) for name, job in jobs.items()}
    assert {job.state for job in jobs.values()} == {JobState.DONE}
    latents = {name: latents_of(harness, job) for name, job in jobs.items()}
    assert torch.equal(latents["again"], latents["plain"]), "nothing is left of an adapter"
    assert all((latents["one"] - latents[name]).abs().max() > 1e-3 for name in ("plain", "both", "weak"))
    parts = read_latents(harness.file(jobs["one"]))[0].parts
    assert parts["adapter ink"].startswith("0.5 ")
    assert read_settings(harness.file(jobs["one"]))["adapters"] == {"ink": parts["adapter ink"]}
    assert "adapters" not in read_settings(harness.file(jobs["plain"]))
    assert len(read_settings(harness.file(jobs["both"]))["adapters"]) == 2, "files of one name, told apart by folders"
    assert f"LoRA {loras['styles/ink'].name} 0.5" in settings_parts(jobs["one"])
    extended = harness.submit("red", job=jobs["one"].id, seconds=4)
    assert extended.params["loras"] == jobs["one"].params["loras"]
    assert harness.wait(extended).state is JobState.DONE
    with pytest.raises(UserError, match=r"extended with the LoRAs .*styles/ink 0.5"):
        harness.submit("red", job=jobs["one"].id, seconds=4, loras=[second])
    decoded = harness.wait(harness.submit(kind=JobKind.DECODE, job=jobs["one"].id))
    assert decoded.state is JobState.DONE


def test_the_form_restores_adapters(harness, loras, tmp_path):
    actions = GenerateActions(harness.service)
    values = form_values.DEFAULTS | {"prompt": "red", "seconds": 2, "num_inference_steps": 2, "loras": [
        {"id": loras["styles/ink"].id, "weight": 0.5, "name": "any"}, {"id": loras["work/runs/mine/lora"].id}]}
    job = harness.service.find(actions.generate(values, None, "", OWNER).followed, OWNER)
    again = actions.act("reuse", job.id, "", None, OWNER).values
    assert again["loras"] == job.params["loras"] and again["loras"][1]["weight"] == 1.0
    twin = harness.service.find(actions.generate(again, None, "", OWNER).followed, OWNER)
    assert twin.params == job.params
    harness.start_worker()
    settings = read_settings(harness.file(harness.wait(job)))
    shutil.rmtree(tmp_path / "more")  # else "ink" may be either
    harness.service.services.assets.invalidate()
    restored = actions.restore(settings, seed=True)
    assert restored.values["loras"] == job.params["loras"] and "LoRA" not in restored.notice
    shutil.rmtree(tmp_path / "styles")
    harness.service.services.assets.invalidate()
    assert "These LoRAs of the video are not here: ink." in actions.restore(settings, seed=True).notice
    with pytest.raises(UserError, match="styles/ink is gone"):
        actions.act("duplicate", job.id, "", None, OWNER)


def test_a_job_whose_adapter_changes_is_started_again(harness, loras, gate):
    job = harness.submit("red, waits 1", loras=[{"id": loras["styles/ink"].id}])
    worker = harness.start_worker()
    wait_for(lambda: harness.reload(job).result.get("chunks"), "the first group")
    worker.quit.set()
    gate(1)
    harness.stop_workers()
    other = load_file(loras["more/ink"].path)
    save_file(other, loras["styles/ink"].path)
    harness.start_worker()
    job = harness.wait(job)
    assert job.state is JobState.DONE and "restarted" in job.notes[0]
    same = harness.wait(harness.submit("red, waits 1", loras=[{"id": loras["more/ink"].id}]))
    assert torch.equal(latents_of(harness, job), latents_of(harness, same))


def test_what_does_not_fit_is_named_when_it_is_submitted(harness, loras, tmp_path):
    def fails(message, *chosen, **settings):
        with pytest.raises(UserError, match=message):
            harness.submit("red", loras=list(chosen), **settings)

    ink, wan = ({"id": loras[name].id} for name in ("styles/ink", "styles/wan"))
    fails(r"loras: .*styles/wan is for another model than this LVDMPipeline", ink, wan)
    fails(r"loras: .*styles/ink is chosen twice", ink, ink)
    fails(r"there is no LoRA 0000 here", {"id": "0000"})
    fails(r"weight: must be at most 10", ink | {"weight": 11})
    fails(r"loras", *[ink] * 9)
    wide = {name: tensor.repeat(2, 1) if "lora_B" in name else tensor
            for name, tensor in load_file(loras["styles/ink"].path).items()}
    save_file(wide, tmp_path / "styles/wide.safetensors")
    save_diffusers_pipeline("WanPipeline", tmp_path / "wan")
    assets = harness.service.services.assets
    assets.invalidate()
    found = {asset.name.rpartition("/")[2]: asset for kind in ("lora", "pipeline") for asset in assets.list(kind)}
    fails(r"styles/wide is for another model .* is 48x24 there, and 24x24 in the pipeline", {"id": found["wide"].id})
    fails(r"styles/ink is for another model than this WanPipeline", ink, pipeline=found["wan"].id)
    assert harness.submit("red", loras=[wan], pipeline=found["wan"].id, num_frames=9).params["loras"][0]["weight"] == 1
    choices, _ = lora_choices(assets, tmp_path / "wan")
    assert [choice["id"] for choice in choices] == [wan["id"]]
    assert len(lora_choices(assets, harness.config.pipeline)[0]) == 3
