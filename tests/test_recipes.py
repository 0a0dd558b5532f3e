"""The recipes in configs/recipes: each resolves, and trains ten steps on a tiny data set in the layout that it states.

Models are cut to tiny ones by overrides; what a recipe decides about data, condition, groups, lengths and losses stays.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import av
import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from lvdm.evaluation.measure import EvalConfig, measure
from lvdm.sampling.params import GenerationParams
from lvdm.training.train import TrainConfig as LVDMConfig
from lvdm.training.train import train as train_lvdm
from odvae import AutoencoderKLODVAE
from odvae.cache.build.builder import build_cache
from odvae.cli import main as odvae
from odvae.inference.adapters import load_autoencoder
from odvae.metrics import frechet
from odvae.training.train import TrainConfig as VAEConfig
from odvae.training.train import train as train_vae
from odvae.utils.config import load_config, shipped_configs

RECIPES = Path(__file__).parents[1] / "configs/recipes"
WIDTHS = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
TINY = ["model.preset=null", "model.hidden_size=24", "model.num_layers=1", "model.num_attention_heads=2",
        "windows.held_out=2", "sample.count=0", "loop.steps=10", "loop.log_every=1", "loop.micro_batch_size=2",
        "loop.mixed_precision=no"]
SIDE, RATE = 16, 25.0
NAMES = {"ucf101": "UCF-101/{0}/v_{0}_g01_c0{1}.avi", "sky_timelapse": "sky/{0}_{1}.mp4",
         "kinetics600": "train/{0}/video{1}.mp4"}  # the layout of each data set
CLASSES = ("ApplyEyeMakeup", "Basketball", "CleanAndJerk")

# The variants, as the headers and README.md name them: recipe, VAE, frames, frames per second, overrides.
VARIANTS: list[tuple[str, str, int, float, list[str]]] = [
    ("ucf101", "od", 17, 25 / 3, []),
    ("ucf101", "sd", 17, 25 / 3, ["model.group_size=8"]),
    ("ucf101", "wan", 17, 25 / 3, []),
    ("ucf101", "od", 17, 25 / 3, ["condition=none", "sample.guidance_scale=1"]),
    ("ucf101", "od", 81, RATE, ["windows.frames=81"]),
    ("ucf101_small", "od", 17, 25 / 3, []),
    ("sky_timelapse", "wan", 17, RATE, []),
    ("sky_timelapse", "sd", 81, RATE, ["windows.frames=81", "model.group_size=8"]),
    ("kinetics600", "od", 17, RATE, []),
]
QUICK = (1, 5, 6, 8)  # one per recipe; the others run in `make soak`
CASES = [pytest.param(*variant, id="-".join(map(str, [*variant[:3], i])),
                      marks=[] if i in QUICK else pytest.mark.slow) for i, variant in enumerate(VARIANTS)]


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny VAEs of the three kinds."""
    root = tmp_path_factory.mktemp("vaes")
    torch.manual_seed(0)
    AutoencoderKLODVAE(**WIDTHS).save_pretrained(root / "od")
    AutoencoderKL(**WIDTHS, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                  latent_channels=4).save_pretrained(root / "image")
    odvae(["inflate", str(root / "image"), str(root / "sd"), "--variant", "0"])
    diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(
        root / "wan")
    return {kind: root / kind for kind in ("od", "image", "sd", "wan")}


