"""The pipeline: saving and loading, call and stream, lengths and sizes, continuing an image or a video."""

import json

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from pipelines import make_pipeline, make_t5

from lvdm import LVDMPipeline
from lvdm.sampling.outputs import RolloutGroup, RolloutStep, VideoChunk
from lvdm.sampling.schedulers import make_scheduler
from lvdm.text import WordHashEncoder
from odvae import AutoencoderKLODVAE
from odvae.inference.memory import memory_estimate
from odvae.utils.errors import UserError

CALL = dict(num_frames=9, num_inference_steps=2, height=16, width=16, seed=3)
UINT8 = CALL | dict(output_type="uint8")


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


@pytest.fixture(scope="module")
def clip():
    return np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)


@pytest.mark.parametrize("encoder", ["word hash", "t5"])
def test_saved_and_loaded_gives_the_same_video(tmp_path, encoder):
    pipeline = make_pipeline(make_t5() if encoder == "t5" else None)
    pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin")) and [path.name for path in tmp_path.rglob("*.py")] == ["pipeline.py"]
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "LVDMPipeline"]
    assert index["tokenizer"][0] == ("transformers" if encoder == "t5" else None)
    loaded = LVDMPipeline.from_pretrained(tmp_path)
    a, b = (p("red", **CALL).frames for p in (pipeline, loaded))
    assert np.array_equal(a, b)


