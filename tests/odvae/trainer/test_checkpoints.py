"""Checkpoints: bit-exact round trips; incomplete ones are never read."""

import copy
import shutil

import pytest
import torch
from safetensors import SafetensorError

from odvae.trainer import checkpoints
from odvae.trainer.checkpoints import (
    flatten_optimizer,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    unflatten_optimizer,
)
from odvae.utils.errors import UserError

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 3e-4}, {"params": p[1:], "weight_decay": 0.0}],
                                         betas=(0.9, 0.99)),
    "adamw tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), amsgrad=True),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=1e-2, adjust_lr_fn="match_rms_adamw"),
}


def equal(a, b):
    """Compare values and types recursively."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def step(model, optimizer, seed):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_an_optimizer_round_trip_is_exact_and_trains_alike(tmp_path, name, steps):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for i in range(steps):
        step(model, optimizer, i)
    tensors, meta = flatten_optimizer(optimizer.state_dict())
    path = save_checkpoint(tmp_path, steps, {"model": model.state_dict(), "optimizer": tensors},
                           {"optimizer": meta, "log": {"loss": [0.1, float("inf")]}}, keep=1)
    loaded, head = load_checkpoint(path)
    assert head["step"] == steps and head["log"] == {"loss": [0.1, float("inf")]}
    restored = unflatten_optimizer(loaded["optimizer"], head["optimizer"])
    assert equal(restored, optimizer.state_dict())
    assert equal(loaded["model"], dict(model.state_dict()))

    other = copy.deepcopy(model)
    other.load_state_dict(loaded["model"])
    resumed = OPTIMIZERS[name](list(other.parameters()))
    resumed.load_state_dict(restored)
    for i in range(2):
        step(model, optimizer, 10 + i)
        step(other, resumed, 10 + i)
    assert equal(dict(other.state_dict()), dict(model.state_dict()))


def test_unusual_tensors_round_trip(tmp_path):
    tied = torch.randn(3, 2)
    group = {"a": tied, "tied": tied, "view": tied[1:], "transposed": tied.t(), "scalar": torch.tensor(7),
             "empty": torch.zeros(0, 2), "half": torch.ones(2, dtype=torch.bfloat16)}
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 1, {"model": group, "none": {}}, {}, keep=1))
    assert loaded["none"] == {} and loaded["model"].keys() == group.keys()
    assert all(equal(loaded["model"][k], v) for k, v in group.items())
    with pytest.raises(TypeError, match=r"state\.0\.x"):
        flatten_optimizer({"state": {0: {"x": object()}}})


def save(folder, step, keep=9):
    return save_checkpoint(folder, step, {"model": {"w": torch.full((4,), float(step))}}, {}, keep)


def test_old_checkpoints_are_removed(tmp_path):
    for n in (5, 900, 1000, 123456789):
        save(tmp_path, n, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00001000", "step-123456789"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-123456789"


def test_incomplete_checkpoints_are_skipped(tmp_path):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "none") is None
    whole = save(tmp_path, 1)
    for n, spoil in ((2, lambda p: (p / "meta.json").unlink()), (3, lambda p: (p / "model.safetensors").unlink()),
                     (4, lambda p: (p / "model.safetensors").write_bytes(b"x")),
                     (5, lambda p: (p / "meta.json").write_text("{"))):
        spoil(save(tmp_path, n))
    (tmp_path / ".step-00000007.tmp-1-ab").mkdir()  # what a killed process leaves
    (tmp_path / "step-latest").mkdir()
    assert latest_checkpoint(tmp_path) == whole
    # the run resumes from step 1 and writes the later steps again
    assert float(load_checkpoint(save(tmp_path, 3))[0]["model"]["w"][0]) == 3
    assert latest_checkpoint(tmp_path).name == "step-00000003"
    assert not list(tmp_path.glob(".step-*"))


def test_a_failed_save_keeps_the_old_checkpoints(tmp_path, monkeypatch):
    old = save(tmp_path, 1, keep=1)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(SafetensorError):
        save(tmp_path, 2, keep=1)
    assert list(tmp_path.iterdir()) == [old] and latest_checkpoint(tmp_path) == old


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"not a checkpoint.*step-00000200"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "none")
    (tmp_path / "meta.json").write_text("[]")
    with pytest.raises(UserError, match="written by something else"):
        load_checkpoint(tmp_path)
    broken = save(tmp_path / "c", 1)
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"broken: model\.safetensors"):
        load_checkpoint(broken)
    text = (broken / "meta.json").read_text()
    shutil.copytree(broken, tmp_path / "later")
    (tmp_path / "later" / "meta.json").write_text(text.replace('"format": 2', '"format": 99'))
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(tmp_path / "later")
