"""File locks: one holder, released however it ends, and file systems that have none."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from filelock import FileLock

from odvae.utils.errors import UserError
from odvae.utils.locks import lock

HOLD = "import sys, pathlib; from odvae.utils.locks import lock; held = lock(pathlib.Path(sys.argv[1]), ''); " \
       "print('held', flush=True); sys.stdin.read()"


def test_a_lock_has_one_holder_and_is_free_when_its_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          cwd=Path(__file__).parents[3]) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="somebody else is here"):
            lock(path, "somebody else is here")
        process.kill()
    held = lock(path, "", wait=True)
    assert held is not None
    with pytest.raises(UserError):
        lock(path, "")
    held.release()
    assert lock(path, "") is not None


def test_a_file_system_without_locks_is_worked_on_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                 caplog: pytest.LogCaptureFixture) -> None:
    for number in (errno.ENOLCK, errno.ENOSYS):
        caplog.clear()
        monkeypatch.setattr(FileLock, "acquire", Mock(side_effect=OSError(number, os.strerror(number))))
        assert lock(tmp_path / "lock", "") is None
        assert f"{tmp_path} is on a file system without locks" in caplog.text
    monkeypatch.setattr(FileLock, "acquire", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(PermissionError):  # `cli_main` says what to do
        lock(tmp_path / "lock", "")
