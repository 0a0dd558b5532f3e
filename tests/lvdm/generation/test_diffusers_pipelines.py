"""`lvdm generate` with a pipeline of diffusers: files, resume, decoding again, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_diffusers import make_diffusers_pipeline, save_diffusers_pipeline

from lvdm.capabilities import PIPELINES, VideoGrid, pipeline_kind, video_grid
from lvdm.cli import main
from lvdm.generation.fingerprints import fingerprints
from lvdm.generation.generate import generate
from lvdm.generation.latent_store import parts_folder, read_latents, read_settings
from lvdm.generation.requests import build_requests
from lvdm.sampling import diffusers_adapter
from lvdm.sampling.diffusers_adapter import DiffusersAdapter
from lvdm.sampling.loading import load_lvdm_pipeline, load_pipeline
from lvdm.sampling.outputs import RolloutStep
from lvdm.sampling.params import VideoFileParams
from odvae.data.video.reader import VideoReader
from odvae.utils.errors import UserError

SIZE = ["--height", "64", "--width", "32", "--num-frames", "17", "--num-inference-steps", "2"]


@pytest.fixture(scope="module")
def ltx(tmp_path_factory):
    return save_diffusers_pipeline("LTXPipeline", tmp_path_factory.mktemp("ltx") / "pipeline")


def frames_of(path):
    with VideoReader(path) as video:
        return np.concatenate(list(video.iter_chunks()))


def test_the_command_writes_videos_and_latents_and_decodes_them_again(ltx, tmp_path, capsys):
    command = ["generate", "red", "blue", "--pipeline", str(ltx), "--out", str(tmp_path), *SIZE]
    assert main([*command, "--dry-run"]) == 0 and "17 frames, 0.7 s, 64x32" in capsys.readouterr().out
    assert main(command) == 0 and "2 generated" in capsys.readouterr().out
    video = tmp_path / "01-blue.mp4"
    settings = read_settings(video)
    assert (settings["guidance_scale"], settings["frame_rate"], settings["seed"]) == (3.0, 25.0, 1)
    assert read_latents(video)[1].shape == (8, 3, 2, 1) and (tmp_path / "contact_sheet.png").is_file()
    assert main(command) == 0 and "2 reused" in capsys.readouterr().out
    again = tmp_path / "again.mp4"
    assert main(["decode", str(video.with_suffix(".safetensors")), str(again), "--pipeline", str(ltx)]) == 0
    np.testing.assert_array_equal(frames_of(again), frames_of(video))


def test_latents_that_are_complete_are_only_decoded(tmp_path):
    pipeline = DiffusersAdapter(make_diffusers_pipeline("WanPipeline"))
    settings = VideoFileParams(prompt="red", num_frames=9, height=64, width=32, num_inference_steps=2)
    requests = build_requests(tmp_path, [settings])
    pipeline._decode = _out_of_memory
    with pytest.raises(UserError, match="MemoryError"):
        generate(pipeline, requests)
    assert parts_folder(requests[0].latents).is_dir(), "the latents are kept"
    del pipeline._decode
    hook = pipeline.transformer.register_forward_pre_hook(_out_of_memory)
    assert generate(pipeline, requests).generated == [requests[0].target]
    hook.remove()
    np.testing.assert_array_equal(frames_of(requests[0].target), frames_of(_video(pipeline, tmp_path / "other")))


def test_decoding_that_runs_out_of_memory_goes_on_in_tiles(tmp_path, monkeypatch):
    pipeline, tiles = DiffusersAdapter(make_diffusers_pipeline("CogVideoXPipeline")), []
    decode = diffusers_adapter.decode

    def decode_in_tiles(pipeline, latents, tile=None, distilled=None):
        tiles.append(tile)
        return decode(pipeline, latents, tile) if tile else _out_of_memory()

    monkeypatch.setattr(diffusers_adapter, "decode", decode_in_tiles)
    assert len(frames_of(_video(pipeline, tmp_path))) == 9
    assert [tile and tile.height for tile in tiles] == [None, 256]


def _out_of_memory(*_):
    raise MemoryError


def _video(pipeline, folder):
    settings = VideoFileParams(prompt="red", num_frames=9, height=64, width=32, num_inference_steps=2)
    return generate(pipeline, build_requests(folder, [settings])).generated[0]


def test_a_sampling_that_was_stopped_starts_again(tmp_path):
    from lvdm.generation.render import VideoOutput, render

    pipeline = DiffusersAdapter(make_diffusers_pipeline("WanPipeline"))
    expected = _video(pipeline, tmp_path / "whole")
    metadata, latents = read_latents(expected)
    events = render(pipeline, [VideoOutput(metadata, lambda frames: None)])
    assert isinstance(next(events), RolloutStep)
    events.close()
    np.testing.assert_array_equal(read_latents(_video(pipeline, tmp_path / "again"))[1], latents)


@pytest.mark.parametrize(("options", "message"), [
    (["--continue", "x.mp4"], "cannot start from a video: this model denoises the whole video at once"),
    (["--shift", "2"], "shift"), (["--scheduler", "heun"], "its own scheduler"),
    (["--guidance-rescale", "0.1"], "guidance_rescale"), (["--num-frames", "12"], "must be 1 + 8k; the nearest is 9")])
def test_what_it_cannot_do_is_refused_on_the_command_line(ltx, tmp_path, capsys, options, message):
    prompt = [] if "--continue" in options else ["red"]
    assert main(["generate", *prompt, "--pipeline", str(ltx), "--out", str(tmp_path / "out"), *options]) != 0
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_prompt_file_with_sections_is_refused(ltx, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "red", "sections": [[0.2, "blue"]]}))
    assert main(["generate", "--prompts", str(file), "--pipeline", str(ltx), *SIZE]) != 0
    assert "sections: a LTXPipeline cannot use sections" in capsys.readouterr().err


def test_a_class_that_is_not_supported_is_refused_with_those_that_are(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="holds FluxPipeline, which is not supported; supported are LVDMPipeline, "):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match="without a class name"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(UserError, match="cannot load the pipeline"):
        load_pipeline(tmp_path)
    with pytest.raises(UserError, match="an LVDMPipeline is needed here"):
        load_lvdm_pipeline(tmp_path)
    assert pipeline_kind(tmp_path) == "WanPipeline" and pipeline_kind(None) == "LVDMPipeline"


def test_every_component_changes_the_fingerprint(ltx):
    pipeline = load_pipeline(ltx)
    before = fingerprints(pipeline)
    assert set(before) == {"vae", "transformer", "text encoder", "tokenizer", "scheduler"}
    assert fingerprints(load_pipeline(ltx)) == before
    with torch.no_grad():
        pipeline.components["text_encoder"].shared.weight[0] += 1
    pipeline.scheduler.register_to_config(shift=2.0)
    after = fingerprints(pipeline)
    assert {name for name in before if after[name] != before[name]} == {"text encoder", "scheduler"}


BLOCKS = {"block_out_channels": [128, 256, 256, 512], "temporal_compression_ratio": 4}
PUBLIC = {  # kind: transformer's and VAE's config of a public model, its size, lengths and frame rate
    "Wan 2.1": ("WanPipeline", {"patch_size": [1, 2, 2]}, {}, (480, 832), (16, "1 + 4k", 16)),
    "Wan 2.2 5B": ("WanPipeline", {"patch_size": [1, 2, 2]}, {"scale_factor_spatial": 16}, (704, 1280),
                   (32, "1 + 4k", 24)),
    "LTX": ("LTXPipeline", {"patch_size": 1}, {"patch_size": 4, "patch_size_t": 1,
                                               "spatio_temporal_scaling": [True, True, True, False]},
            (512, 704), (32, "1 + 8k", 25)),
    "CogVideoX 5B": ("CogVideoXPipeline", {"patch_size": 2, "sample_height": 60, "sample_width": 90}, BLOCKS,
                     (480, 720), (16, "1 + 4k", 8)),
    "CogVideoX 1.5": ("CogVideoXPipeline", {"patch_size": 2, "patch_size_t": 2, "sample_height": 96,
                                            "sample_width": 170}, BLOCKS, (768, 1360), (16, "1 + 4k", 16)),
    "HunyuanVideo": ("HunyuanVideoPipeline", {"patch_size": 2}, {}, (720, 1280), (16, "1 + 4k", 15)),
    "Mochi": ("MochiPipeline", {"patch_size": 2}, {}, (480, 848), (16, "1 + 6k", 30)),
    "Allegro": ("AllegroPipeline", {"patch_size": 2, "sample_height": 90, "sample_width": 160}, BLOCKS, (720, 1280),
                (16, "24 + 16k", 15))}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_grid_of_public_models(name):
    kind, transformer, vae, size, (multiple, lengths, rate) = PUBLIC[name]
    grid = video_grid(kind, transformer, vae)
    assert ((grid.height, grid.width), grid.size_multiple, grid.lengths, grid.frame_rate) == (
        size, multiple, lengths, rate)
    assert kind in PIPELINES and grid.group == 0


def test_grid_of_allegro_has_one_size():
    grid = VideoGrid(temporal_compression=4, first_frames=4, min_frames=24, frame_step=16, fixed_size=True, group=0)
    assert (grid.latent_frames(88), grid.num_frames(22), grid.nearest_frames(81)) == (22, 88, 88)
    grid.check_size(64, 64)
    with pytest.raises(UserError, match="64x64 only"):
        grid.check_size(128, 64)
