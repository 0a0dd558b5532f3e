"""Fingerprints of a pipeline: everything that changes the pixels counts, so that no other video is reused."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from peft import LoraConfig
from pipelines import SIZE, make_pipeline, make_requests, make_t5

from lvdm.generation.fingerprints import fingerprints
from lvdm.generation.generate import generate
from lvdm.generation.latent_store import LatentMetadata, is_vae_of
from lvdm.generation.pending import build_metadata
from lvdm.generation.requests import build_requests
from lvdm.sampling.params import VideoFileParams
from odvae.data.video.reader import read_clip
from odvae.utils import precision
from odvae.utils.errors import UserError


def interrupt(*args):
    raise KeyboardInterrupt


def test_fingerprint_depends_on_adapters_their_weight_and_state(tmp_path):
    pipeline = make_pipeline()
    transformer, (request,) = pipeline.transformer, make_requests(tmp_path)
    plain = fingerprints(pipeline)
    torch.manual_seed(1)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False), "a")
    generate(pipeline, [request])
    frames, seen = read_clip(request.target), [plain, fingerprints(pipeline)]

    def assert_changed(name):
        assert generate(pipeline, make_requests(tmp_path / name)).generated
        assert not np.array_equal(read_clip(tmp_path / name / "00-red.mp4"), frames), "it changes the pixels"
        with pytest.raises(UserError, match=r"other settings .another transformer"):
            generate(pipeline, [request])
        seen.append(fingerprints(pipeline))

    transformer.set_adapters(["a"], [0.1])
    assert_changed("weak")
    transformer.set_adapters(["a"], [1.0])
    assert generate(pipeline, [request]).reused == [request.target]
    transformer.disable_lora()
    assert_changed("off")
    transformer.enable_lora()
    assert generate(pipeline, [request]).reused == [request.target]
    transformer.fuse_lora(lora_scale=3.0)
    assert_changed("fused")
    assert len({parts["transformer"] for parts in seen}) == len(seen)
    transformer.unfuse_lora()
    transformer.delete_adapters("a")
    assert_changed("none")


def test_fingerprint_depends_on_all_that_changes_the_pixels(tmp_path):
    pipeline = make_pipeline(make_t5())
    (request,) = make_requests(tmp_path)
    generate(pipeline, [request])
    original, message = fingerprints(pipeline), r"other settings .another "
    pipeline.vae.enable_tiling(8, 8)
    with pytest.raises(UserError, match=message + "tiling"):
        generate(pipeline, [request])
    pipeline.vae.disable_tiling()
    pipeline.scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                                     solver_order=3)
    with pytest.raises(UserError, match=message + "scheduler"):
        generate(pipeline, [request])
    pipeline.scheduler = make_pipeline().scheduler
    assert fingerprints(pipeline) == original
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q"], init_lora_weights=False), "a")
    with_adapter = fingerprints(pipeline)["text encoder"]
    pipeline.text_encoder.disable_adapters()
    assert len({original["text encoder"], with_adapter, fingerprints(pipeline)["text encoder"]}) == 3
    pipeline = make_pipeline(make_t5())
    pipeline.transformer.set_attention_backend("_native_math")
    assert fingerprints(pipeline)["transformer"] != original["transformer"]
    pipeline = make_pipeline(make_t5())
    pipeline.transformer.enable_layerwise_casting(torch.float32, torch.bfloat16)
    assert fingerprints(pipeline)["transformer"] != original["transformer"]
    assert fingerprints(make_pipeline(make_t5()).to(torch.bfloat16))["vae"] != original["vae"]


def test_fingerprint_is_of_the_precision_computed_in(tmp_path, monkeypatch):
    """On a CPU without half precision, weights become float32 in the first generation; the fingerprint is the same."""
    monkeypatch.setattr(precision, "cpu_supports", lambda dtype: False)
    pipeline, (request,) = make_pipeline().to(torch.bfloat16), make_requests(tmp_path)
    before = fingerprints(pipeline)
    generate(pipeline, [request])
    assert fingerprints(pipeline) == before and generate(pipeline, [request]).reused == [request.target]
    assert fingerprints(make_pipeline().to(torch.bfloat16)) == before


def test_latents_of_half_precision_are_decoded_by_the_vae_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "cpu_supports", lambda dtype: True)
    (request,), half = make_requests(tmp_path), make_pipeline().to(torch.bfloat16)
    metadata = build_metadata(half, request, fingerprints(half))
    pipeline = make_pipeline()
    assert metadata.different_parts(fingerprints(pipeline), ["vae"]) and is_vae_of(pipeline, metadata)
    next(pipeline.vae.parameters()).data += 1
    assert not is_vae_of(pipeline, metadata)


def test_context_latents_count_as_settings(tmp_path):
    pipeline, settings = make_pipeline(), [VideoFileParams(prompt="red", seed=3, **SIZE)]
    dark, light = (pipeline.encode_video(np.full((1, 16, 16, 3), grey, np.uint8)) for grey in (20, 220))
    generate(pipeline, build_requests(tmp_path, settings, dark))
    assert generate(pipeline, build_requests(tmp_path, settings, dark)).reused
    with pytest.raises(UserError, match=r"other settings .source"):
        generate(pipeline, build_requests(tmp_path, settings, light))


def test_a_video_of_an_earlier_pipeline_is_not_mistaken_for_its_replacement(tmp_path, monkeypatch):
    """The process is killed after the latents and before the video, when it overwrites another pipeline's."""
    first, second, (request,) = make_pipeline(), make_pipeline(group_size=1), make_requests(tmp_path)
    generate(first, [request])
    before = read_clip(request.target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lvdm.generation.generate.VideoWriter.__exit__", interrupt)
        generate(second, [request], overwrite=True)
    assert request.latents.is_file() and np.array_equal(read_clip(request.target), before)
    assert generate(second, [request]).generated == [request.target]
    assert not np.array_equal(read_clip(request.target), before)


def test_a_video_from_before_an_option_keeps_its_fingerprint():
    """The hash is that of the code before `history_follow` and `sink_period`; where they are used they count."""
    def hashed(**settings):
        return LatentMetadata(settings=VideoFileParams(prompt="red", num_frames=17, **settings), given=0, latents=5,
                              parts={"vae": "x"}).fingerprint

    assert hashed() == "bd2412a1ba5512053d9d19d086a3cb7532048a48aae91cabfc1b43b6d3122ac8"
    assert len({hashed(), hashed(history_follow=0.5), hashed(sink_period=4), hashed(sink_period=8)}) == 4
