"""Debian's chromium by Playwright; a missing browser skips a test, or fails it if ODVAE_REQUIRE_ALL is set."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-gpu")
AUTOPLAY = "--autoplay-policy=no-user-gesture-required"


def launch_chromium(*flags: str) -> Iterator[Any]:
    """Yield a browser, for a fixture: `yield from launch_chromium()`."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed")
    if CHROMIUM is None:
        _missing("no chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *flags])
        yield browser
        browser.close()


def _missing(reason: str) -> None:
    if os.environ.get("ODVAE_REQUIRE_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
