"""The defaults of a training follow from what is trained, and what is given stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from task_harness import TaskHarness

from app.tasks.train import TrainParams, default_params, validate

ROOT = Path(__file__).parents[3]


@pytest.fixture
def tasks(tmp_path: Path) -> TaskHarness:
    pipelines = tmp_path / "pipelines"
    for kind in ("LVDMPipeline", "OpenSoraPipeline"):
        (pipelines / kind / "transformer").mkdir(parents=True)
        (pipelines / kind / "model_index.json").write_text(f'{{"_class_name": "{kind}"}}')
    (pipelines / "videos").mkdir()
    (pipelines / "videos/a.mp4").touch()
    return TaskHarness(tmp_path, pipelines)


def test_open_sora_has_the_settings_of_its_config(tasks: TaskHarness, tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs/lvdm/open_sora_lora.yaml").read_text())
    pipeline = tasks.asset("pipeline", tmp_path / "pipelines/OpenSoraPipeline")
    found = default_params("lvdm", pipeline, 4, tasks.services)
    loop, optimizer = config["loop"], config["loop"]["optimizer"]
    for name in ("micro_batch_size", "gradient_accumulation_steps", "mixed_precision", "gradient_checkpointing"):
        assert getattr(found, name) == loop[name], name
    assert (found.optimizer, found.learning_rate) == (optimizer["name"], optimizer["learning_rate"])
    assert (found.frames, found.held_out) == (config["windows"]["frames"], config["windows"]["held_out"])
    assert (found.samples, found.sample_steps) == (config["sample"]["count"], config["sample"]["steps"])
    assert default_params("lvdm", pipeline, 0, tasks.services).learning_rate < found.learning_rate


def test_trained_weights_change_slower_than_new_ones(tasks: TaskHarness, tmp_path: Path) -> None:
    own = tasks.asset("pipeline", tmp_path / "pipelines/LVDMPipeline")
    new = TrainParams().learning_rate
    for model, init_from, lora in (("lvdm", own, 0), ("lvdm", "shipped", 8), ("odvae", "shipped", 0), ("lvdm", "?", 0)):
        found = default_params(model, init_from, lora, tasks.services)
        assert found.learning_rate < new and (found.optimizer == "adamw") == (lora > 0)
    for model, lora in ("lvdm", 0), ("odvae", 8):
        assert default_params(model, "", lora, tasks.services) == TrainParams()


def test_what_is_given_stays(tasks: TaskHarness, tmp_path: Path) -> None:
    raw = {"model": "odvae", "name": "a", "videos": tasks.asset("videos", tmp_path / "pipelines/videos"),
           "init_from": "shipped"}
    params, _ = validate(raw, tasks.services, "")
    assert params["learning_rate"] < TrainParams().learning_rate
    assert validate(raw | {"learning_rate": 2e-3}, tasks.services, "")[0] == params | {"learning_rate": 2e-3}
