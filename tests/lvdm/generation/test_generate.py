"""Files of generated videos: stopped ones are resumed, finished ones skipped, stored latents continued and decoded."""

import json

import numpy as np
import pipelines
import pytest
import torch
from pipelines import make_pipeline

import lvdm.generation.generate
from lvdm.cli import main, parser
from lvdm.generation.arguments import NO_OPTION
from lvdm.generation.generate import decode, generate
from lvdm.generation.latent_store import LatentChunks, read_latents, read_settings
from lvdm.generation.requests import build_requests, continuation
from lvdm.sampling.inputs import RolloutInputs
from lvdm.sampling.params import GenerationParams, VideoFileParams, read_prompts
from lvdm.sampling.pipeline import LVDMPipeline
from lvdm.sampling.schedulers import make_scheduler
from odvae.data.video.reader import read_clip
from odvae.data.video.writer import VideoWriter
from odvae.utils.errors import UserError

BASE = dict(num_frames=25, num_inference_steps=2, height=16, width=16)  # groups of 1, 2, 2, 2 latents


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


def make_requests(out, prompts=("red", "blue"), **changes):
    return pipelines.make_requests(out, prompts, **BASE | changes)


@pytest.fixture(scope="module")
def written():
    """The frames passed to the H.264 encoder, by path: its output varies from call to call."""
    frames, write = {}, VideoWriter.write

    def record(self, chunk):
        frames[self.path] = np.concatenate([frames[self.path], chunk]) if self.frames else chunk
        write(self, chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoWriter, "write", record)
        yield frames


@pytest.fixture(scope="module")
def finished(pipeline, written, tmp_path_factory):
    """Two videos generated without interruption."""
    out = tmp_path_factory.mktemp("finished")
    report = generate(pipeline, make_requests(out), sheet=out / "sheet.png")
    assert [path.name for path in report.generated] == ["00-red.mp4", "01-blue.mp4"]
    assert not report.reused and not report.failed
    return out


def count_steps(monkeypatch):
    """Count the evaluations of the model from here on."""
    counted = []
    step = lvdm.sampling.rollout.Solver.step
    monkeypatch.setattr(lvdm.sampling.rollout.Solver, "step", lambda *args: counted.append(1) or step(*args))
    return counted


def assert_same_files(a, b, written):
    for name in ("00-red", "01-blue"):
        assert np.array_equal(written[a / f"{name}.mp4"], written[b / f"{name}.mp4"])
        assert torch.equal(read_latents(a / f"{name}.mp4")[1], read_latents(b / f"{name}.safetensors")[1])
    assert not list(b.glob("*.parts")) and not list(b.glob(".*"))


def test_video_and_latents_contain_their_settings(pipeline, finished):
    expected = pipeline("blue", seed=4, **BASE)
    metadata, latents = read_latents(finished / "01-blue.mp4")
    torch.testing.assert_close(latents, expected.latents[0], atol=1e-4, rtol=1e-4)
    assert metadata.latents == 7 and set(metadata.parts) == {"vae", "transformer", "text encoder", "scheduler"}
    settings = read_settings(finished / "01-blue.mp4")
    assert settings == read_settings(finished / "01-blue.safetensors")
    assert settings["prompt"] == "blue" and settings["seed"] == 4 and settings["frame_rate"] == 8.0
    assert VideoFileParams(**settings) == metadata.settings
    assert (finished / "sheet.png").is_file()


