"""Latent files: they decode frame for frame, in constant memory, and no broken file is left behind."""

from __future__ import annotations

import copy
import errno
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import tiny_vae
from processes import start_forked
from safetensors.torch import load_file, save_file
from waiting import TIMEOUT

from odvae.cli import main
from odvae.data.transforms import to_tensor, to_uint8
from odvae.data.video.reader import probe, read_clip, write_video
from odvae.inference.codec import decode_video, decoded_frames, encode_video, read_header
from odvae.inference.fingerprint import vae_fingerprint
from odvae.inference.loading import load_vae
from odvae.inference.memory import memory_estimate
from odvae.inference.streaming import encode_stream, encoder_reach
from odvae.model import AutoencoderKLODVAE
from odvae.utils.errors import UserError
from odvae.utils.files import write_json
from odvae.utils.malloc import eager_malloc_trim
from odvae.utils.profiling import profile_call


@pytest.fixture(scope="module")
def vae(vae_folder: Path) -> AutoencoderKLODVAE:
    model = load_vae(vae_folder)
    assert isinstance(model, AutoencoderKLODVAE)
    return model.eval()


def film(path: Path, frames: int, height: int = 32, width: int = 32, rate: float = 8.0) -> Path:
    """A moving gradient."""
    y, x, t = (np.arange(n) for n in (height, width, frames))
    level = 4 * (x + y[:, None] + 2 * t[:, None, None])
    write_video(path, [np.stack([level, level * 2, 255 - level], -1).astype(np.uint8)], rate)
    return path


@pytest.mark.parametrize("frames", [1, 5, 18, 33])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_decoded_frames_equal_a_reconstruction_in_memory(frames, dtype, vae, tmp_path):
    clip = film(tmp_path / "a.mp4", frames)
    encode_video(clip, tmp_path / "a.safetensors", vae, vae_fingerprint(vae), dtype)
    decoded = np.concatenate(list(decoded_frames(tmp_path / "a.safetensors", vae, vae_fingerprint(vae))))
    video = read_clip(clip)
    whole = np.concatenate([video, video[-1:].repeat(-(frames - 1) % 4, 0)])
    with torch.inference_mode():
        z = vae.encode(to_tensor(whole)[None]).latent_dist.mode()
        stored = z[0].transpose(0, 1).to(getattr(torch, dtype))
        expected = to_uint8(vae.decode(stored.float().transpose(0, 1)[None]).sample[0])[:frames]
    assert decoded.shape == expected.shape == video.shape
    assert np.abs(decoded.astype(int) - expected).max() <= 1  # streamed and whole may round differently
    latents = load_file(tmp_path / "a.safetensors")  # any reader of safetensors can read the file
    assert list(latents) == ["latents"] and latents["latents"].dtype == getattr(torch, dtype)
    assert (latents["latents"].float() - stored.float()).abs().max() < (1e-5 if dtype == "float32" else 2e-2)


