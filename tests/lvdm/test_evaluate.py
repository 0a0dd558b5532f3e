"""Figures of pipelines that are known beforehand, and the command that sets pipelines side by side."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_pipeline

from lvdm import LVDMPipeline, LVDMTransformer3DModel
from lvdm.cli import main
from lvdm.evaluation import measure as measuring
from lvdm.evaluation.measure import EvalConfig, measure, speed
from lvdm.evaluation.scenes import ScenePrompt, scene_accuracy
from lvdm.evaluation.video_stats import VideoStats, drift_of
from lvdm.sampling.params import GenerationParams
from lvdm.sampling.pipeline import VideoChunk
from lvdm.text import WordHashEncoder
from lvdm.training.train import TrainConfig, train
from odvae.cache import LatentCache
from odvae.data.synthetic import render, sample_scene
from odvae.data.video.reader import probe
from odvae.inference.loading import load_vae
from odvae.metrics import frechet, i3d
from odvae.metrics.feature_extractors import has_efficientnet
from odvae.utils.config import load_config
from odvae.utils.errors import UserError

pytestmark = pytest.mark.xdist_group("evaluate")  # its fixtures cost a minute: made once

QUICK = GenerationParams(seed=5, steps=1, guidance_scale=1.0)


@pytest.fixture(scope="module")
def folders(vae_folder, cache, tmp_path_factory):
    """Two pipelines on the VAE of the cache, of text and of its captions as classes, and one on another VAE."""
    root, vae = tmp_path_factory.mktemp("pipelines"), load_vae(vae_folder).eval()
    size = dict(in_channels=vae.latent_channels, hidden_size=24, num_layers=2, num_attention_heads=2, sample_height=32,
                sample_width=32, frame_rate=8.0)
    torch.manual_seed(0)
    LVDMPipeline.build(vae, LVDMTransformer3DModel(text_dim=16, **size), WordHashEncoder(dim=16)).save_pretrained(
        root / "text")
    LVDMPipeline.build(vae, LVDMTransformer3DModel(text_dim=0, class_names=sorted(set(LatentCache(cache).captions)),
                                                         **size), None).save_pretrained(root / "classes")
    make_pipeline().save_pretrained(root / "foreign")
    return root


@pytest.mark.parametrize("frames", [9, 17, 25, 81])
def test_what_is_remembered_of_a_video_is_measured_as_the_whole(frames):
    scenes = [sample_scene(i) for i in range(6)]
    videos = np.stack([render(scene, frames) for scene in scenes])
    asked = [ScenePrompt(scene.caption, scene.colour, scene.direction, scene.background) for scene in scenes]
    watched = [VideoStats(frames, 8.0) for _ in scenes]
    for one, video in zip(watched, videos, strict=True):
        for chunk in np.split(video, [1, 5, 7]):
            one.add(chunk)
    found = scene_accuracy(np.stack([one.head_and_tail for one in watched]), asked)
    assert found == scene_accuracy(videos, asked) and found.colour == 1
    assert all(np.array_equal(one.glimpses, video[np.linspace(0, frames - 1, 8).round().astype(int)])
               for one, video in zip(watched, videos, strict=True))
    assert drift_of(watched)["contrast"] == pytest.approx(1, abs=.1)  # rendered scenes do not fade
    assert drift_of([VideoStats(1, 8.0)] * 0) == {"jump": None, "colour": None, "contrast": None, "sharpness": None}


def test_the_cost_of_a_second_is_told_by_its_place_in_the_video(monkeypatch):
    """A made-up pipeline that takes g seconds for group g of 8 frames at 8 a second: two figures differ as they do."""
    clock = [0.0]

    def made(pipeline, videos, frames, progress):
        for group in range(1 + frames // 8):
            clock[0] += group or .5
            shown, length = (8, 2) if group else (1, 1)
            yield VideoChunk(group, 0, np.zeros((1, shown, 4, 4, 3), np.uint8), torch.zeros(1, 4, length, 1, 1))

    monkeypatch.setattr(measuring, "chunks", made)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])
    pipeline = SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(frame_rate=8.0, group_size=2)))
    found = speed(pipeline, QUICK, 129, None)
    assert found["seconds_a_second"] == pytest.approx((.5 + sum(range(1, 17))) / (129 / 8))
    assert found["seconds_a_second_early"] == 5 and found["seconds_a_second_late"] == 14  # the groups 3 to 7, 12 to 16
    assert speed(pipeline, QUICK, 17, None)["seconds_a_second_late"] is None  # too short to have two


def test_the_held_out_loss_is_that_of_the_training(cache, vae_folder, tmp_path):
    train(
        load_config(
            TrainConfig,
            None,
            [
                f"output={tmp_path}",
                f"windows.cache={cache}",
                f"vae={vae_folder}",
                "windows.held_out=2",
                "sample.count=0",
                "model.hidden_size=24",
                "model.num_layers=2",
                "model.num_attention_heads=2",
                "loop.steps=2",
                "loop.micro_batch_size=4",
                "loop.evaluate_every=2",
            ],
        )
    )
    logged = [line for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
              if "loss_heldout" in line][-1]
    found = measure(str(tmp_path / "pipeline"), "own", EvalConfig((17,), 1, 1, QUICK, cache=cache)).figures["loss"]
    assert found["clips"] == 2 and len(found) == 7
    assert all(logged[name] == pytest.approx(value, rel=1e-4) for name, value in found.items() if name != "clips")


def test_the_command_sets_pipelines_side_by_side(folders, cache, clips, tmp_path, capsys):
    command = ["evaluate", "--cache", str(cache), "--prompts", "3", "--batch", "2", "--frames", "33", "9", "--steps",
               "1", "--reference", str(clips), "--out", str(tmp_path / "out"), "--keep-videos"]
    for name in ("text", "classes", "foreign"):
        command += ["--pipeline", str(folders / name)]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert [line.split(",")[0] for line in told.splitlines()[1:5]] == ["text", "text", "classes", "classes"]
    assert "classes: no prompt accuracy: the pipeline is conditioned on 10 classes" in told
    assert "not measured: foreign: " in told and "another VAE" in told and "2 pipelines, 1 failed" in told
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    text, classes = (report["pipelines"][name] for name in ("text", "classes"))
    assert text["loss"]["loss_heldout"] > 0 and classes["loss"]["loss_heldout"] > 0
    assert list(text["lengths"]) == ["9", "33"] and len(text["lengths"]["33"]["right"]) == 3
    assert "against_shortest" in text["lengths"]["33"] and "both" not in classes["lengths"]["9"]
    for figures in (text, classes):
        assert (frechet.NAME in figures["lengths"]["9"]) == has_efficientnet()
        assert figures["lengths"]["33"]["seconds_a_second"] > 0 and figures["lengths"]["33"]["drift"]["jump"] > 0
    kept = sorted((tmp_path / "out/videos/text").iterdir())
    assert len(kept) == 3 and probe(kept[0]).frames == 33 and kept[0].name.endswith("striped-background-33.mp4")
    sheet = Image.open(tmp_path / "out/contact_sheet.png")
    assert sheet.size == (8 * 32 + 7 * 2 + 4, 2 * 2 * 3 * (32 + 16 + 2) + 2)  # pipelines, lengths, prompts


def test_prompts_and_references_of_ones_own(folders, clips, tmp_path):
    own = tmp_path / "prompts.jsonl"
    own.write_text('{"prompt": "a cat", "sections": [[0.5, "a dog"]]}\n{"prompt": "a bird", "seed": 3}\n')
    found = measure(str(folders / "text"), "own", EvalConfig((9,), None, 4, QUICK, prompt_file=own, reference=clips))
    assert [row.prompt for row in found.shown.values()] == ["a cat > a dog", "a bird"]
    assert any("no prompt accuracy" in reason for reason in found.skipped) and "both" not in found.figures["lengths"][9]
    if has_efficientnet():
        assert found.figures["reference"] == {"of": str(clips), "clips": 2}
    alone = measure(str(folders / "classes"), "own", EvalConfig((9,), 1, 4, QUICK))
    assert any("1 video is made" in reason for reason in alone.skipped)
    with pytest.raises(UserError, match="18"):
        measure(str(folders / "text"), "own", EvalConfig((18,), 1, 1, QUICK))


@pytest.mark.parametrize(("more", "message"), [
    (["--frames", "0"], "must be at least 1"),
    (["--prompts", "0"], "must be at least 1"),
    (["--out", "{file}"], "is a file"),
    (["--pipeline", "{tmp}"], "is not a pipeline's folder"),
    (["--pipeline", "a=shipped", "--pipeline", "a=shipped"], "as in --pipeline a="),
    (["--fvd", "{file}", "--frames", "5"], f"at least {i3d.MIN_FRAMES} frames"),
    (["--fvd", "{file}"], "cannot read"),
    (["--prompt-file", "{file}"], "leave frames out"),
    (["--cache", "{tmp}/nowhere"], "nowhere"),
    (["--reference", "{tmp}"], "holds no videos"),
])
def test_mistakes_are_told_before_anything_is_made(more, message, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a cat", "frames": 33}\n')
    filled = [argument.format(tmp=tmp_path, file=file) for argument in more]
    assert main(["evaluate", "--out", str(tmp_path / "out"), *filled]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and not (tmp_path / "out").exists()