@pytest.mark.parametrize("groups", [0, 1, 3, 5, 7])
def test_a_stopped_generation_resumes_to_the_same_files(pipeline, finished, tmp_path, written, monkeypatch, groups):
    add, added = LatentChunks.add, []

    def stops(self, latents):
        if len(added) == groups:
            raise KeyboardInterrupt
        added.append(add(self, latents))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LatentChunks, "add", stops)
        generate(pipeline, make_requests(tmp_path))
    assert not list(tmp_path.glob("*.mp4")) and not list(tmp_path.glob("*.safetensors"))
    if groups > 1:  # the stored part can be continued
        request = continuation(pipeline, tmp_path / "01-blue.mp4", {"num_frames": 33})
        assert request.context_latents is not None and request.context_latents.shape[2] == (1, 3, 5, 7)[groups // 2 - 1]
    else:
        with pytest.raises(UserError, match="no finished group yet"):
            continuation(pipeline, tmp_path / "01-blue.mp4", {"num_frames": 33})
    steps = count_steps(monkeypatch)
    assert len(generate(pipeline, make_requests(tmp_path)).generated) == 2
    assert len(steps) == 2 * (4 - groups // 2)  # groups of the two are stored alternately: groups // 2 of both
    assert_same_files(finished, tmp_path, written)


def test_after_a_crash_complete_latents_are_not_sampled_again(pipeline, finished, tmp_path, written, monkeypatch):
    finalize, finalized = LatentChunks.finalize, []

    def stops(self):
        if finalized:
            raise KeyboardInterrupt
        finalized.append(finalize(self))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LatentChunks, "finalize", stops)
        generate(pipeline, make_requests(tmp_path))
    steps = count_steps(monkeypatch)
    assert len(generate(pipeline, make_requests(tmp_path)).generated) == 2 and not steps
    for name in ("00-red", "01-blue"):  # decoded alone: equal up to rounding
        a, b = (written[folder / f"{name}.mp4"].astype(int) for folder in (finished, tmp_path))
        assert abs(a - b).max() <= 1
        assert torch.equal(*(read_latents(folder / f"{name}.mp4")[1] for folder in (finished, tmp_path)))


def test_finished_videos_are_kept_unless_overwritten(pipeline, tmp_path, monkeypatch):
    requests = make_requests(tmp_path, ["red"], num_frames=5)
    generate(pipeline, requests)
    before = requests[0].target.stat().st_mtime_ns
    steps = count_steps(monkeypatch)
    report = generate(pipeline, make_requests(tmp_path, ["red", "blue"], num_frames=5), sheet=tmp_path / "sheet.png")
    assert [p.name for p in report.reused] == ["00-red.mp4"] and [p.name for p in report.generated] == ["01-blue.mp4"]
    assert len(steps) == 4 and requests[0].target.stat().st_mtime_ns == before
    with pytest.raises(UserError,
                       match=r"00-red.mp4 already exists with other settings \(num_inference_steps: 2 there, 3 here\)"):
        generate(pipeline, make_requests(tmp_path, ["red"], num_frames=5, num_inference_steps=3))
    heun = LVDMPipeline(pipeline.vae, pipeline.transformer, pipeline.text_encoder, scheduler=make_scheduler("heun"))
    with pytest.raises(UserError, match=r"other settings .another scheduler"):
        generate(heun, requests)
    with pytest.raises(UserError, match="was generated with another scheduler"):
        continuation(heun, requests[0].target, {"num_frames": 9})
    generate(pipeline, requests, overwrite=True)
    assert requests[0].target.stat().st_mtime_ns > before
    requests[0].target.unlink()  # the latents exist: decoded again
    del steps[:]
    assert generate(pipeline, requests).generated == [requests[0].target] and not steps


@pytest.mark.parametrize("frames", [9, 13])  # whole groups; a truncated last one
def test_continuing_equals_a_longer_video_from_the_start(pipeline, finished, tmp_path, frames):
    generate(pipeline, make_requests(tmp_path, ["red"], num_frames=frames))
    longer = continuation(pipeline, tmp_path / "00-red.mp4", {"num_frames": 25})
    assert longer.target == tmp_path / "00-red-25.mp4"
    generate(pipeline, [longer])
    whole, later = (read_latents(path)[1] for path in (finished / "00-red.mp4", longer.target))
    torch.testing.assert_close(later, whole, atol=1e-4, rtol=1e-4)  # sampled in a batch there
    assert torch.equal(later[:, :3], read_latents(tmp_path / "00-red.safetensors")[1][:, :3])
    again = continuation(pipeline, longer.latents, {"num_frames": 33, "prompt": "blue"})
    assert again.settings.sections == ((25 / 8, "blue"),) and again.settings.seed == 3
    with pytest.raises(UserError, match=r"has 25 frames already.*next is 29"):
        continuation(pipeline, longer.latents, {"num_frames": 25})


def test_continuing_without_a_batch_is_bit_for_bit(pipeline, written, tmp_path):
    (whole,) = make_requests(tmp_path / "whole", ["red"])
    (short,) = make_requests(tmp_path, ["red"], num_frames=13)
    generate(pipeline, [whole])
    generate(pipeline, [short])
    longer = continuation(pipeline, short.latents, {"num_frames": 25})
    generate(pipeline, [longer])
    assert read_latents(longer.target)[0] == read_latents(whole.target)[0]
    assert torch.equal(read_latents(longer.target)[1], read_latents(whole.target)[1])
    assert np.array_equal(written[longer.target], written[whole.target])


def test_stored_latents_decode_to_the_same_video(pipeline, finished, written, tmp_path):
    decode(pipeline, finished / "00-red.safetensors", tmp_path / "again.mp4")
    a, b = (written[path].astype(int) for path in (tmp_path / "again.mp4", finished / "00-red.mp4"))
    assert abs(a - b).max() <= 1  # decoded in a batch there
    decode(pipeline, finished / "00-red.mp4", tmp_path / "large.mp4", scale=2)
    assert read_clip(tmp_path / "large.mp4").shape == (25, 32, 32, 3)
    with pytest.raises(UserError, match="no latents are stored"):
        decode(pipeline, tmp_path / "again.mp4", tmp_path / "more.mp4")


def test_a_failing_video_does_not_stop_the_others(tmp_path):
    pipeline = make_pipeline(class_names=("cat", "dog"), text_dim=0)
    requests = make_requests(tmp_path, ["cat", "cow"], num_frames=5)
    report = generate(pipeline, requests)
    assert report.generated == [requests[0].target] and report.failed[0][0] == requests[1].target
    assert "not one of the 2 classes" in report.failed[0][1]
    assert "1 generated, 0 reused, 1 failed" in "\n".join(report.lines())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00-cat.mp4", "00-cat.safetensors"]


def test_a_file_of_prompts(tmp_path):
    base = VideoFileParams(seed=7, num_inference_steps=2)
    (tmp_path / "a.txt").write_text("red\n\nblue\n")
    assert [(s.prompt, s.seed) for s in read_prompts(tmp_path / "a.txt", base)] == [("red", 7), ("blue", 8)]
    lines = [{"prompt": "red", "seed": 1, "num_frames": 9}, {"prompt": "red", "sections": [[2, "blue"]]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = read_prompts(tmp_path / "a.jsonl", base)
    assert (first.seed, first.num_frames, first.num_inference_steps) == (1, 9, 2)
    assert second.prompts == ((0, "red"), (2, "blue")) and second.seed == 8
    for line, message in (('{"prompt": "x", "num_fraems": 9}', "did you mean 'num_frames'"),
                          ("red", "line 1 is not JSON"),
                          ('{"prompt": "x", "num_frames": 0}', "num_frames"), ("", "contains no prompts")):
        (tmp_path / "a.jsonl").write_text(line)
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path / "a.jsonl", base)


def test_an_image_is_animated_and_the_video_continued(pipeline, tmp_path, written):
    image = pipeline.encode_video(np.full((1, 16, 16, 3), 90, np.uint8))
    (request,) = build_requests(tmp_path, [VideoFileParams(prompt="red", **BASE | dict(num_frames=13))], image)
    generate(pipeline, [request])
    metadata, latents = read_latents(request.target)
    assert metadata.given == 1 and latents.shape[1] == 4 and torch.equal(latents[:, :1], image[0])
    longer = continuation(pipeline, request.target, {"num_frames": 25})
    assert longer.context_length == 3 and longer.generated_latents == 2
    generate(pipeline, [longer])
    (whole,) = build_requests(tmp_path / "whole", [VideoFileParams(prompt="red", **BASE)], image)
    generate(pipeline, [whole])
    assert np.array_equal(written[longer.target], written[whole.target])


def test_options_and_arguments_follow_from_the_parameters():
    arguments = {*GenerationParams().stream_arguments, "negative_prompt", "seed"}
    assert arguments <= {*RolloutInputs.__dataclass_fields__}
    args = parser().parse_args(["generate", "red", "--history-noise", "0.3", "--scheduler", "heun"])
    assert (args.history_noise, args.scheduler, args.num_inference_steps) == (0.3, "heun", None)
    assert {*VideoFileParams.model_fields} - {*vars(args)} == {*NO_OPTION}


def test_commands(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "red", "seed": 5}\n{"prompt": "blue", "num_frames": 33}\n')
    common = [
        "--pipeline",
        str(tmp_path / "pipeline"),
        "--out",
        str(tmp_path),
        "--num-frames",
        "9",
        "--num-inference-steps",
        "1",
        "--height",
        "16",
        "--width",
        "16",
        "--scheduler",
        "heun",
    ]
    command = ["generate", "--prompts", str(tmp_path / "prompts.jsonl"), *common]
    assert main([*command, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "01-blue.mp4: 33 frames, 4.1 s, 16x16" in output and "decoding" in output
    assert not list(tmp_path.glob("*.mp4"))
    assert main(command) == 0
    assert "2 generated, 0 reused, 0 failed" in capsys.readouterr().out
    assert read_settings(tmp_path / "00-red.mp4")["seed"] == 5
    assert not (tmp_path / "00-red.drift.json").exists()  # too short
    assert json.loads((tmp_path / "01-blue.drift.json").read_text())["frames"] == 33
    assert main(command) == 0
    assert "0 generated, 2 reused, 0 failed" in capsys.readouterr().out
    assert main(["generate", "--pipeline", str(tmp_path / "pipeline"), "--continue", str(tmp_path / "00-red.mp4"),
                 "--num-frames", "13"]) == 0
    assert main(["decode", str(tmp_path / "00-red-13.safetensors"), str(tmp_path / "again.mp4"), "--pipeline",
                 str(tmp_path / "pipeline"), "--tile", "16", "16"]) == 0
    assert read_clip(tmp_path / "again.mp4").shape == read_clip(tmp_path / "00-red-13.mp4").shape == (13, 16, 16, 3)
    for arguments in (["generate", *common], ["generate", "x", "--image", "a", "--video", "b"],
                      ["generate", "x", "--num-inference-steps", "0", *common[:4]]):
        assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert "is a prompt" in errors and "give only one of" in errors
    assert "num_inference_steps must be at least 1" in errors
