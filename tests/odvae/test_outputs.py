"""Outputs that cannot be written, and terminals that cannot show them: a clear message, and no file left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvdm.cli import main as lvdm
from odvae.cli import main as odvae
from odvae.data.synthetic import write_rendered
from odvae.data.video.reader import write_video
from odvae.inference.reconstruct import output_name
from odvae.utils.errors import UserError, cli_main, output_path
from odvae.utils.files import atomic_folder, path_text, write_text

ROOT = Path(__file__).parents[2]
URL = "s3://bucket/some/out"
COMMANDS: list[tuple[Any, list[str]]] = [
    (odvae, ["render", URL]), (odvae, ["train", f"output={URL}"]), (odvae, ["reconstruct", "in", "--out", URL]),
    (odvae, ["evaluate", "in", "--model", "m", "--out", URL]), (odvae, ["encode", "in", f"{URL}.safetensors"]),
    (odvae, ["decode", "in", f"{URL}.mp4"]), (odvae, ["inflate", "in", URL]), (odvae, ["import", "in", URL]),
    (odvae, ["export", "in", URL]), (odvae, ["cache", "show", "in", URL]),
    (odvae, ["cache", "query", "in", "select 1", "--out", URL]), (odvae, ["cache", "merge", "in", "--out", URL]),
    (odvae, ["cache", "export", "in", URL]), (lvdm, ["train", f"output={URL}"]),
    (lvdm, ["generate", "p", "--out", URL]), (lvdm, ["decode", "in", f"{URL}.mp4"]), (lvdm, ["evaluate", "--out", URL]),
    (lvdm, ["demo", "--out", URL])]


@pytest.mark.parametrize(("main", "arguments"), COMMANDS, ids=lambda value: " ".join(value[:2]) if isinstance(
    value, list) else value.__module__)
def test_a_url_is_no_output(main: Any, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as error:  # from argparse
        status = error.code
    assert status == 2 and "must lie on this machine's file system" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_url_is_no_output_in_python_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for write in (lambda: write_text(URL, "x"), lambda: write_text(Path(URL), "x"),
                  lambda: atomic_folder(URL).__enter__(),
                  lambda: write_video(f"{URL}.mp4", [np.zeros((1, 8, 8, 3), np.uint8)], 8)):
        with pytest.raises(UserError, match="must lie on this machine"):
            write()
    assert not list(tmp_path.iterdir())
    for path in ("a:b.mp4", "out/a:/b", "C:/videos", "./x"):
        assert output_path(path) == Path(path)


@pytest.mark.parametrize(("number", "message"), [
    (errno.EACCES, "permission denied; choose another path, or get the permission"),
    (errno.EROFS, "read-only file system; choose a writable path"),
    (errno.ENOTDIR, "not a directory; choose another path"), (errno.ENAMETOOLONG, "file name too long; choose a short"),
    (errno.EIO, "input/output error; check the disk")])
def test_system_errors_with_a_file_are_reported(number: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    @cli_main
    def main(argv: list[str] | None = None) -> int:
        raise OSError(number, os.strerror(number), "/some/where")

    assert main() == 2 and capsys.readouterr().err.startswith(f"error: /some/where: {message}")


def test_a_missing_permission_is_reported_before_any_work(tmp_path: Path, clips: Path, vae_folder: Path,
                                                          monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    mkdir = os.mkdir

    def refuse(path: Any, *more: Any, **options: Any) -> None:
        if "locked" in os.fspath(path):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        mkdir(path, *more, **options)

    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr("odvae.inference.reconstruct._reconstruct", lambda *_: pytest.fail("wasted work"))
    monkeypatch.setattr("odvae.inference.encoding.encode_stream", lambda *_, **__: pytest.fail("wasted work"))
    out, clip, vae = tmp_path / "locked", sorted(clips.glob("*.mp4"))[0], ["--vae", vae_folder]
    for arguments in (["render", out], ["reconstruct", clips, "--out", out, *vae], ["encode", clips, out, *vae],
                      ["encode", clip, out / "a.safetensors", *vae],
                      ["train", f"data.folder={clips}", f"output={out}", "model.block_out_channels=[8,8,16]",
                       "model.norm_num_groups=4"]):
        assert odvae(list(map(str, arguments))) == 2
        assert f"error: {out}: permission denied" in capsys.readouterr().err


def run(shell: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PY": sys.executable} | environment)


@pytest.mark.parametrize("module", ["odvae", "lvdm", "app"])
def test_errors_are_reported_on_any_terminal(module: str) -> None:
    """On one without umlauts, and with stdout, or both streams, closed."""
    wrong = "--config nö.yaml" if module == "app" else "train nö.yaml b.yaml"
    ascii_only = run(f'"$PY" -m {module} {wrong}', PYTHONIOENCODING="ascii")
    assert ascii_only.returncode == 2 and "n\\xf6" in ascii_only.stderr and "Traceback" not in ascii_only.stderr
    closed = run(f'"$PY" -m {module} {wrong} >&- ; echo $? >&2')
    assert closed.stderr.endswith("2\n") and "warning: stdout is closed" in closed.stderr
    assert "error: " in closed.stderr and "Traceback" not in closed.stderr
    assert run(f'"$PY" -m {module} {wrong} >&- 2>&-').returncode == 2


def test_results_that_cannot_be_written_to_stdout(tmp_path: Path) -> None:
    code = ("import sys; from odvae.utils.errors import cli_main; from odvae.utils.progress import print_result\n"
            "@cli_main\ndef main(argv=None):\n    print_result('für')\n    return 0\nsys.exit(main())")
    (tmp_path / "program.py").write_text(code)
    program = f'"$PY" {tmp_path / "program.py"}'
    environment = {"PYTHONPATH": str(ROOT)}
    ascii_only = run(program, PYTHONIOENCODING="ascii", **environment)
    assert (ascii_only.returncode, ascii_only.stdout, ascii_only.stderr) == (0, "f\\xfcr\n", "")
    full = run(f"{program} > /dev/full", **environment)
    assert full.returncode == 2 and full.stderr.startswith("error: the disk is full") and "Traceback" not in full.stderr
    broken = run(f"{program} | true; echo ${{PIPESTATUS[0]}}", **environment)
    assert broken.stdout in ("141\n", "0\n") and not broken.stderr  # depends on which ends first
    closed = run(f"{program} >&-", **environment)
    assert closed.returncode == 0 and closed.stderr == "warning: stdout is closed, so the results are not shown\n"


def test_a_system_error_without_a_file_keeps_its_traceback() -> None:
    @cli_main
    def main(argv: list[str] | None = None) -> int:
        raise OSError("no file is named here")

    with pytest.raises(OSError, match="no file"):
        main()


def test_folders_are_mirrored_and_a_failing_file_does_not_stop_the_others(vae_folder: Path, tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch,
                                                                          capsys: pytest.CaptureFixture[str]) -> None:
    source, latents, back = tmp_path / "in", tmp_path / "latents", tmp_path / "back"
    write_rendered(tmp_path / "one", 1, frames=5, size=16, seed=0)
    clip = next((tmp_path / "one").glob("*.mp4")).read_bytes()
    odd = os.fsdecode(b"caf\xe9.mp4")
    long = "x" * 250 + ".mkv"
    names = ["a/b.mp4", "a-b.mp4", "a/b.mkv", "a.mp4", long, "b/no.mp4", "odd/" + odd]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"no video" if "no.mp4" in name else clip)
    (source / "a/photo.heic").touch()
    vae = ["--vae", str(vae_folder)]
    from odvae.inference import codec

    encode_video = codec.encode_video

    def fail_for_one(path: Path, *more: Any) -> str:
        if path.name == "b.mkv":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return encode_video(path, *more)

    monkeypatch.setattr(codec, "encode_video", fail_for_one)
    assert odvae(["encode", str(source), str(latents), *vae]) == 0
    out = capsys.readouterr().out
    assert "5 encoded, 2 set aside" in out and "b/no.mp4" in out and "b.mkv: input/output error" in out
    assert "left out, by extension: 1 .heic" in out
    files = sorted(path.relative_to(latents).as_posix() for path in latents.rglob("*.safetensors"))
    expected = [f"odd/{odd.removesuffix('.mp4')}.safetensors", "a.safetensors", "a-b.safetensors", "a/b.safetensors"]
    (short,) = set(files) - set(expected)
    assert len(files) == 5 and short.startswith("x" * 100) and len(short) <= 255
    assert odvae(["encode", str(source), str(latents), *vae]) == 0  # only b.mkv is tried again
    assert "0 encoded, 5 encoded before and unchanged, 2 set aside" in capsys.readouterr().out
    assert odvae(["decode", str(latents), str(back), *vae]) == 0
    assert len(list(back.rglob("*.mp4"))) == 5 and (back / "odd" / odd).is_file() and (back / "a/b.mp4").is_file()
    assert odvae(["reconstruct", str(source), "--out", str(tmp_path / "pairs"), *vae]) == 0
    assert len(list((tmp_path / "pairs").rglob("*.mp4"))) == 6 and (tmp_path / "pairs/a/b.mp4").is_file()
    assert r"caf\\xe9" in (tmp_path / "pairs/report.json").read_text()
    monkeypatch.setattr(codec, "encode_video", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
    assert odvae(["encode", str(source), str(tmp_path / "full"), *vae]) == 2  # would affect every file
    assert "the disk is full" in capsys.readouterr().err


def test_sources_with_different_names_have_outputs_with_different_names(tmp_path: Path) -> None:
    sources = ["a.mp4", "a.MP4", "a.mkv", "a.safetensors.mp4", "a.mp4.mp4", "b/a.mp4", "b-a.mp4"]
    long = [f"{'ü' * 125}{i}.mkv" for i in range(3)]
    names = [output_name(tmp_path / name, tmp_path, ".safetensors") for name in sources + long]
    assert len(set(names)) == len(names) and str(names[0]) == "a.safetensors" and str(names[5]) == "b/a.safetensors"
    assert all(len(os.fsencode(name.name)) <= 255 and path_text(name) == str(name) for name in names)
    decoded = [output_name(tmp_path / name, tmp_path, ".mp4", ".safetensors") for name in names]
    assert len(set(decoded)) == len(decoded) and [str(name) for name in decoded[:4]] == sources[:1] + [
        "a.MP4.mp4", "a.mkv.mp4", "a.safetensors.mp4"]


@pytest.mark.parametrize(("option", "name", "message"), [
    ("--image", "film.mp4", "not a readable photo; give a PNG, JPEG"),
    ("--video", "photo.png", "that is a photo; give it with --image"), ("--image", "gone.png", "there is no such file"),
    ("--video", "gone.mp4", "there is no such file"), ("--video", "folder", "that is a folder")])
def test_a_source_of_the_wrong_kind_is_refused(option: str, name: str, message: str, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    write_video(tmp_path / "film.mp4", [np.zeros((5, 16, 16, 3), np.uint8)], 8)
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    (tmp_path / "folder").mkdir()
    assert lvdm(["generate", "p", option, str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option} {tmp_path / name}: ") and message in error