def write_videos(root: Path, recipe: str, frames: int) -> Path:
    """Write nine tiny videos in the layout of a recipe's data set; return its folder."""
    layout = NAMES[recipe.removesuffix("_small")]
    for i, name in enumerate(CLASSES * 3):
        path = root / layout.format(name, i)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (frames, 4, 4, 3), np.uint8)
        with av.open(str(path), "w") as file:
            stream = file.add_stream("mpeg4", rate=int(RATE), width=SIDE, height=SIDE, pix_fmt="yuv420p")
            for picture in pixels.repeat(SIDE // 4, 1).repeat(SIDE // 4, 2):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
    return root / layout.partition("/")[0]


def losses(run: Path) -> list[float]:
    lines: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("recipe, kind, frames, rate, overrides", CASES)
def test_ten_steps_of_each_recipe(recipe, kind, frames, rate, overrides, vaes, tmp_path):
    videos = write_videos(tmp_path, recipe, round(frames * RATE / rate) + 2)
    build_cache(videos, tmp_path / "cache", load_autoencoder(str(vaes[kind])).model, frames=[frames], frame_rate=rate,
                sizes=[(SIDE, SIDE)], workers=1)
    config = load_config(LVDMConfig, f"{recipe}.yaml", [*overrides, *TINY, f"vae={vaes[kind]}",
                                                        f"windows.cache={tmp_path / 'cache'}",
                                                        f"output={tmp_path / 'run'}"])
    pipeline = train_lvdm(config)
    assert len(losses(tmp_path / "run")) == 10 and np.isfinite(losses(tmp_path / "run")).all()
    if config.condition == "class":
        index = json.loads((pipeline / "transformer/config.json").read_text())
        assert index["class_names"] == list(CLASSES)
    if (recipe, kind) in (("sky_timelapse", "wan"), ("kinetics600", "od")):
        check_evaluation(pipeline, videos, given=5 if recipe == "kinetics600" else None)


def check_evaluation(pipeline: Path, videos: Path, given: int | None) -> None:
    """The pipeline is measured as the header says: on 16 of 17 frames. The given frames of a prediction count as they
    are: on these alone the distance is 0."""
    settings = GenerationParams(seed=0, num_inference_steps=1, guidance_scale=1.0)
    result = measure(str(pipeline), "own", EvalConfig((17,), 3, 2, settings, reference=videos, fvd_frames=given or 16,
                                                      given=given))
    assert result.figures["reference"]["clips"] == 3
    distance = result.figures["lengths"][17][frechet.NAME]
    assert distance == pytest.approx(0, abs=1e-3) if given else distance > 1e-3


def test_the_paper_s_vae_trains_in_its_three_stages(vaes, tmp_path):
    videos = write_videos(tmp_path, "kinetics600", 27)
    stages = [{"steps": 3, "data": {"frames": 9}}, {"steps": 3},
              {"steps": 4, "loss": {"adversarial": {"weight": 0.5, "critic": {"width": 4, "layers": 1}}}}]
    recipe = load_config(VAEConfig, "paper.yaml")
    assert [stage.data.frames for stage in recipe.resolved_stages()] == [9, 25, 25]
    assert [stage.loss.adversarial.weight for stage in recipe.resolved_stages()] == [0, 0, 0.5]
    for stage in stages:  # the critic is one for all stages
        stage.setdefault("loss", {}).setdefault("adversarial", {})["critic"] = {"width": 4, "layers": 1}
    config = load_config(VAEConfig, "paper.yaml", [
        f"data.folder={videos}", f"model.init_from={vaes['image']}", f"output={tmp_path / 'run'}", "data.height=16",
        "data.width=16", "data.held_out=1", "loss.perceptual.kind=efficientnet", "loss.perceptual.weights=null",
        "loss.perceptual.weight=0", "loop.steps=10", "loop.log_every=1", "loop.mixed_precision=no",
        "loop.evaluate_every=10", f"stages={json.dumps(stages)}"])
    folder = train_vae(config)
    assert len(losses(tmp_path / "run")) == 10 and np.isfinite(losses(tmp_path / "run")).all()
    assert AutoencoderKLODVAE.load_config(folder)["variant"] == 4


def test_the_index_names_every_recipe():
    index = (RECIPES / "README.md").read_text()
    paths = [path for package in ("odvae", "lvdm") for path in shipped_configs(package) if path.is_relative_to(RECIPES)]
    assert paths and {path.name for path in paths} == set(re.findall(r"\b\w+\.yaml\b", index))
    for path in paths:
        program = f"{path.parent.name} train {path.name}"
        assert program in index and program in path.read_text()
