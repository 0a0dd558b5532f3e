"""Files of generated videos: what was stopped goes on, what is finished stays, latents go on and are decoded again."""

import inspect
import json

import numpy as np
import pytest
import torch
from pipelines import make_pipeline

import lvdm.generation.generate
from lvdm.cli import NO_OPTION, main, parser
from lvdm.generation.generate import decode, generate
from lvdm.generation.latent_store import LatentChunks, read_latents, read_settings
from lvdm.generation.requests import build_requests, continuation
from lvdm.sampling.params import GenerationParams, VideoFileParams, read_prompts
from lvdm.sampling.pipeline import LVDMPipeline
from lvdm.sampling.schedulers import make_scheduler
from odvae.data.video.reader import read_clip
from odvae.data.video.writer import VideoWriter
from odvae.utils.errors import UserError

BASE = dict(frames=25, steps=2, height=16, width=16)  # groups of 1, 2, 2, 2 latents


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


def asked(out, prompts=("red", "blue"), **changes):
    return build_requests(
        out, [VideoFileParams(prompt=p, seed=3 + i, **BASE | changes) for i, p in enumerate(prompts)]
    )


@pytest.fixture(scope="module")
def shown():
    """The frames that were handed to the encoder of H.264, by path: its own bytes vary from call to call."""
    frames, write = {}, VideoWriter.write

    def record(self, chunk):
        frames[self.path] = np.concatenate([frames[self.path], chunk]) if self.frames else chunk
        write(self, chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoWriter, "write", record)
        yield frames


@pytest.fixture(scope="module")
def finished(pipeline, shown, tmp_path_factory):
    """Two videos that nothing disturbed."""
    out = tmp_path_factory.mktemp("finished")
    done = generate(pipeline, asked(out), sheet=out / "sheet.png")
    assert [path.name for path in done.made] == ["00-red.mp4", "01-blue.mp4"] and not done.reused and not done.failed
    return out


def steps_of(monkeypatch):
    """Counts the questions to the model from here on."""
    counted = []
    step = lvdm.sampling.rollout.Solver.step
    monkeypatch.setattr(lvdm.sampling.rollout.Solver, "step", lambda *args: counted.append(1) or step(*args))
    return counted


def same_files(a, b, shown):
    for name in ("00-red", "01-blue"):
        assert np.array_equal(shown[a / f"{name}.mp4"], shown[b / f"{name}.mp4"])
        assert torch.equal(read_latents(a / f"{name}.mp4")[1], read_latents(b / f"{name}.safetensors")[1])
    assert not list(b.glob("*.parts")) and not list(b.glob(".*"))


def test_video_and_latents_say_how_they_were_made(pipeline, finished):
    made = pipeline("blue", seed=4, **BASE)
    about, latents = read_latents(finished / "01-blue.mp4")
    torch.testing.assert_close(latents, made.latents[0], atol=1e-4, rtol=1e-4)
    assert about.latents == 7 and set(about.parts) == {"vae", "transformer", "text encoder", "scheduler"}
    settings = read_settings(finished / "01-blue.mp4")
    assert settings == read_settings(finished / "01-blue.safetensors")
    assert settings["prompt"] == "blue" and settings["seed"] == 4 and settings["frame_rate"] == 8.0
    assert VideoFileParams(**settings) == about.settings
    assert (finished / "sheet.png").is_file()