def test_the_commands_take_any_size_and_length(vae_folder, tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    film(folder / "a.mp4", 10, 34, 46, rate=12.5)
    film(folder / "sub/b.mkv", 5)
    (folder / "broken.mp4").write_bytes(b"no video")
    latents, back = tmp_path / "latents", tmp_path / "back"
    assert main(["encode", str(folder), str(latents), "--vae", str(vae_folder)]) == 0
    out = capsys.readouterr().out
    assert "10 frames of 34x46" in out and "padded to 40x48" in out and "the last frame repeated 3 times" in out
    assert "set aside:" in out and "broken.mp4" in out and "2 encoded, 1 set aside" in out
    assert "the sound is not kept" in out
    header = read_header(latents / "a.safetensors")
    assert (header.frames, header.height, header.width, header.source) == (10, 34, 46, "a.mp4")
    assert main(["decode", str(latents), str(back), "--vae", str(vae_folder)]) == 0
    assert sorted(p.name for p in back.iterdir()) == ["a.mp4", "sub"] and (back / "sub/b.mkv.mp4").is_file()
    info = probe(back / "a.mp4")
    assert (info.frames, info.height, info.width) == (10, 34, 46)
    assert info.frame_rate == pytest.approx(12.5, rel=1e-3)


def test_a_second_run_processes_only_what_changed(vae_folder, tmp_path, capsys, monkeypatch):
    clips, latents, back = tmp_path / "in", tmp_path / "latents", tmp_path / "back"
    clips.mkdir()
    for name in "abc":
        film(clips / f"{name}.mp4", 5 if name == "a" else 9)

    def summary(command: str, *more: str, vae: Path = vae_folder) -> str:
        source, target = (clips, latents) if command == "encode" else (latents, back)
        assert main([command, str(source), str(target), "--vae", str(vae), *more]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    for command, verb in (("encode", "encoded"), ("decode", "decoded")):
        assert summary(command) == f"3 {verb}, 0 set aside"
        assert summary(command) == f"0 {verb}, 3 {verb} before and unchanged, 0 set aside"
    (latents / "b.safetensors").write_bytes((latents / "b.safetensors").read_bytes()[:-8])  # truncated
    film(clips / "c.mp4", 13)  # another video of that name
    assert summary("encode") == "2 encoded, 1 encoded before and unchanged, 0 set aside"
    assert summary("decode") == "1 decoded, 2 decoded before and unchanged, 0 set aside"  # b is as it was
    assert read_header(latents / "c.safetensors").frames == probe(back / "c.mp4").frames == 13
    assert summary("encode", "--store-dtype", "float32") == "3 encoded, 0 set aside"
    assert summary("encode", "--store-dtype", "float32", "--tile", "16", "16") == "3 encoded, 0 set aside"
    assert read_header(latents / "a.safetensors").tiles == "16x16+0"
    assert summary("encode", "--store-dtype", "float32").startswith("0 encoded")  # any tiles
    assert summary("encode", "--store-dtype", "float32", "--no-tiling") == "3 encoded, 0 set aside"
    other = load_vae(vae_folder)
    with torch.no_grad():
        next(other.parameters()).add_(.1)
    other.save_pretrained(tmp_path / "other")
    assert summary("encode", "--store-dtype", "float32", vae=tmp_path / "other") == "3 encoded, 0 set aside"
    monkeypatch.setattr("odvae.utils.precision.cpu_supports", lambda dtype: True)
    for verb, dtype in (("encode", "float32"), ("decode", "float16")):
        more = ["--store-dtype", dtype] if verb == "encode" else []
        assert summary(verb, *more, "--dtype", "bfloat16", vae=tmp_path / "other") == f"3 {verb}d, 0 set aside"
        assert summary(verb, *more, vae=tmp_path / "other").startswith(f"0 {verb}d")  # auto: any precision
    assert read_header(latents / "a.safetensors").precision == "bfloat16"
    assert read_header(latents / "a.safetensors").vae == vae_fingerprint(other), "of float32 weights"


def test_memory_options_of_the_command(vae, vae_folder, tmp_path, capsys):
    clip, latents = film(tmp_path / "a.mp4", 9, 96, 96), tmp_path / "a.safetensors"
    whole = memory_estimate(vae, "encode", 96, 96, frames=4)

    def run(*more: str) -> int:
        latents.unlink(missing_ok=True)
        return main(["encode", str(clip), str(latents), "--vae", str(vae_folder), "--frames-at-once", "4", *more])

    assert run("--memory", f"{whole / .8 / 2**20 + .01:.3f}MiB") == 0 and not read_header(latents).tiles
    tight = f"{whole / .8 / 2**20 - .01:.3f}MiB"
    assert run("--memory", tight) == 0 and read_header(latents).tiles
    capsys.readouterr()
    for more, message in ((("--memory", tight, "--no-tiling"), "allow tiles"), (("--memory", "1K"), "MiB of memory"),
                          (("--memory", "much"), "neither auto"), (("--frames-at-once", "3"), "nearest is 4"),
                          (("--tile", "20", "20"), "nearest is"), (("--tile", "64", "64", "--no-tiling"), "not both")):
        assert run(*more) == 2
        assert message in capsys.readouterr().err and not latents.exists()


def test_odd_sides_are_padded_to_even_ones(vae, vae_folder, tmp_path, capsys):
    fingerprint = vae_fingerprint(vae)
    encode_video(film(tmp_path / "a.mp4", 5), tmp_path / "a.safetensors", vae, fingerprint)
    state = load_file(tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors").model_copy(update={"height": 31, "width": 29})
    save_file(state, tmp_path / "odd.safetensors", {k: str(v) for k, v in header.model_dump().items()})
    assert next(decoded_frames(tmp_path / "odd.safetensors", vae, fingerprint)).shape[1:] == (31, 29, 3)
    assert main(["decode", str(tmp_path / "odd.safetensors"), str(tmp_path / "odd.mp4"), "--vae", str(vae_folder)]) == 0
    assert "31x29 padded to 32x30" in capsys.readouterr().out


def test_latents_of_another_vae_are_refused_with_both_fingerprints(vae, tmp_path, capsys):
    fingerprint = vae_fingerprint(vae)
    encode_video(film(tmp_path / "a.mp4", 5), tmp_path / "a.safetensors", vae, fingerprint)
    assert main(["decode", str(tmp_path / "a.safetensors"), str(tmp_path / "b.mp4")]) == 2  # with the shipped VAE
    assert fingerprint[:16] in (error := capsys.readouterr().err) and "pass --vae" in error
    other = tiny_vae(seed=1)
    with pytest.raises(UserError, match="latents of another VAE") as refused:
        decode_video(tmp_path / "a.safetensors", tmp_path / "b.mp4", other, vae_fingerprint(other))
    assert all(each[:16] in str(refused.value) for each in (fingerprint, vae_fingerprint(other)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "a.safetensors"]


@pytest.mark.parametrize(("command", "source", "target", "message"), [
    ("encode", "a.mp4", "a.mp4", "must end in .safetensors"),
    ("encode", "none.mp4", "a.safetensors", "no such file"),
    ("encode", "empty", "out", "no videos"),
    ("decode", "none.safetensors", "a.mp4", "no such file"),
    ("decode", "cut.safetensors", "b.mp4", "encode the video again"),
    ("decode", "foreign.safetensors", "b.mp4", "not written by `odvae encode`"),
    ("decode", "empty", "out", "no latent files"),
    ("decode", "short.safetensors", "b.mp4", "lacks its last"),
    ("decode", "good.safetensors", "b.txt", "must end in one of"),
])
def test_errors_leave_no_file(command, source, target, message, vae, vae_folder, tmp_path, capsys):
    clip = film(tmp_path / "a.mp4", 5)
    good = tmp_path / "good.safetensors"
    encode_video(clip, good, vae, vae_fingerprint(vae))
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-20])
    save_file({"latents": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    header = read_header(good).model_dump()
    save_file({"latents": load_file(good)["latents"][:1]}, tmp_path / "short.safetensors",
              {k: str(v) for k, v in header.items()})
    (tmp_path / "empty").mkdir()
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    assert main([command, str(tmp_path / source), str(tmp_path / target), "--vae", str(vae_folder)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert {path: path.stat().st_size for path in tmp_path.rglob("*")} == before


def test_latents_out_of_range_for_half_precision_are_refused(vae, tmp_path, monkeypatch):
    clip, chunk = film(tmp_path / "a.mp4", 5), AutoencoderKLODVAE.encode_chunk
    monkeypatch.setattr(AutoencoderKLODVAE, "encode_chunk",
                        lambda self, x, state: (chunk(self, x, state)[0] + 1e6, state))
    with pytest.raises(UserError, match="out of range for float16"):
        encode_video(clip, tmp_path / "a.safetensors", vae, "")
    assert not (tmp_path / "a.safetensors").exists()


def test_a_folder_without_finite_latents_is_no_user_error(vae, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    film(tmp_path / "in/a.mp4", 5)
    with torch.no_grad():
        broken = copy.deepcopy(vae)
        broken.encoder.conv_in.bias[0] = float("nan")
    broken.save_pretrained(tmp_path / "vae")
    assert main(["encode", str(tmp_path / "in"), str(tmp_path / "out"), "--vae", str(tmp_path / "vae")]) == 1
    assert "nothing in" in (error := capsys.readouterr().err) and "gave NaN" in error


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_video(vae_folder, tmp_path):
    """193 frames of 64x64 (several chunks) and then 833: held whole, the latter would take 30 MiB more as float32
    alone, and several times that in the network."""
    growth = []  # of each command, whatever the process holds before it
    with eager_malloc_trim():  # so that the peak is what is held, not a fragmented heap
        for name, frames in (("short", 193), ("long", 833)):
            video, latents, decoded = (tmp_path / f"{name}{end}" for end in (".mp4", ".safetensors", "-decoded.mp4"))
            film(video, frames, 64, 64)
            vae = ["--vae", str(vae_folder)]
            _, encoding = profile_call(partial(main, ["encode", str(video), str(latents), *vae]))
            _, decoding = profile_call(partial(main, ["decode", str(latents), str(decoded), *vae]))
            growth.append(max(encoding.growth, decoding.growth))
    assert growth[1] - growth[0] < 14, growth  # MiB
    assert probe(tmp_path / "long-decoded.mp4").frames == 833


def test_an_interrupted_encoding_resumes_to_the_same_bytes(vae_folder, tmp_path, monkeypatch, capsys):
    """It encodes again only as many frames as the encoder's state needs."""
    clip, out, chunk = film(tmp_path / "a.mp4", 362, 32, 32), tmp_path / "out", AutoencoderKLODVAE.encode_chunk
    seen: list[int] = []

    def encode(name: str, *more: str, stop: int | None = None) -> int:
        def counted(self, x, state):
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(x.shape[2])
            return chunk(self, x, state)

        seen.clear()
        monkeypatch.setattr(AutoencoderKLODVAE, "encode_chunk", counted)
        return main(["encode", str(clip), str(out / name), "--vae", str(vae_folder), "--frames-at-once", "8", *more])

    assert encode("whole.safetensors") == 0 and sum(seen) == 365
    monkeypatch.setattr("odvae.inference.encoding.PART_SECONDS", 0)
    assert encode("a.safetensors", stop=36) == 130 and not (out / "a.safetensors").exists()
    kept = sum(path.stat().st_size for path in out.glob("a.parts/*.latents")) // (4 * 4 * 4 * 2)  # c, h, w, float16
    assert kept == 1 + 35 * 2  # all encoded latent frames
    assert encode("a.safetensors") == 0 and not (out / "a.parts").exists()
    assert (out / "a.safetensors").read_bytes() == (out / "whole.safetensors").read_bytes()
    assert sum(seen) <= 365 - 4 * kept + encoder_reach(load_vae(vae_folder)) + 8 + 4 < 240
    # Latents kept with other settings are not used; a foreign folder is not touched.
    assert encode("a.safetensors", "--store-dtype", "float32", stop=9) == 130 and (out / "a.parts").is_dir()
    assert encode("a.safetensors", "--store-dtype", "bfloat16") == 0 and sum(seen) == 365
    assert not (out / "a.parts").exists()
    (out / "a.parts").mkdir()
    (out / "a.parts/mine.txt").touch()
    assert encode("a.safetensors") == 2 and (out / "a.parts/mine.txt").exists()
    assert "was not created by `odvae encode`" in capsys.readouterr().err


def test_an_interrupted_encoding_keeps_its_tiles(vae, vae_folder, tmp_path, monkeypatch, capsys):
    """Also if other memory is free now, unless they no longer fit it or others are requested."""
    clip, out, chunk = film(tmp_path / "a.mp4", 26, 96, 96), tmp_path / "a.safetensors", AutoencoderKLODVAE.encode_chunk
    whole = memory_estimate(vae, "encode", 96, 96, frames=4)
    ample, tight = "1G", f"{whole / .8 / 2**20 - .01:.3f}MiB"

    def encode(*more: str, stop: int | None = None) -> None:
        left = iter(range(stop)) if stop else None

        def counted(self, x, state):
            if left is not None and next(left, None) is None:
                raise KeyboardInterrupt
            return chunk(self, x, state)

        monkeypatch.setattr(AutoencoderKLODVAE, "encode_chunk", counted)
        capsys.readouterr()
        status = main(["encode", str(clip), str(out), "--vae", str(vae_folder), "--frames-at-once", "4", *more])
        assert status == (130 if stop else 0) and out.exists() is not bool(stop)

    encode("--memory", tight)
    tiles, uninterrupted = read_header(out).tiles, out.read_bytes()
    monkeypatch.setattr("odvae.inference.encoding.PART_SECONDS", 0)
    for first, then, reason in ((tight, ["--memory", ample], ""),
                                (ample, ["--memory", tight], "whole frames, which no longer fit the memory"),
                                (ample, ["--tile", "64", "64"], "whole frames, not in tiles of 64x64"),
                                (tight, ["--no-tiling"], f"{tiles.split('+')[0]}, not in whole frames")):
        out.unlink(missing_ok=True)
        encode("--memory", first, stop=3)
        assert list(tmp_path.glob("a.parts/*.latents"))
        encode(*then)
        log = capsys.readouterr().err
        assert ("starts over" in log) == bool(reason) and reason in log
        assert reason or out.read_bytes() == uninterrupted
        assert not (tmp_path / "a.parts").exists()


LOCKING = """
import sys, time
from pathlib import Path
from odvae.utils.locks import lock
held = lock(Path(sys.argv[1]), "")
print(flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(os.name != "posix", reason="Windows has no flock")
def test_two_processes_do_not_encode_to_one_file(vae, vae_folder, tmp_path, capsys, monkeypatch):
    clip, out = film(tmp_path / "a.mp4", 5), tmp_path / "a.safetensors"
    command = ["encode", str(clip), str(out), "--vae", str(vae_folder)]
    (tmp_path / "a.parts").mkdir()
    write_json(tmp_path / "a.parts/about.json", {"format": "odvae-latent-parts", "header": {}})
    other = subprocess.Popen([sys.executable, "-c", LOCKING, str(tmp_path / "a.parts/lock")], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert f"{out} is being encoded by another process" in error and not out.exists()
        assert (tmp_path / "a.parts/about.json").exists()
    finally:
        other.kill()
        other.communicate()
    assert main(command) == 0  # a lock is released when its process ends
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.safetensors"]
    out.unlink()
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "")))
    assert main(command) == 0  # also on a file system without locks


@pytest.mark.parametrize("variant", ["tiny", "demo"])
def test_a_stream_that_starts_encoder_reach_earlier_has_the_same_values(variant, vae_folder):
    """Bit for bit, with whole chunks, from any start; later starts differ."""
    from odvae.weights import DEMO_VAE

    model = load_vae(vae_folder if variant == "tiny" else DEMO_VAE).eval()
    step, reach = 8, encoder_reach(model)
    before = -(-reach // step) * step
    frames = before + 4 * step + 1
    rng = torch.Generator().manual_seed(0)
    video = torch.rand((1, 3, frames + 3 * step, 16, 16), generator=rng) * 2 - 1
    whole = torch.cat(list(encode_stream(model, [video], frames=step)), 2)
    later = torch.cat(list(encode_stream(model, [video[:, :, 3 * step:]], frames=step)), 2)
    n = 1 + before // 4
    assert torch.equal(later[:, :, n:], whole[:, :, 3 * step // 4 + n:]) and later[:, :, n:].shape[2] == step
    assert not torch.equal(later[:, :, 1:3], whole[:, :, 3 * step // 4 + 1:3 * step // 4 + 3])


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_ctrl_c_leaves_no_partial_file(command, vae, vae_folder, tmp_path):
    source, out, log = tmp_path / "a.mp4", tmp_path / "out", tmp_path / "log"
    target = out / "a.safetensors"
    film(source, 513 if command == "encode" else 1, 128, 128)
    if command == "decode":
        encode_video(source, tmp_path / "one.safetensors", vae, vae_fingerprint(vae))
        header = read_header(tmp_path / "one.safetensors").model_copy(update={"frames": 513})
        latents = load_file(tmp_path / "one.safetensors")["latents"].repeat(129, 1, 1, 1)
        source, target = tmp_path / "a.safetensors", out / "a.mp4"
        save_file({"latents": latents}, source, {k: str(v) for k, v in header.model_dump().items()})
    process = start_forked("odvae", command, source, target, "--vae", vae_folder, log=log)
    until = time.monotonic() + 240
    while not (out.is_dir() and list(out.iterdir())) and process.is_alive() and time.monotonic() < until:
        time.sleep(.01)
    assert next(iter(out.iterdir())) != target  # not finished yet
    os.kill(process.pid, signal.SIGINT)
    process.join(TIMEOUT)
    assert process.exitcode == 130 and "Traceback" not in log.read_text() and "stopped" in log.read_text()
    # Finished parts of an encoding are kept, if it ran long enough.
    assert {path.name for path in out.iterdir()} <= ({"a.parts"} if command == "encode" else set())
    assert not list(out.rglob(".*"))
