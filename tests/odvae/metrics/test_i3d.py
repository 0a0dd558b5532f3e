"""I3D, whose logits rFVD compares: padding against its closed form, a branch by hand, keys, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from odvae import evaluate
from odvae.cli import main
from odvae.metrics import i3d
from odvae.metrics.frechet import Gaussian, frechet_distance
from odvae.metrics.i3d import CLASSES, I3D, MIN_FRAMES, Mixed, load_i3d, max_pool, pad_same
from odvae.utils.errors import UserError

STEM, MIXED = i3d.STEM, i3d.MIXED


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    """An eighth of the channels, which makes the network fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(i3d, "STEM", {name: (in_channels if in_channels == 3 else in_channels // 8, out_channels // 8,
                                           kernel, stride)
                                    for name, (in_channels, out_channels, kernel, stride) in STEM.items()})
        patch.setattr(i3d, "MIXED", {name: tuple(width // 8 for width in widths) for name, widths in MIXED.items()})
        yield


@pytest.fixture(scope="module")
def network(narrow: None) -> I3D:
    torch.manual_seed(0)
    return I3D()


@pytest.fixture(scope="module")
def weights(network: I3D, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("i3d") / "i3d.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.mark.parametrize(("n", "kernel", "stride", "before", "after"), [
    (224, 7, 2, 2, 3), (225, 7, 2, 3, 3), (9, 7, 2, 3, 3), (16, 7, 2, 2, 3), (112, 3, 2, 0, 1), (5, 3, 2, 1, 1),
    (7, 2, 2, 0, 1), (8, 2, 2, 0, 0), (6, 3, 1, 1, 1), (6, 1, 1, 0, 0), (3, 1, 2, 0, 0)])
def test_padding_is_tensorflows_same(n, kernel, stride, before, after):
    """Output i of ceil(n / stride) begins at i stride - before; the odd zero is at the end."""
    x = torch.rand(1, 1, n, 1, 1)
    row, sizes, strides = x.flatten(), (kernel, 1, 1), (stride, 1, 1)
    assert pad_same(x, sizes, strides).flatten().equal(F.pad(row, (before, after)))
    expected = [row[max(0, i * stride - before):i * stride - before + kernel].max() for i in range(-(-n // stride))]
    assert max_pool(x, sizes, strides).flatten().equal(torch.stack(expected))
    turned = pad_same(x.movedim(2, 4), sizes[::-1], strides[::-1])
    assert turned.flatten().equal(F.pad(row, (before, after)))


def test_a_mixed_block_by_hand():
    torch.manual_seed(1)
    block = Mixed(5, (2, 3, 4, 2, 3, 6)).eval()
    for name, value in block.named_buffers():
        if name.endswith(("mean", "var")):
            value.uniform_(.5, 2)
    state, x = block.state_dict(), torch.randn(2, 5, 3, 6, 6).relu()

    def unit(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = state[f"{name}.conv3d.weight"]
        made = F.conv3d(x, weight, padding=weight.shape[2] // 2)
        mean, var, shift = (state[f"{name}.bn.{leaf}"].view(-1, 1, 1, 1) for leaf in ("running_mean", "running_var",
                                                                                       "bias"))
        return ((made - mean) / (var + 1e-3).sqrt() + shift).relu()

    expected = [unit("b0", x), unit("b1b", unit("b1a", x)), unit("b2b", unit("b2a", x)),
                unit("b3b", F.max_pool3d(x, 3, 1, 1))]
    assert torch.allclose(block(x), torch.cat(expected, 1), atol=1e-5)
    assert block(x).shape == (2, 2 + 4 + 3 + 6, 3, 6, 6)


def test_keys_are_those_of_published_files(monkeypatch):
    """57 convolutions with norms and the classifier, as in `rgb_imagenet.pt`."""
    monkeypatch.setattr(i3d, "STEM", STEM)
    monkeypatch.setattr(i3d, "MIXED", MIXED)
    network = I3D()
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()
              if not key.endswith("num_batches_tracked")}
    assert len(shapes) == 57 * 5 + 2
    assert shapes["Conv3d_1a_7x7.conv3d.weight"] == (64, 3, 7, 7, 7)
    assert shapes["Conv3d_2c_3x3.bn.running_var"] == (192,)
    assert shapes["Mixed_3b.b1a.bn.running_mean"] == (96,)
    assert shapes["Mixed_3c.b0.conv3d.weight"] == (128, 256, 1, 1, 1)
    assert shapes["Mixed_4f.b2b.conv3d.weight"] == (128, 32, 3, 3, 3)
    assert shapes["Mixed_5c.b3b.conv3d.weight"] == (128, 832, 1, 1, 1)
    assert shapes["logits.conv3d.weight"] == (CLASSES, 1024, 1, 1, 1) and shapes["logits.conv3d.bias"] == (CLASSES,)
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, MIN_FRAMES, i3d.SIDE, i3d.SIDE)).shape == (1, CLASSES)


def test_distance_of_a_known_shift_between_two_sets(network):
    """The same features moved by d: the distance is |d|^2; and 0 between equal sets."""
    videos = [torch.rand(1, 3, MIN_FRAMES, 24, 32, generator=torch.Generator().manual_seed(i)) * 2 - 1
              for i in range(2)]
    shift = torch.linspace(0, .1, CLASSES)
    moved = I3D()
    moved.load_state_dict(network.state_dict())
    moved.logits.conv3d.bias += shift
    own, again, other = (Gaussian(CLASSES) for _ in range(3))
    with torch.inference_mode():
        features = [network(video) for video in videos]
        for gaussian, model in ((again, network.train()), (other, moved)):  # train() does not wake the batch norms
            gaussian.update(torch.cat([model(video) for video in videos]))
    own.update(torch.cat(features))
    assert features[0].shape == (1, CLASSES) and not features[0].allclose(features[1])
    assert frechet_distance(own, again) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(own, other) == pytest.approx(float(shift.square().sum()), rel=1e-4)
    with pytest.raises(UserError, match="at least 9 frames"):
        network(videos[0][:, :, :MIN_FRAMES - 1])


def test_files_load_completely_and_errors_name_the_keys(network, weights, tmp_path):
    state = network.state_dict()
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pt", _use_new_zipfile_serialization=False)  # as files of 2017 are
    for path in (weights, tmp_path / "old.pt"):
        loaded = load_i3d(path)
        assert all(value.equal(state[key]) for key, value in loaded.state_dict().items())
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    less = {key: value for key, value in old.items() if not key.startswith("Mixed_5c.b0.")}
    few = dict(old) | {"logits.conv3d.weight": torch.zeros(600, 1024, 1, 1, 1)}
    for wrong, message in ((less, r"missing Mixed_5c\.b0\.bn\.bias, .*Mixed_5c\.b0\.conv3d\.weight"),
                           (old | {"stray": torch.ones(1)}, "unknown stray"),
                           (few, r"shaped logits\.conv3d\.weight \(600, 1024, 1, 1, 1\) for \(400, "),
                           ({"a": {"b": 1}}, "not hold a dict of tensors"), (list(old), "not hold a dict of tensors"),
                           (tmp_path, "cannot read")):  # a Path is what weights_only does not unpickle
        torch.save(wrong, tmp_path / "wrong.pt")
        with pytest.raises(UserError, match=message):
            load_i3d(tmp_path / "wrong.pt")
    with pytest.raises(UserError, match="cannot read"):
        load_i3d(tmp_path / "nowhere.pt")


def test_the_command_shows_rfvd(clips, vae_folder, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "ProcessPoolExecutor",  # in this process, where the network is narrow
                        lambda workers, mp_context: ThreadPoolExecutor(workers))
    command = ["evaluate", str(clips), "--model", f"ours={vae_folder}", "--out", str(tmp_path), "--limit"]
    assert main([*command, "2", "--frames", "9", "--rfvd", str(weights)]) == 0
    output = capsys.readouterr().out
    assert "rFVD" in output.splitlines()[0] and "rFVD from 2 clips is biased" in output
    assert json.loads((tmp_path / "evaluation.json").read_text())["models"]["ours"]["rFVD"] > 0
    for more, message in ((["2", "--frames", "8", "--rfvd", str(weights)], "at least 9 frames"),
                          (["1", "--frames", "9", "--rfvd", str(weights)], "give more videos"),
                          (["2", "--frames", "9", "--rfvd", str(tmp_path / "none.pt")], "cannot read")):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
