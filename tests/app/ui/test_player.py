"""The player in a real browser, on a page of its own: it grows, survives a reload, and switches to the final file.

The files and the value of the page change only when a test changes them; every wait is for a state.
"""

import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import uvicorn
from chromium import launch_chromium
from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import FileResponse, HTMLResponse, StreamingResponse
from waiting import TIMEOUT

from app.inference.fragmented_mp4 import FragmentedMp4Writer, chunk_path, concat_fragments, write_picture

pytestmark = pytest.mark.browser

UI = Path(__file__).parents[3] / "app" / "ui" / "static"
RATE, GROUP = 8.0, 8  # frames a second, frames a chunk: a chunk lasts a second
JOB = "0" * 32

PAGE = f"""<!doctype html><link rel="icon" href="data:,"><style>{(UI / "player.css").read_text()}</style>
<div id="player" style="width: 500px">{(UI / "player.html").read_text()}</div><script type="module">
const props = {{value: await (await fetch('value')).json()}}, watchers = [];
window.played = [];  // all observed playback positions
const element = document.getElementById('player');
(function observe() {{
  const video = element.querySelector('video.lv-on'), last = window.played.at(-1);
  if (video.readyState > 1 && video.currentTime !== last) window.played.push(video.currentTime);
  requestAnimationFrame(observe);
}})();
new Function('element', 'props', 'watch', 'trigger', await (await fetch('player.js')).text())(
  element, props, (name, watcher) => watchers.push(watcher), () => {{}});
window.put = value => {{ props.value = value; watchers.forEach(watcher => watcher()); }};
</script>"""
ON = "document.querySelector('video.lv-on')"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    yield from launch_chromium()