def test_the_scheduler_is_saved_and_a_folder_without_one_loads(pipeline, tmp_path):
    heun = LVDMPipeline(pipeline.vae, pipeline.transformer, pipeline.text_encoder, scheduler=make_scheduler("heun"))
    heun.save_pretrained(tmp_path)
    loaded = LVDMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler).__name__ == "FlowMatchHeunDiscreteScheduler"
    made = loaded("red", **CALL).latents
    assert torch.equal(made, heun("red", **CALL).latents)
    assert torch.equal(made, pipeline("red", **CALL, scheduler=heun.scheduler).latents)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["scheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    old = LVDMPipeline.from_pretrained(tmp_path)
    assert torch.equal(old("red", **CALL).latents, pipeline("red", **CALL).latents)


@pytest.mark.parametrize("classes", [("cat", "dog"), ()])
def test_without_a_text_encoder_a_prompt_is_a_class_or_nothing(tmp_path, classes):
    pipeline = make_pipeline(class_names=classes, text_dim=0)
    assert pipeline.text_encoder is None
    pipeline.save_pretrained(tmp_path)
    loaded = LVDMPipeline.from_pretrained(tmp_path)
    prompts = ["dog", ""] if classes else ["", ""]
    made = loaded(prompts, **CALL).latents
    assert torch.equal(made, pipeline(prompts, **CALL).latents)
    torch.testing.assert_close(pipeline(prompts[0], **CALL).latents, made[:1], atol=1e-4, rtol=1e-4)
    if classes:
        assert (pipeline("cat", **CALL).latents - made[:1]).abs().max() > 1e-3
    with pytest.raises(UserError, match="nearest are .*dog" if classes else "takes no prompts"):
        pipeline.stream("dgo", **CALL)


def test_prompt_schedules(pipeline):
    call = CALL | dict(num_frames=25)
    mixed = pipeline([[(0, "red"), (1.0, "blue")], "red"], **call | dict(seed=[3, 3])).latents
    # At 8 frames a second the groups begin at 0, 1/8, 9/8 and 17/8 s: the third is the first that begins after 1 s.
    torch.testing.assert_close(mixed[0, :, :3], mixed[1, :, :3], atol=1e-5, rtol=1e-5)
    assert (mixed[0, :, 3:] - mixed[1, :, 3:]).abs().amax(dim=(0, 2, 3)).min() > 1e-4
    alone = pipeline([(0, "red"), (1.0, "blue")], **call).latents
    torch.testing.assert_close(alone[0], mixed[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="start at second 0"):
        pipeline.stream([(1.0, "red")], **call)


def test_a_frame_rate_stretches_time(pipeline):
    assert torch.equal(pipeline("red", **CALL, frame_rate=8.0).latents, pipeline("red", **CALL).latents)
    assert not torch.equal(pipeline("red", **CALL, frame_rate=24.0).latents, pipeline("red", **CALL).latents)


def test_continuing_latents_equals_the_uninterrupted_video(pipeline):
    whole = pipeline("red", **UINT8 | dict(num_frames=25))
    later = pipeline("red", **UINT8 | dict(num_frames=25), video_latents=whole.latents[:, :, :3])
    assert torch.equal(later.latents, whole.latents) and np.array_equal(later.frames, whole.frames)
    chunks = whole.latents.split(pipeline.group_layout(7), dim=2)
    assert np.array_equal(np.concatenate(list(pipeline.decode_latents(chunks)), axis=1), whole.frames)


def test_requirements_include_weights_and_the_decoders_peak(pipeline):
    needs = pipeline.requirements(16, 16, batch=2)
    assert needs.weights["transformer"] == sum(p.nbytes for p in pipeline.transformer.parameters())
    assert needs.decoding == memory_estimate(pipeline.vae, "decode", 16, 16, frames=8, batch=2)
    assert needs.total > needs.offloaded and "transformer" in str(needs) and "MiB" in str(needs)
    assert pipeline.requirements(32, 32, batch=2).decoding > needs.decoding


@pytest.mark.parametrize("encoder", ["word hash", "t5"])
def test_stream_works_with_hooks_of_model_offload(pipeline, encoder):
    """On a CPU there is no device to move to, but the hooks run, through decoding and an early end."""
    make = (lambda: make_pipeline(make_t5())) if encoder == "t5" else make_pipeline
    offloaded = make()
    offloaded.enable_model_cpu_offload(device="cpu")
    events = offloaded.stream("red", **CALL)
    next(events)
    events.close()
    result, expected = offloaded("red", **CALL), make()("red", **CALL)
    assert torch.equal(result.latents, expected.latents) and np.array_equal(result.frames, expected.frames)


def test_half_precision_gives_nearly_the_same_video(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = LVDMPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert loaded.transformer.dtype == loaded.vae.dtype == torch.float16
    half = loaded("red", **CALL)
    assert half.latents.dtype == torch.float32  # the solver's state
    whole = pipeline("red", **CALL)
    assert (half.latents - whole.latents).abs().max() < 0.1
    assert np.abs(half.frames.astype(int) - whole.frames).mean() < 2


@pytest.mark.parametrize("busy", [False, True], ids=["done at once", "done late"])
def test_decoding_beside_sampling_gives_the_same_video(pipeline, clip, monkeypatch, busy):
    """As on CUDA, but for the streams; a group is decoded when the next is begun, at the latest."""
    call = CALL | dict(num_frames=17, video=clip)
    expected = [event for event in pipeline.stream("red", **call) if isinstance(event, VideoChunk)]
    monkeypatch.setattr("lvdm.sampling.base.can_overlap", lambda *_: True)
    if busy:
        monkeypatch.setattr("odvae.inference.side_stream.PendingTensor.ready", lambda pending: False)
    events = list(pipeline.stream("red", **call))
    chunks = [event for event in events if isinstance(event, VideoChunk)]
    assert [chunk.group for chunk in chunks] == [chunk.group for chunk in expected]
    assert all(np.array_equal(a.frames, b.frames) and torch.equal(a.latents, b.latents)
               for a, b in zip(chunks, expected, strict=True))
    before = events[next(i for i, event in enumerate(events) if event is chunks[-2]) - 2]
    assert type(before) is (RolloutGroup if busy else RolloutStep)


def test_concatenated_chunks_are_the_result(pipeline):
    events = list(pipeline.stream(["red", "blue"], **CALL))
    chunks = [event for event in events if isinstance(event, VideoChunk)]
    assert [(p.group, p.groups, *p.frames.shape[:2], p.latents.shape[2]) for p in chunks] == [(1, 2, 2, 1, 1),
                                                                                             (2, 2, 2, 8, 2)]
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["RolloutStep", "RolloutStep", "RolloutGroup", "DecodeProgress", "VideoChunk"] * 2
    steps = [event for event in events if isinstance(event, RolloutStep)]
    for last, chunk in zip(steps[1::2], chunks, strict=True):  # the last estimate is the result
        torch.testing.assert_close(last.estimate, chunk.latents, atol=1e-5, rtol=0)
    result = pipeline(["red", "blue"], **UINT8)
    assert result.frames.shape == (2, 9, 16, 16, 3) and result.frames.dtype == np.uint8
    assert np.array_equal(np.concatenate([p.frames for p in chunks], 1), result.frames)
    whole = pipeline.vae.decode(pipeline.vae.denormalize(result.latents)).sample  # streamed decoding = whole decoding
    whole = (whole.detach().clamp(-1, 1) + 1) * 127.5
    assert np.abs(whole.permute(0, 2, 3, 4, 1).numpy() - result.frames).max() <= 0.51


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_a_short_video_is_the_beginning_of_a_longer_one(pipeline, frames):
    short = pipeline("red", **UINT8 | dict(num_frames=frames)).frames
    assert short.shape == (1, frames, 16, 16, 3)
    longer = pipeline("red", **UINT8 | dict(num_frames=17)).frames
    assert np.array_equal(short, longer[:, :frames])


def test_default_size_is_the_transformers(pipeline):
    assert pipeline("red", num_frames=1, num_inference_steps=1).frames.shape == (1, 1, 32, 16, 3)


def test_an_int_seed_counts_up_over_the_prompts(pipeline):
    both = pipeline(["red", "red"], **CALL).latents
    torch.testing.assert_close(pipeline("red", **CALL | dict(seed=4)).latents, both[1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pipeline(["red", "red"], **CALL | dict(seed=[3, 4])).latents, both)


def test_image_is_the_first_frame(pipeline, clip):
    chunks = [e for e in pipeline.stream(["red", "blue"], image=clip[0], **CALL) if isinstance(e, VideoChunk)]
    assert [(p.group, p.frames.shape[1]) for p in chunks] == [(0, 1), (1, 8)]
    x = torch.from_numpy(clip[:1]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    expected = pipeline.vae.decode(pipeline.vae.encode(x).latent_dist.mean).sample[0, :, 0].detach()
    expected = (expected.clamp(-1, 1).permute(1, 2, 0).numpy() + 1) * 127.5
    for row in chunks[0].frames[:, 0]:
        assert np.abs(row - expected).max() <= 0.51


def test_video_is_continued_from_its_end(pipeline, clip):
    result = pipeline("red", video=clip, **dict(CALL, height=None, width=None, num_frames=13))
    assert result.frames.shape == (1, 13, 16, 16, 3)
    assert torch.equal(result.latents[:, :, :2], pipeline.encode_video(clip))  # the context's latents are kept
    other = pipeline("red", video=clip[::-1], **dict(CALL, num_frames=13))
    assert (result.latents[:, :, 2:] - other.latents[:, :, 2:]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_frames=10), "nearest are 9 and 13"),
        (dict(height=24), "nearest is 32x16"),
        (dict(prompt=[]), "no prompt"),
        (dict(image=np.zeros((16, 16, 3), np.uint8), num_frames=1), "next is 5"),
        (dict(image=np.zeros((32, 16, 3), np.uint8), width=None), "height=16 was requested"),
        (dict(image=np.full((16, 16, 3), 2.0)), "must be uint8, or floats in"),
        (dict(video=np.zeros((4, 16, 16, 3), np.uint8)), "nearest are 1 and 5"),
        (dict(seed=[1, 2]), "2 seeds"),
        (dict(num_inference_steps=0), "at least 1"),
    ],
)
def test_invalid_arguments_are_refused_at_once(pipeline, change, message):
    with pytest.raises(UserError, match=message):
        pipeline.stream(**dict(prompt="red") | CALL | change)


def test_components_that_do_not_fit_are_refused(pipeline):
    with pytest.raises(UserError, match=r"text encoder's states have 32 channels, .* 16"):
        LVDMPipeline(pipeline.vae, pipeline.transformer, WordHashEncoder(dim=32))


def test_decoding_fits_the_free_memory(pipeline, monkeypatch, caplog):
    monkeypatch.setattr("odvae.inference.memory.TILES", (96,))
    call = dict(num_frames=5, num_inference_steps=1, height=32, width=256)
    need = memory_estimate(pipeline.vae, "decode", 32, 256, frames=4)
    monkeypatch.setattr("lvdm.sampling.base.free_memory", lambda device: int(need / .8) - 2)
    assert pipeline("red", **call).frames.shape == (1, 5, 32, 256, 3)
    assert "not exact" in caplog.text and not pipeline.vae.use_tiling
    monkeypatch.setattr("lvdm.sampling.base.free_memory", lambda device: 2**10)
    with pytest.raises(UserError, match="MiB of memory"):  # at once, before anything is sampled
        pipeline.stream("red", **call)


def test_components_that_are_assigned_are_checked():
    pipeline = make_pipeline()
    for scheduler in (UniPCMultistepScheduler.from_config(pipeline.scheduler.config), None):
        pipeline.scheduler = scheduler
        with pytest.raises(UserError, match="is not configured for flow matching"):
            pipeline("red", **CALL)
    pipeline.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipeline("red", **CALL)
    for name, component in (("vae", AutoencoderKLODVAE(block_out_channels=(8,) * 4, norm_num_groups=4)),
                            ("text_encoder", WordHashEncoder(dim=8))):
        other = make_pipeline()
        setattr(other, name, component)
        with pytest.raises(UserError, match="the transformer was made for"):
            other("red", **CALL)


def test_guidance_0_follows_only_the_negative_prompt():
    pipeline = make_pipeline()

    def latents(prompt, scale, negative=""):
        return pipeline(prompt, negative_prompt=negative, guidance_scale=scale, guidance_rescale=0.7, **CALL).latents

    torch.testing.assert_close(latents("red", 0.0), latents("blue", 0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(latents("red", 0.0, "blue"), latents("blue", 1.0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(latents("red", 2.0), latents("blue", 2.0), atol=1e-3)
