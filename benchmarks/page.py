"""How much CPU, which the model needs, does an open page use? Cores that chromium and the server use while the page is
idle, while a job waits for its first frames, while a finished video plays, and while one grows.

    python benchmarks/page.py

Chromium renders without a GPU, as in the tests; a tiny pipeline waits at a gate.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import record, table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before it: tests/odvae is no package of ours

import chromium
import scripted_pipeline
from server_process import ServerProcess

SECONDS = 12.0
PLAYS = "document.querySelector('#player video.lv-on')?.currentTime > 0.5"


def main() -> None:
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        gates = Path(folder) / "gates"
        gates.mkdir()
        os.environ[scripted_pipeline.GATE] = str(gates)
        server = ServerProcess(Path(folder) / "data", scripted_pipeline.save(Path(folder) / "pipeline"))
        flags = [*chromium.FLAGS, chromium.AUTOPLAY]
        browser = playwright.chromium.launch(executable_path=chromium.CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(server.url)
        page.wait_for_selector("#status section")
        usage = {"idle": _cores(server)}
        for field, text in {"steps": "2", "seconds": "4", "prompt": "red, waits 0"}.items():
            page.locator(f"#{field} textarea, #{field} input").first.fill(text)
        page.locator("#generate").click()
        page.wait_for_selector("#status section[data-state=running]")
        usage["a job waits for its first frames"] = _cores(server)
        (gates / "0").touch()
        page.wait_for_selector("#status section[data-state=done]")
        usage["a finished video plays"] = _cores(server)
        page.locator("#prompt textarea").fill("red, waits 2")
        page.locator("#generate").click()
        page.wait_for_function(PLAYS)
        usage["a video grows"] = _cores(server)
        browser.close()
        server.kill("both")
    table(["cores", "chromium", "server"], [[name, *cores] for name, cores in usage.items()])
    record("cores that an open page takes", {"seconds": SECONDS}, usage)


def _cores(server: ServerProcess) -> tuple[float, float]:
    """Return the cores that chromium and the server process use, over some seconds."""
    def used() -> tuple[float, float]:
        browsers = [process for process in psutil.Process().children(recursive=True) if "chrom" in process.name()]
        return sum(map(_seconds, browsers)), _seconds(psutil.Process(server.process.pid))

    time.sleep(2)  # let the page render the last change
    before, start = used(), time.monotonic()
    time.sleep(SECONDS)
    elapsed = time.monotonic() - start
    browser, own = ((now - then) / elapsed for now, then in zip(used(), before, strict=True))
    return browser, own


def _seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:  # a renderer that has just ended
        return 0.0
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