class PlayerServer:
    """A server with one growing video. `grow` writes chunks, `update` changes the value of the player."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.video = FragmentedMp4Writer(folder, RATE)
        self.requests: Counter[str] = Counter()
        self.value = {"job": JOB, "revision": 0, "chunks": 0, "live": True, "final": "", "preview": "", "hint": "Soon."}
        app = FastAPI()
        app.get("/")(lambda: HTMLResponse(PAGE))
        app.get("/value")(lambda: self.value)
        app.get("/player.js")(lambda: FileResponse(UI / "player.js"))
        app.get(f"/media/{JOB}/chunks/{{number}}")(self._chunk)
        app.get(f"/media/{JOB}/{{name}}")(self._file)
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()

    def _chunk(self, number: int) -> Response:
        self.requests[f"chunk {number}"] += 1
        path = chunk_path(self.folder, number)
        if not path.is_file():
            raise HTTPException(404)
        return FileResponse(path, media_type="video/mp4")

    def _file(self, name: str) -> Response:
        self.requests[name] += 1
        if name == "growing.mp4":
            return StreamingResponse(concat_fragments(self.folder), media_type="video/mp4")
        return FileResponse(self.folder / name)

    def grow(self, chunks: int = 1) -> dict:
        for _ in range(chunks):
            time = np.arange(self.video.frames, self.video.frames + GROUP)
            frames = np.zeros((GROUP, 64, 96, 3), np.uint8)
            frames[np.arange(GROUP), :, 4 * time % 96] = 255
            self.video.append(frames)
        return self.update(chunks=self.video.chunks)

    def finish(self) -> dict:
        self.video.finish(self.folder / "final.mp4", {})
        return self.update(live=False, final=f"media/{JOB}/final.mp4?v=9")

    def update(self, **changes) -> dict:
        self.value = {**self.value, **changes, "revision": self.value["revision"] + 1}
        return self.value

    def stop(self) -> None:
        self.video.close()
        self._server.should_exit = True
        self._thread.join(TIMEOUT)


@pytest.fixture
def server(tmp_path) -> Iterator[PlayerServer]:
    server = PlayerServer(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def open_page(browser, server):
    """Pages of new visitors. Their errors are in `errors`."""
    opened, errors = [], []

    def open_one(script: str = ""):
        page = browser.new_context().new_page()
        page.set_default_timeout(1000 * TIMEOUT)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        if script:
            page.add_init_script(script)
        page.goto(server.url)
        page.wait_for_function("!!window.put")
        opened.append(page)
        return page

    yield SimpleNamespace(new=open_one, errors=errors)
    for page in opened:
        page.context.close()


def set_value(page, value: dict) -> None:
    """Update the value, as Gradio does."""
    page.evaluate("value => put(value)", value)


def plays_to(page, time: float) -> None:
    page.wait_for_function(f"time => {ON}.currentTime >= time", arg=time)


def waits_at(page, time: float) -> None:
    """Wait until playback has reached the end of the buffered video and stalls there."""
    page.wait_for_function(f"""time => {ON}.currentTime >= time - 0.13 && {ON}.readyState < 3
        && !{ON}.paused && !{ON}.ended && Math.abs({ON}.duration - time) < 0.01""", arg=time)


def plays_forward(page) -> bool:
    """Whether no frame was shown again. Chromium's clock may step back by some milliseconds when a file is loaded at
    the position of the one before."""
    return page.evaluate("""frame => {
      let latest = 0;
      return window.played.every(time => time > (latest = Math.max(latest, time)) - frame);
    }""", 1 / RATE)


def test_the_player_grows_waits_and_switches_to_the_final_file(server, open_page):
    page = open_page.new()
    assert page.locator(".lv-hint").inner_text() == "Soon."
    write_picture(server.folder / "preview.webp", np.full((8, 12, 3), 90, np.uint8))
    set_value(page, server.update(preview=f"media/{JOB}/preview.webp?v=1"))
    page.wait_for_selector('.lv-player[data-state="preview"] .lv-preview', state="visible")

    set_value(page, server.grow())
    page.wait_for_selector('.lv-player[data-state="video"] video.lv-on', state="visible")
    waits_at(page, 1)  # it started by itself
    set_value(page, server.grow())
    waits_at(page, 2)
    set_value(page, server.grow(2))
    plays_to(page, 2.5)
    set_value(page, server.grow())  # while it plays: no wait at the join
    plays_to(page, 4.2)
    assert plays_forward(page)
    assert page.evaluate(f"{ON}.videoWidth / {ON}.videoHeight") == 1.5

    page.evaluate(f"{ON}.pause(), {ON}.currentTime = 0.5")  # back, and on over all joins
    page.wait_for_function(f"!{ON}.seeking && {ON}.currentTime === 0.5")
    page.evaluate(f"window.played.length = 0, {ON}.play()")
    waits_at(page, 5)
    set_value(page, server.grow())
    set_value(page, server.finish())
    page.wait_for_function(f"{ON}.src.includes('final.mp4')")
    assert plays_forward(page), "the final file went on where the growing one was"
    page.wait_for_function(f"{ON}.loop && {ON}.currentTime < 1")
    assert all(server.requests[f"chunk {number}"] == 1 for number in range(5))
    assert open_page.errors == []


def test_a_reload_and_a_second_tab_play_on(server, open_page):
    page = open_page.new()
    set_value(page, server.grow(2))
    plays_to(page, 0.5)
    page.reload()
    page.wait_for_function("!!window.put")
    plays_to(page, 0.5)
    other = open_page.new()
    value = server.grow()
    for one in (page, other):
        set_value(one, value)
        waits_at(one, 3)
        assert one.evaluate("window.played[0]") < 1.5 and plays_forward(one)
    value = server.finish()  # nothing came with it: from its end it starts over
    for one in (page, other):
        set_value(one, value)
        one.wait_for_function(f"{ON}.src.includes('final.mp4') && {ON}.currentTime > 0.5 && {ON}.currentTime < 2.5")
    late = open_page.new()
    plays_to(late, 0.5)
    assert all(server.requests[f"chunk {number}"] == 3 for number in range(2)), "once each by each page"
    assert open_page.errors == []


@pytest.mark.parametrize("script", ["delete window.MediaSource; delete window.ManagedMediaSource;",
                                    "MediaSource.isTypeSupported = () => false;"])
def test_without_media_source_extensions_the_video_so_far_is_loaded_again(server, open_page, script):
    page = open_page.new(script)
    for chunks in (1, 2, 4):
        set_value(page, server.grow(chunks - server.video.chunks))
        page.wait_for_function(f"time => {ON}.duration === time", arg=chunks)
        plays_to(page, chunks - 0.5)
    assert plays_forward(page)
    set_value(page, server.finish())
    page.wait_for_function(f"{ON}.src.includes('final.mp4') && {ON}.currentTime > 0.1")
    assert server.requests["growing.mp4"] == 3
    assert open_page.errors == []


FULL = """const append = SourceBuffer.prototype.appendBuffer;
SourceBuffer.prototype.appendBuffer = function (data) {
  const {buffered} = this, held = buffered.length ? buffered.end(buffered.length - 1) - buffered.start(0) : 0;
  if (held > 7.5) throw new DOMException('full', 'QuotaExceededError');
  return append.call(this, data);
};"""


def test_a_full_buffer_loses_what_lies_far_behind(server, open_page):
    page = open_page.new(FULL)
    set_value(page, server.grow(12))
    plays_to(page, 0.1)
    page.evaluate(f"{ON}.playbackRate = 3")
    waits_at(page, 12)
    assert page.evaluate(f"{ON}.buffered.start(0)") > 2 and plays_forward(page)
    page.evaluate(f"{ON}.pause(), {ON}.currentTime = 0.5")  # there is nothing any more: to where there is
    page.wait_for_function(f"!{ON}.seeking && {ON}.currentTime === {ON}.buffered.start(0)")
    page.evaluate(f"{ON}.play()")
    waits_at(page, 12)
    set_value(page, server.finish())
    page.wait_for_function(f"{ON}.src.includes('final.mp4') && {ON}.playbackRate === 3")
    assert all(server.requests[f"chunk {number}"] == 1 for number in range(12))
    assert open_page.errors == []


def test_jobs_without_a_final_file_and_other_jobs_are_shown(server, open_page):
    page = open_page.new()
    set_value(page, server.grow(2))
    set_value(page, server.update(live=False, hint="It failed."))
    page.wait_for_function(f"{ON}.ended && {ON}.duration === 2")
    set_value(page, server.update(live=True))
    set_value(page, server.grow())  # it was resumed
    page.wait_for_function(f"{ON}.duration === 3")
    other = {"job": "1" * 32, "revision": 1, "chunks": 0, "live": True, "final": "", "preview": "", "hint": "Next."}
    set_value(page, other)
    page.wait_for_selector('.lv-player[data-state="waiting"] .lv-hint:text("Next.")', state="visible")
    assert page.locator("video[src]").count() == 0
    set_value(page, server.finish())
    plays_to(page, 1)
    page.evaluate("put(null)")
    page.wait_for_selector('.lv-player[data-state="empty"]')
    assert open_page.errors == []


def test_a_missing_chunk_is_requested_again(server, open_page):
    page = open_page.new()
    set_value(page, server.grow(1))
    plays_to(page, 0.5)
    with page.expect_response(lambda answer: answer.url.endswith("chunks/1") and answer.status == 404):
        set_value(page, server.update(chunks=2))  # e.g. while the server starts again
    server.grow()
    waits_at(page, 2)


def test_full_screen_survives_the_switch_to_the_final_file(server, open_page):
    page = open_page.new()
    set_value(page, server.grow(2))
    plays_to(page, 0.3)
    page.evaluate(f"document.addEventListener('click', () => {ON}.requestFullscreen())")
    page.mouse.click(5, 500)
    page.wait_for_function(f"document.fullscreenElement === {ON}")
    set_value(page, server.grow())
    plays_to(page, 2.1)
    set_value(page, server.finish())
    page.wait_for_function(f"{ON}.src.includes('final.mp4') && {ON}.currentTime > 0.1")
    assert page.evaluate(f"document.fullscreenElement === {ON}")
    assert open_page.errors == []