@pytest.mark.parametrize("groups", [0, 1, 3, 5, 7])
def test_what_was_stopped_goes_on_to_the_same_files(pipeline, finished, tmp_path, shown, monkeypatch, groups):
    add, added = LatentChunks.add, []

    def stops(self, latents):
        if len(added) == groups:
            raise KeyboardInterrupt
        added.append(add(self, latents))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LatentChunks, "add", stops)
        generate(pipeline, asked(tmp_path))
    assert not list(tmp_path.glob("*.mp4")) and not list(tmp_path.glob("*.safetensors"))
    if groups > 1:  # what there is can be gone on with as it is
        job = continuation(pipeline, tmp_path / "01-blue.mp4", {"frames": 33})
        assert job.context_latents is not None and job.context_latents.shape[2] == (1, 3, 5, 7)[groups // 2 - 1]
    else:
        with pytest.raises(UserError, match="no finished group yet"):
            continuation(pipeline, tmp_path / "01-blue.mp4", {"frames": 33})
    steps = steps_of(monkeypatch)
    assert len(generate(pipeline, asked(tmp_path)).made) == 2
    assert len(steps) == 2 * (4 - groups // 2)  # rows take turns: so many groups of both were kept
    same_files(finished, tmp_path, shown)


def test_a_crash_when_one_of_two_was_finished_samples_nothing_again(pipeline, finished, tmp_path, shown, monkeypatch):
    join, joined = LatentChunks.finalize, []

    def stops(self):
        if joined:
            raise KeyboardInterrupt
        joined.append(join(self))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LatentChunks, "finalize", stops)
        generate(pipeline, asked(tmp_path))
    steps = steps_of(monkeypatch)
    assert len(generate(pipeline, asked(tmp_path)).made) == 2 and not steps
    for name in ("00-red", "01-blue"):  # decoded alone, so equal but for rounding
        a, b = (shown[folder / f"{name}.mp4"].astype(int) for folder in (finished, tmp_path))
        assert abs(a - b).max() <= 1
        assert torch.equal(*(read_latents(folder / f"{name}.mp4")[1] for folder in (finished, tmp_path)))


def test_what_is_finished_is_left_alone_unless_overwritten(pipeline, tmp_path, monkeypatch):
    jobs = asked(tmp_path, ["red"], frames=5)
    generate(pipeline, jobs)
    before = jobs[0].target.stat().st_mtime_ns
    steps = steps_of(monkeypatch)
    done = generate(pipeline, asked(tmp_path, ["red", "blue"], frames=5), sheet=tmp_path / "sheet.png")
    assert [p.name for p in done.reused] == ["00-red.mp4"] and [p.name for p in done.made] == ["01-blue.mp4"]
    assert len(steps) == 4 and jobs[0].target.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"00-red.mp4 is there already, made otherwise \(steps: 2 there, 3 here\)"):
        generate(pipeline, asked(tmp_path, ["red"], frames=5, steps=3))
    heun = LVDMPipeline(pipeline.vae, pipeline.transformer, pipeline.text_encoder, scheduler=make_scheduler("heun"))
    with pytest.raises(UserError, match=r"made otherwise .another scheduler"):
        generate(heun, jobs)
    with pytest.raises(UserError, match="was made by another scheduler"):
        continuation(heun, jobs[0].target, {"frames": 9})
    generate(pipeline, jobs, overwrite=True)
    assert jobs[0].target.stat().st_mtime_ns > before
    jobs[0].target.unlink()  # the latents are there: decoded again
    del steps[:]
    assert generate(pipeline, jobs).made == [jobs[0].target] and not steps


@pytest.mark.parametrize("frames", [9, 13])  # whole groups; a last one that was cut
def test_continuing_is_as_if_it_had_been_longer_from_the_start(pipeline, finished, tmp_path, frames):
    generate(pipeline, asked(tmp_path, ["red"], frames=frames))
    job = continuation(pipeline, tmp_path / "00-red.mp4", {"frames": 25})
    assert job.target == tmp_path / "00-red-25.mp4"
    generate(pipeline, [job])
    whole, later = (read_latents(path)[1] for path in (finished / "00-red.mp4", job.target))
    torch.testing.assert_close(later, whole, atol=1e-4, rtol=1e-4)  # sampled in company there
    assert torch.equal(later[:, :3], read_latents(tmp_path / "00-red.safetensors")[1][:, :3])
    again = continuation(pipeline, job.latents, {"frames": 33, "prompt": "blue"})
    assert again.settings.sections == ((25 / 8, "blue"),) and again.settings.seed == 3
    with pytest.raises(UserError, match=r"has 25 frames already.*next is 29"):
        continuation(pipeline, job.latents, {"frames": 25})


def test_continuing_alone_is_bit_for_bit(pipeline, shown, tmp_path):
    (whole,) = asked(tmp_path / "whole", ["red"])
    (short,) = asked(tmp_path, ["red"], frames=13)
    generate(pipeline, [whole])
    generate(pipeline, [short])
    longer = continuation(pipeline, short.latents, {"frames": 25})
    generate(pipeline, [longer])
    assert read_latents(longer.target)[0] == read_latents(whole.target)[0]  # nor can it be told from it
    assert torch.equal(read_latents(longer.target)[1], read_latents(whole.target)[1])
    assert np.array_equal(shown[longer.target], shown[whole.target])


def test_kept_latents_decode_to_the_same_video(pipeline, finished, shown, tmp_path):
    decode(pipeline, finished / "00-red.safetensors", tmp_path / "again.mp4")
    a, b = (shown[path].astype(int) for path in (tmp_path / "again.mp4", finished / "00-red.mp4"))
    assert abs(a - b).max() <= 1  # decoded in company there
    decode(pipeline, finished / "00-red.mp4", tmp_path / "large.mp4", scale=2)
    assert read_clip(tmp_path / "large.mp4").shape == (25, 32, 32, 3)
    with pytest.raises(UserError, match="no latents were kept"):
        decode(pipeline, tmp_path / "again.mp4", tmp_path / "more.mp4")


