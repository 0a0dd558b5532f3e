"""Evaluation: figures whose value is known, and the command that compares pipelines."""

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
from lvdm.evaluation.evaluate import _runs
from lvdm.evaluation.measure import EvalConfig, measure
from lvdm.evaluation.rollouts import speed
from lvdm.evaluation.scenes import ScenePrompt, scene_accuracy
from lvdm.evaluation.video_stats import VideoStats, drift_of
from lvdm.sampling.outputs import VideoChunk
from lvdm.sampling.params import GenerationParams
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

pytestmark = pytest.mark.xdist_group("evaluate")  # one process builds the pipelines

QUICK = GenerationParams(seed=5, num_inference_steps=1, guidance_scale=1.0)


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
def test_statistics_of_chunks_equal_those_of_the_whole_video(frames):
    scenes = [sample_scene(i) for i in range(3)]
    videos = np.stack([render(scene, frames) for scene in scenes])
    prompts = [ScenePrompt(scene.caption, scene.colour, scene.direction, scene.background) for scene in scenes]
    stats = [VideoStats(frames, 8.0) for _ in scenes]
    for video_stats, video in zip(stats, videos, strict=True):
        for chunk in np.split(video, [1, 5, 7]):
            video_stats.add(chunk)
    accuracy = scene_accuracy(np.stack([video_stats.head_and_tail for video_stats in stats]), prompts)
    assert accuracy == scene_accuracy(videos, prompts) and accuracy.colour == 1
    assert all(np.array_equal(video_stats.thumbnails, video[np.linspace(0, frames - 1, 8).round().astype(int)])
               for video_stats, video in zip(stats, videos, strict=True))
    assert drift_of(stats)["contrast"] == pytest.approx(1, abs=.1)  # rendered scenes do not fade
    assert drift_of([VideoStats(1, 8.0)] * 0) == {"jump": None, "colour": None, "contrast": None, "sharpness": None}


def test_real_time_factor_early_and_late_in_a_video(monkeypatch):
    """A fake pipeline takes g seconds for group g of 8 frames at 8 frames per second."""
    clock = [0.0]

    def fake_chunks(pipeline, videos, frames, progress):
        for group in range(1 + frames // 8):
            clock[0] += group or .5
            t, latents = (8, 2) if group else (1, 1)
            yield VideoChunk(group, 0, np.zeros((1, t, 4, 4, 3), np.uint8), torch.zeros(1, 4, latents, 1, 1))

    monkeypatch.setattr("lvdm.evaluation.rollouts.chunks", fake_chunks)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    pipeline = SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(frame_rate=8.0, group_size=2)))
    figures = speed(pipeline, QUICK, 129, None)
    assert figures["real_time_factor"] == pytest.approx((.5 + sum(range(1, 17))) / (129 / 8))
    assert figures["real_time_factor_early"] == 5  # the groups 3 to 7
    assert figures["real_time_factor_late"] == 14  # the groups 12 to 16
    assert speed(pipeline, QUICK, 17, None)["real_time_factor_late"] is None  # too short to have two


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
    losses = measure(str(tmp_path / "pipeline"), "own", EvalConfig((17,), 1, 1, QUICK, cache=cache)).figures["loss"]
    assert losses["clips"] == 2 and len(losses) == 7
    assert all(logged[name] == pytest.approx(value, rel=1e-4) for name, value in losses.items() if name != "clips")


def test_the_command_compares_pipelines(folders, cache, clips, tmp_path, capsys):
    command = [
        "evaluate",
        "--cache",
        str(cache),
        "--prompts",
        "3",
        "--batch",
        "2",
        "--frames",
        "17",
        "9",
        "--steps",
        "1",
        "--reference",
        str(clips),
        "--out",
        str(tmp_path / "out"),
        "--keep-videos",
    ]
    for name in ("text", "classes", "foreign"):
        command += ["--pipeline", str(folders / name)]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert [line.split(",")[0] for line in output.splitlines()[1:5]] == ["text", "text", "classes", "classes"]
    assert "classes: no prompt accuracy: the pipeline is conditioned on 10 classes" in output
    assert "not measured: foreign: " in output and "another VAE" in output and "2 pipelines, 1 failed" in output
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    text, classes = (report["pipelines"][name] for name in ("text", "classes"))
    assert text["loss"]["loss_heldout"] > 0 and classes["loss"]["loss_heldout"] > 0
    assert list(text["lengths"]) == ["9", "17"] and len(text["lengths"]["17"]["right"]) == 3
    assert "against_shortest" in text["lengths"]["17"] and "both" not in classes["lengths"]["9"]
    for figures in (text, classes):
        assert (frechet.NAME in figures["lengths"]["9"]) == has_efficientnet()
        assert figures["lengths"]["17"]["real_time_factor"] > 0 and figures["lengths"]["17"]["drift"]["jump"] > 0
    kept = sorted((tmp_path / "out/videos/text").iterdir())
    assert len(kept) == 3 and probe(kept[0]).frames == 17 and kept[0].name.endswith("striped-background-17.mp4")
    sheet = Image.open(tmp_path / "out/contact_sheet.png")
    assert sheet.size == (8 * 32 + 7 * 2 + 4, 2 * 2 * 3 * (32 + 16 + 2) + 2)  # pipelines, lengths, prompts


