"""The suite runs all tests that there are."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest


def test_pytest_enters_every_folder(pytestconfig: pytest.Config) -> None:
    """A folder that matches `norecursedirs`, whose default has common names such as `build`, is silently left out."""
    skipped = pytestconfig.getini("norecursedirs")
    for path in Path(__file__).parent.rglob("test_*.py"):
        folders = path.relative_to(Path(__file__).parent).parts[:-1]
        assert not [name for name in folders for pattern in skipped if fnmatch(name, pattern)], path
