"""Atomic writes, hashes, error messages of commands, and progress."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from odvae.utils.errors import UserError, cli_main
from odvae.utils.files import (
    atomic_folder,
    atomic_path,
    fingerprint,
    hash_file,
    read_json,
    remove_abandoned,
    remove_temporaries,
    write_json,
    write_text,
)
from odvae.utils.progress import bar, track


def test_atomic_path_replaces_when_the_block_succeeds(tmp_path):
    target = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with atomic_path(target) as temporary:
            assert temporary.parent == target.parent and temporary.name.startswith(".a.txt.tmp-")
            temporary.write_text(text)
        assert target.read_text() == text
    assert list(target.parent.iterdir()) == [target]
    write_text(tmp_path / ("x" * 255), "a name as long as names may be")


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_atomic_path_keeps_the_old_file_on_any_exception(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(type(error)), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_atomic_path_keeps_the_old_file_when_flushing_fails(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        write_text(target, "new")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_atomic_folder_is_complete_or_absent_and_never_replaces(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a") as temporary:
        (temporary / "b").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "a") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / "sub" / "b").read_text() == "whole"
    (tmp_path / "a/old").write_text("old")
    with atomic_folder(tmp_path / "a", replace=True) as temporary:
        (temporary / "file").write_text("new")
        assert (tmp_path / "a/old").exists()  # another process reads it meanwhile
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]
    with pytest.raises(UserError, match="already"), atomic_folder(tmp_path / "a"):
        pass
    with pytest.raises(UserError, match="a folder of that name"), atomic_path(tmp_path / "a"):
        pass


def test_files_have_the_mode_that_the_umask_leaves(tmp_path):
    """Also those of safetensors, which makes them private."""
    (tmp_path / "plain").write_text("")
    with atomic_path(tmp_path / "file") as path:
        save_file({"a": torch.zeros(1)}, path)
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "sub").mkdir()
        save_file({"a": torch.zeros(1)}, folder / "sub/file")
    assert {os.stat(tmp_path / name).st_mode for name in ("file", "folder/sub/file")} == {
        os.stat(tmp_path / "plain").st_mode}


def test_temporaries_of_a_killed_process_are_removed(tmp_path):
    """Every kind of temporary, partly written (`os._exit` stands for the kill), and nothing else."""
    (tmp_path / "run").mkdir()
    for write in ("atomic_path(base / 'a.txt') as path: path.write_text('half')",
                  "atomic_folder(base / 'b.parts') as path: (path / 'in').mkdir()",
                  "atomic_folder(base / 'c') as path, atomic_path(path / 'd') as inner: inner.write_text('half')"):
        code = ("import os, pathlib\nfrom odvae.utils.files import *\n"
                f"base = pathlib.Path({str(tmp_path / 'run')!r})\nwith {write}; os._exit(9)\n")
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    (tmp_path / "run" / "kept").write_text("whole")
    assert len(list((tmp_path / "run").iterdir())) == 4
    remove_temporaries(tmp_path / "run", "b*")
    assert len(list((tmp_path / "run").iterdir())) == 3
    remove_temporaries(tmp_path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]


def test_only_what_a_killed_process_left_is_abandoned(tmp_path):
    target = tmp_path / "a[1].mp4"
    code = ("import os, sys\nfrom odvae.utils.files import *\n"
            "with atomic_path(sys.argv[1]) as path: path.touch(); os._exit(9)")
    assert subprocess.run([sys.executable, "-c", code, str(target)], check=False).returncode == 9
    (killed,) = tmp_path.iterdir()
    name, pid = killed.name, killed.name.split("-")[2]
    kept = {name.replace(pid, str(os.getppid())), name.replace(".tmp-", ".tmp-f"), name.replace("a[1]", "a1"), ".tmp-"}
    for other in kept:  # of a live process, another machine, another target, and something else
        (tmp_path / other).touch()
    remove_abandoned(target)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_json_round_trip_and_broken_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"ä": [1, 0.1, None]})
    assert read_json(path) == {"ä": [1, 0.1, None]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"ä": [1, 0.1, None]}
    for content in (b"{", b"\xff\xfe", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.json is broken"):
            read_json(path)
    with pytest.raises(UserError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json")
    for path in (tmp_path, tmp_path / "a.json" / "below.json"):
        with pytest.raises(UserError, match=r"is not a file"):
            read_json(path)


def wrapped_enospc():
    try:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/a.mp4")
    except OSError as error:
        raise RuntimeError("the writer failed") from error


@pytest.mark.parametrize("fail", [
    OSError(errno.ENOSPC, "No space left on device", "/data/a.mp4"), wrapped_enospc,
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")])
def test_a_command_reports_a_full_disk(capsys, fail):
    @cli_main
    def main(argv):
        if callable(fail):
            fail()
        raise fail

    assert main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the disk is full") and error.count("\n") == 1
    assert isinstance(fail, SafetensorError) or "/data/a.mp4" in error


def test_a_command_reports_a_path_that_cannot_be_used(capsys, tmp_path):
    (tmp_path / "file").touch()

    @cli_main
    def main(argv):
        (tmp_path / "file" / "folder").mkdir(parents=True)

    assert main([]) == 2 and "not a directory; choose another path" in capsys.readouterr().err


def test_exit_statuses_of_commands(capsys):
    @cli_main
    def main(argv=None):
        if argv:
            raise argv[0]
        return None

    assert main() == 0 and main([UserError("no such folder: x")]) == 2 and main([KeyboardInterrupt()]) == 130
    assert capsys.readouterr().err == "error: no such folder: x\nstopped\n"
    with pytest.raises(ValueError, match="a bug"):  # a bug keeps its traceback
        main([ValueError("a bug")])


def test_a_fingerprint_depends_only_on_content(tmp_path):
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.5, dtype=torch.bfloat16), "c": torch.zeros(0, 2)}
    config = {"x": (1, 2), "y": 1e-5}
    same = {"c": state["c"], "b": state["b"], "a": state["a"].t().contiguous().t()}
    assert fingerprint(same, {"y": 1e-5, "x": [1, 2]}) == fingerprint(state, config)
    others = [({**state, "a": state["a"].view(3, 2)}, config), ({**state, "b": state["b"].half()}, config),
              ({**state, "a": state["a"] + torch.finfo().eps}, config), (state, {**config, "y": 2e-5}),
              ({("d" if k == "c" else k): v for k, v in state.items()}, config), ({}, {})]
    fingerprints = {fingerprint(*other) for other in others} | {fingerprint(state, config)}
    assert len(fingerprints) == len(others) + 1
    assert fingerprint({}, {"x": Path("a"), "y": torch.half}) == fingerprint({}, {"x": "a", "y": "torch.float16"})
    with pytest.raises(TypeError, match="a config value of type set has no fingerprint"):
        fingerprint({}, {"x": {1, 2}})
    (tmp_path / "f").write_bytes(b"abc")
    assert hash_file(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()


def test_progress_in_a_log_file_is_short_and_complete(capsys):
    assert list(track(range(500), "work", "clip")) == list(range(500))
    with bar(10, "train", "step", initial=4) as progress:
        progress.update(6)
    captured = capsys.readouterr()
    assert captured.out == "" and "\r" not in captured.err
    assert "500/500" in captured.err and "10/10" in captured.err and len(captured.err.splitlines()) <= 4


def test_progress_is_written_for_other_programs(tmp_path, monkeypatch, capsys):
    path = tmp_path / "progress.json"
    with bar(4, "without a file"):
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("ODVAE_PROGRESS", str(path))
    with bar(10, "train", "step", initial=4) as progress:
        progress_file = json.loads(path.read_text())
        assert list(progress_file.values()) == ["train", "step", 4, 10, None, None, ""]
        progress.set_postfix({"loss": "0.5"}, refresh=False)
        progress.update(6)
    final = json.loads(path.read_text())
    assert (final["done"], final["seconds_left"], final["postfix"]) == (10, 0, "loss=0.5") and final["rate"] > 0
    with bar(3, "another process", disable=True) as progress:
        progress.update(1)
    assert json.loads(path.read_text())["title"] == "train" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setenv("ODVAE_PROGRESS", str(tmp_path / "there is no such folder" / "a"))
    assert list(track(range(3), "work")) == [0, 1, 2]
