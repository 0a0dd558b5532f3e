"""Configuration: unknown keys are refused, saved configs reload, errors name file and line or the argument."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from pydantic import Field

from odvae.utils.config import Config, load_config, save_config
from odvae.utils.errors import UserError
from odvae.utils.seeding import generator


class Optimizer(Config):
    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0)


class Loop(Config):
    steps: int = 100
    mixed_precision: Literal["no", "bf16"] = "no"
    optimizer: Optimizer = Optimizer(name="muon")


class Run(Config):
    output: Path = Path("outputs/a")
    shape: tuple[int, ...] = (1, 2)
    note: str | None = None
    limit: float = 1e300
    loop: Loop = Loop()
    extra: Loop | None = None


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("key", "nearest"), [
    ("shap", "shape"), ("loop.stepz", "loop.steps"), ("loop.optimizer.learning_rat", "loop.optimizer.learning_rate"),
    ("extra.stepz", "extra.steps"), ("learning_rate", "loop.optimizer.learning_rate"), ("lop.steps", "loop")])
def test_an_unknown_key_is_reported_with_its_location_and_the_nearest_key(tmp_path, key, nearest):
    *above, name = key.split(".")
    text = "# a comment\n" + "".join(f"{' ' * i}{k}:\n" for i, k in enumerate(above)) + f"{' ' * len(above)}{name}: 3\n"
    path = write(tmp_path, text)
    with pytest.raises(UserError) as by_file:
        load_config(Run, path)
    with pytest.raises(UserError) as by_argument:
        load_config(Run, None, ["loop.steps=5", f"{key}=3"])
    unknown = "lop" if key == "lop.steps" else key
    for message in (str(by_file.value), str(by_argument.value)):
        assert f"unknown key '{unknown}'" in message and f"did you mean '{nearest}'" in message
    line = 2 if key == "lop.steps" else 2 + len(above)
    assert f"{path}, line {line}:" in str(by_file.value)
    assert f"argument '{key}=3'" in str(by_argument.value)


def test_an_unknown_key_unlike_any_other_lists_the_known_keys():
    with pytest.raises(UserError, match=r"loop\.steps, loop\.mixed_precision, loop\.optimizer"):
        load_config(Run, None, ["loop.zzzzqq=1"])


@pytest.mark.parametrize(("argument", "message"), [
    ("loop.steps=many", "loop.steps = 'many'"), ("loop.optimizer.learning_rate=-1", "more than 0"),
    ("loop.mixed_precision=fp8", "'no' or 'bf16'"), ("loop=3", "loop = 3"), ("loop.steps.x=3", "loop.steps"),
    ("novalue", "key=value"), ("shape=[1", "not valid YAML")])
def test_a_wrong_value_is_reported_with_its_argument(tmp_path, argument, message):
    path = write(tmp_path, "loop: {steps: 7}\n")
    with pytest.raises(UserError) as error:
        load_config(Run, path, [argument])
    assert message in str(error.value) and argument in str(error.value)


@pytest.mark.parametrize("text", ["loop: {steps: many}", "- 1", "loop: [", "shape: [1]\nshape: [2]"])
def test_an_invalid_file_is_reported_by_name(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=r"run\.yaml"):
        load_config(Run, path)
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_config(Run, tmp_path / "none.yaml")


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = write(tmp_path, "loop: {steps: 7, optimizer: {learning_rate: 2e-3}}\n")
    config = load_config(Run, path, ["loop.steps=8", "shape=[4, 5]", "loop.mixed_precision=no", "extra.steps=1"])
    assert config.loop.steps == 8 and config.shape == (4, 5) and config.loop.mixed_precision == "no"
    # a section given in part keeps the rest of its default, which here is not its class's default
    assert config.loop.optimizer == Optimizer(name="muon", learning_rate=2e-3)
    assert config.extra == Loop(steps=1)
    assert load_config(Run, write(tmp_path, ""), []) == Run()


@pytest.mark.parametrize("note", ["no", "1e-5", "1:30", "0123", "2024-01-01", "null", "true", "a: b # c", "two\nlines",
                                  "é", ""])
def test_a_saved_config_reloads_equal(tmp_path, note):
    config = load_config(Run, None, ["loop.optimizer.learning_rate=1e-7", "extra.mixed_precision=bf16"])
    config = config.model_copy(update={"note": note})
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(Run, tmp_path / "resolved.yaml") == config


def test_generator_is_a_pure_function():
    def draw(*arguments):
        return torch.rand(4, generator=generator(*arguments)).tolist()

    assert draw(3, "noise", 7, 0) == draw(3, "noise", 7, 0)
    streams = [(3,), (4,), (3, "noise"), (3, "noise", 7), (3, 7, "noise"), (3, "noise", "7"), (3, "noise7"), (-1,)]
    assert len({tuple(draw(*stream)) for stream in streams}) == len(streams)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(1, "a")
    assert torch.equal(before, torch.get_rng_state())  # the global state is not used


@pytest.mark.parametrize("setting", ["loop.optimizer.learning_rate=.inf", "loop.optimizer.betas=[.nan, 0.9]",
                                     "loss.l1=.inf", "data.frame_rate=.nan"])
def test_settings_must_be_finite(setting):
    from odvae.training.train import TrainConfig

    with pytest.raises(UserError, match="must be a finite number"):
        load_config(TrainConfig, None, [setting])