def test_a_mistake_in_one_video_does_not_stop_the_others(tmp_path):
    pipeline = make_pipeline(class_names=("cat", "dog"), text_dim=0)
    jobs = asked(tmp_path, ["cat", "cow"], frames=5)
    done = generate(pipeline, jobs)
    assert done.made == [jobs[0].target] and done.failed[0][0] == jobs[1].target
    assert "none of the 2 classes" in done.failed[0][1] and "1 made, 0 reused, 1 failed" in "\n".join(done.lines())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00-cat.mp4", "00-cat.safetensors"]


def test_a_file_of_prompts(tmp_path):
    base = VideoFileParams(seed=7, steps=2)
    (tmp_path / "a.txt").write_text("red\n\nblue\n")
    assert [(s.prompt, s.seed) for s in read_prompts(tmp_path / "a.txt", base)] == [("red", 7), ("blue", 8)]
    lines = [{"prompt": "red", "seed": 1, "frames": 9}, {"prompt": "red", "sections": [[2, "blue"]]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = read_prompts(tmp_path / "a.jsonl", base)
    assert (first.seed, first.frames, first.steps) == (1, 9, 2)
    assert second.prompts == ((0, "red"), (2, "blue")) and second.seed == 8
    for wrong, message in (('{"prompt": "x", "fraems": 9}', "did you mean 'frames'"), ("red", "line 1 is not JSON"),
                           ('{"prompt": "x", "frames": 0}', "frames"), ("", "holds no prompts")):
        (tmp_path / "a.jsonl").write_text(wrong)
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path / "a.jsonl", base)


def test_from_an_image_and_on_from_there(pipeline, tmp_path, shown):
    given = pipeline.encode_video(np.full((1, 16, 16, 3), 90, np.uint8))
    (job,) = build_requests(tmp_path, [VideoFileParams(prompt="red", **BASE | dict(frames=13))], given)
    generate(pipeline, [job])
    about, latents = read_latents(job.target)
    assert about.given == 1 and latents.shape[1] == 4 and torch.equal(latents[:, :1], given[0])
    longer = continuation(pipeline, job.target, {"frames": 25})
    assert longer.length == 3 and longer.generated_latents == 2
    generate(pipeline, [longer])
    (whole,) = build_requests(tmp_path / "whole", [VideoFileParams(prompt="red", **BASE)], given)
    generate(pipeline, [whole])
    assert np.array_equal(shown[longer.target], shown[whole.target])


def test_options_and_arguments_follow_from_the_parameters():
    arguments = inspect.signature(LVDMPipeline.stream).parameters
    assert {*GenerationParams().stream_arguments, "negative_prompt", "seed"} <= {*arguments}
    args = parser().parse_args(["generate", "red", "--history-noise", "0.3", "--scheduler", "heun"])
    assert (args.history_noise, args.scheduler, args.steps) == (0.3, "heun", None)
    assert {*VideoFileParams.model_fields} - {*vars(args)} == {*NO_OPTION}


def test_the_commands(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "red", "seed": 5}\n{"prompt": "blue", "frames": 41}\n')
    common = ["--pipeline", str(tmp_path / "pipeline"), "--out", str(tmp_path), "--frames", "9", "--steps", "1",
              "--height", "16", "--width", "16", "--scheduler", "heun"]
    command = ["generate", "--prompts", str(tmp_path / "prompts.jsonl"), *common]
    assert main([*command, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "01-blue.mp4: 41 frames, 5.1 s, of 16x16" in told and "decoding" in told
    assert not list(tmp_path.glob("*.mp4"))
    assert main(command) == 0
    assert "2 made, 0 reused, 0 failed" in capsys.readouterr().out
    assert read_settings(tmp_path / "00-red.mp4")["seed"] == 5
    assert not (tmp_path / "00-red.drift.json").exists()  # a short one
    assert json.loads((tmp_path / "01-blue.drift.json").read_text())["frames"] == 41
    assert main(command) == 0
    assert "0 made, 2 reused, 0 failed" in capsys.readouterr().out
    assert main(["generate", "--pipeline", str(tmp_path / "pipeline"), "--continue", str(tmp_path / "00-red.mp4"),
                 "--frames", "13"]) == 0
    assert main(["decode", str(tmp_path / "00-red-13.safetensors"), str(tmp_path / "again.mp4"), "--pipeline",
                 str(tmp_path / "pipeline"), "--tile", "16", "16"]) == 0
    assert read_clip(tmp_path / "again.mp4").shape == read_clip(tmp_path / "00-red-13.mp4").shape == (13, 16, 16, 3)
    for wrong in (["generate", *common], ["generate", "x", "--image", "a", "--video", "b"],
                  ["generate", "x", "--steps", "0", *common[:4]]):
        assert main(wrong) == 2
    told = capsys.readouterr().err
    assert "is a prompt" in told and "not more than one" in told and "steps = 0" in told