def test_each_number_of_steps_is_measured_on_the_same_videos_and_the_loss_once(tmp_path):
    config = EvalConfig((17,), 1, 1, QUICK, cache=tmp_path)
    runs = list(_runs({"a": None, "b": "folder"}, config, [1, 4]))
    assert [label for label, _, _ in runs] == ["a, 1 step", "a, 4 steps", "b, 1 step", "b, 4 steps"]
    assert [one.settings.num_inference_steps for _, _, one in runs] == [1, 4, 1, 4]
    assert [one.cache for _, _, one in runs] == [tmp_path, None] * 2
    assert {one.settings.seed for _, _, one in runs} == {5}
    own, = _runs({"a": None}, config, [])
    assert own[0] == "a" and own[2].settings.num_inference_steps is None  # the pipeline's


def test_the_users_prompts_and_references(folders, clips, tmp_path):
    own = tmp_path / "prompts.jsonl"
    own.write_text('{"prompt": "a cat", "sections": [[0.5, "a dog"]]}\n{"prompt": "a bird", "seed": 3}\n')
    result = measure(str(folders / "text"), "own", EvalConfig((9,), None, 4, QUICK, prompt_file=own, reference=clips))
    assert [row.prompt for row in result.rows.values()] == ["a cat > a dog", "a bird"]
    assert any("no prompt accuracy" in reason for reason in result.skipped)
    assert "both" not in result.figures["lengths"][9]
    if has_efficientnet():
        assert result.figures["reference"] == {"of": str(clips), "clips": 2}
    single = measure(str(folders / "classes"), "own", EvalConfig((9,), 1, 4, QUICK))
    assert any("only 1 video is generated" in reason for reason in single.skipped)
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
    (["--prompt-file", "{file}"], "remove num_frames"),
    (["--cache", "{tmp}/nowhere"], "nowhere"),
    (["--reference", "{tmp}"], "holds no videos"),
    (["--given", "5"], "with --reference the folder"),
    (["--fvd-frames", "18"], "from 1 to the shortest"),
])
def test_invalid_arguments_are_refused_before_anything_is_written(more, message, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a cat", "num_frames": 33}\n')
    filled = [argument.format(tmp=tmp_path, file=file) for argument in more]
    assert main(["evaluate", "--out", str(tmp_path / "out"), *filled]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (tmp_path / "out").exists()


def test_every_length_is_measured_on_the_beginning_of_the_longest_videos(folders, tmp_path, capsys):
    """As it is alone; in one command, with a plot."""
    source = str(folders / "text")
    together = measure(source, "own", EvalConfig((9, 17, 25), 1, 1, QUICK)).figures["lengths"]
    alone = measure(source, "own", EvalConfig((17,), 1, 1, QUICK)).figures["lengths"][17]
    assert together[17]["drift"] == pytest.approx(alone["drift"], rel=1e-3, abs=1e-3)
    assert together[17]["right"] == alone["right"]
    assert main(["evaluate", "--pipeline", source, "--lengths", "9", "17", "--prompts", "1", "--steps", "1",
                 "--history-follow", "1", "--sink-period", "1", "--out", str(tmp_path / "out")]) == 0
    assert "quality_by_length.png" in capsys.readouterr().out and (tmp_path / "out/quality_by_length.png").is_file()
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert (report["history_follow"], report["sink_period"], report["history_noise"]) == (1, 1, 0.1)
