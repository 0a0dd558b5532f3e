"""The whole page in a real browser, over a real server and its worker."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from chromium import AUTOPLAY, launch_chromium
from tiny_adapters import save_adapter
from tiny_diffusers import make_diffusers_pipeline
from tiny_open_sora import make_open_sora_pipeline
from waiting import TIMEOUT

from app.inference.fragmented_mp4 import read_settings
from app.storage.jobs import JobState
from odvae.data.synthetic import write_rendered

pytestmark = pytest.mark.browser

ON = "document.querySelector('#player video.lv-on')"
LENGTH = f"expected => Math.abs({ON}?.duration - expected) < 0.01"
PLAYS = f"() => {ON}?.currentTime > 0.05"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    yield from launch_chromium(AUTOPLAY)


class Visitor:
    """A user's browser. Requests to other servers and console errors are collected in `errors`."""

    def __init__(self, browser, server, **options) -> None:
        from playwright.sync_api import expect

        self.errors: list[str] = []
        self.server = server
        options = {"viewport": {"width": 1280, "height": 1000}, "reduced_motion": "reduce", **options}
        self.page = browser.new_context(**options).new_page()
        self.page.set_default_timeout(1000 * TIMEOUT)
        expect.set_options(timeout=1000 * TIMEOUT)
        self.page.on("request", self._check_request)
        self.page.on("response", lambda r: r.status >= 400 and self.errors.append(f"{r.status} {r.url}"))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.on("dialog", lambda dialog: dialog.accept())
        self.open()

    def _check_request(self, request) -> None:
        if not request.url.startswith((self.server.url, "blob:", "data:")):
            self.errors.append(request.url)

    def close(self) -> None:
        """Close the browser's page, which would poll its server until the end of the module."""
        self.page.context.close()

    def open(self) -> None:
        self.page.goto(self.server.url)
        self.page.wait_for_selector("#status section")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def fill(self, field: str, text: str) -> None:
        self.page.locator(f"#{field} textarea, #{field} input").first.fill(text)

    def generate(self, prompt: str, **fields: str) -> None:
        for field, text in {"steps": "2", "seconds": "4", **fields}.items():
            self.fill(field, text)
        self.fill("prompt", prompt)
        self.page.locator("#generate").click()

    @property
    def status(self):
        return self.page.locator("#status section")

    def press(self, label: str, within: str = "#about") -> None:
        self.page.locator(within).get_by_role("button", name=label, exact=True).click()


@pytest.fixture
def visit(browser) -> Iterator[Callable[..., Visitor]]:
    """Return a function that opens the page of a server as a new visitor."""
    visitors: list[Visitor] = []

    def open_page(server, **options) -> Visitor:
        visitors.append(Visitor(browser, server, **options))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.close()


def test_a_growing_video_plays_across_reload_restart_and_stop(visit, start_server, gate):
    from playwright.sync_api import expect

    server = start_server()
    me = visit(server)
    me.page.locator("#generate").click()
    expect(me.page.locator("#notice")).to_contain_text("prompt: is empty")
    me.fill("seconds", "3.3")
    expect(me.page.locator("#check")).to_contain_text("25 frames on the model's grid (1+4k), plays 3.1 s")
    me.generate("red, waits 2", seed="1234")
    expect(me.status).to_have_attribute("data-state", "running")
    expect(me.status).to_contain_text("Group 3 of 5")
    me.page.wait_for_function(PLAYS)
    me.page.wait_for_function(LENGTH, arg=9 / 8)
    expect(me.status).to_contain_text("9 of 33 frames")
    job = me.status.get_attribute("data-job")

    me.page.reload()
    expect(me.status).to_have_attribute("data-job", job)
    me.page.wait_for_function(PLAYS)
    other = visit(server)  # another device finds it in the history
    other.tab("History")
    other.page.get_by_role("button", name="Show red, waits 2").click()
    expect(other.status).to_have_attribute("data-job", job)
    other.page.wait_for_function(PLAYS)
    other.generate("blue, waits 9", seed="5")
    expect(other.page.locator("#queue")).to_contain_text("blue, waits 9")
    assert me.errors == [] and other.errors == []

    server.stop()
    server = start_server(port=server.port)
    expect(me.status).to_have_attribute("data-state", "running")  # the page that was open all the time
    me.errors.clear()  # refused connections, in between
    gate(2)
    for one in (me, other):
        one.page.wait_for_function(LENGTH, arg=33 / 8)
        one.page.wait_for_function(PLAYS)
    box = me.page.locator("#player video.lv-on").bounding_box()
    assert box and box["width"] >= 400, "a small video is shown large"
    video = server.service.job_files.finished_file(server.service.job_files.find(job))
    assert read_settings(video)["seed"] == 1234

    other.tab("History")
    other.page.get_by_role("button", name="Show blue, waits 9").click()
    expect(other.status).to_have_attribute("data-state", re.compile("running|done"))
    me.tab("History")
    me.page.locator("#restore-file input[type=file]").set_input_files(video)
    expect(me.page.locator("#prompt textarea")).to_have_value("red, waits 2")  # it leads to the form
    expect(me.page.locator("#seed textarea, #seed input").first).to_have_value("1234")
    me.page.locator("#prompt textarea").fill("red, waits 2, waits 2")
    me.page.keyboard.press("Control+Enter")
    expect(me.page.locator("#about")).to_contain_text("red, waits 2, waits 2")
    expect(me.status).to_have_attribute("data-state", "done")
    assert me.errors == []
    me.tab("History")
    card = me.page.locator("#history article").filter(has_text="red, waits 2, waits 2")
    card.get_by_text("More", exact=True).click()
    card.get_by_role("button", name="Delete").click()
    expect(card).to_have_count(0)
    assert len(server.service.history("")) == 2


def test_pause_stop_sections_and_the_queue(visit, server, gates):
    from playwright.sync_api import expect

    me = visit(server)
    me.page.get_by_role("button", name="Add a section").click()
    me.page.locator("#timeline input[type=text], #timeline textarea").last.fill("blue, waits 3")
    me.generate("red, waits 3", seed="7")
    expect(me.status).to_contain_text("Group 4 of 5")
    me.press("Pause")
    (gates / "3").touch()
    expect(me.status).to_have_attribute("data-state", "paused")
    job = server.service.history("")[0]
    assert [text for _, text in job.params["sections"]] == ["blue, waits 3"]
    me.page.wait_for_function(PLAYS)  # what is there can be watched

    me.generate("waits 1")
    me.page.locator("#queue").wait_for()
    expect(me.page.locator("#about")).to_contain_text("waits 1")
    me.generate("one")
    me.generate("two")
    waiting = me.page.locator("#queue [data-job]").filter(has_text=re.compile("^|two"))
    expect(me.page.locator("#queue")).to_contain_text("two")
    assert waiting.count() >= 2 and [job.title for _, job in server.service.queue("")] == ["one", "two"]
    two = server.service.queue("")[1][1]
    me.page.locator(f"#queue [data-job='{two.id}'][data-action='earlier']").click()
    expect(me.page.locator("#player-notice")).to_be_empty()
    me.page.wait_for_function("() => document.querySelector('#queue').innerText.indexOf('two') < "
                              "document.querySelector('#queue').innerText.indexOf('one')")
    assert [job.title for _, job in server.service.queue("")] == ["two", "one"]

    me.press("Stop")
    (gates / "1").touch()
    expect(me.page.locator("#queue")).not_to_contain_text("two")
    stopped = next(job for job in server.service.history("") if job.title == "waits 1")
    assert stopped.state is JobState.STOPPED and server.service.job_files.finished_file(stopped).is_file()
    me.tab("History")
    card = me.page.locator(f"#history article[data-job='{job.id}']")
    card.get_by_role("button", name="Resume").click()
    expect(card).to_have_attribute("data-state", "done")
    assert me.errors == []


def test_layout_theme_and_a_cache_build(visit, server):
    from playwright.sync_api import expect

    write_rendered(server.service.config.folders[0] / "clips", 3, frames=17, size=32, seed=2)
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).every(c => c > 200)"
    me = visit(server, viewport={"width": 375, "height": 800})
    me.generate("red", seed="3")
    expect(me.status).to_have_attribute("data-state", "done")
    for width, scheme in (375, "light"), (1280, "dark"):
        me.page.set_viewport_size({"width": width, "height": 1000})
        me.page.emulate_media(color_scheme=scheme)
        for name in ("Generate", "History", "Compress", "Caches", "Training", "Settings"):
            tab = me.page.get_by_role("tab", name=name, exact=True)
            if scheme == "light" and not tab.count():
                me.page.get_by_role("button", name="More tabs").click()
                me.page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()
            else:
                tab.click()
            assert me.page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert me.page.evaluate(light) == (scheme == "light")
    me.page.get_by_label("light", exact=True).check()
    me.page.wait_for_function(light)
    me.open()
    me.page.wait_for_function(light)

    me.tab("Caches")  # and a cache is built from a folder that is picked
    me.page.locator("#cache-source input").click()
    me.page.get_by_role("option", name=re.compile("clips")).first.click()
    me.fill("cache-name", "mine")
    me.fill("cache-frames", "17")
    me.page.locator("#cache-build").click()
    kept = server.service.config.workspace / "caches" / "mine"
    expect(me.page.get_by_text(re.compile("3 clips")).first).to_be_visible()
    expect(me.page.locator("[data-state=done]:visible").first).to_be_visible()
    assert list(kept.glob("**/*.safetensors"))
    assert me.errors == []


@pytest.mark.slow
def test_pipelines_change_the_form_and_loras_are_generated_with(visit, server):
    from playwright.sync_api import expect

    root = server.service.config.folders[0] / "models"
    for name, pipeline in ("wan", make_diffusers_pipeline("WanPipeline")), ("sora", make_open_sora_pipeline()):
        pipeline.save_pretrained(root / name)
        save_adapter(pipeline.transformer, root / "loras", name=f"{name}-style.safetensors")
    server.service.services.assets.invalidate()
    me = visit(server)
    me.page.locator("#more button").first.click()

    def pick(field: str, choice: str) -> None:
        me.page.locator(f"#{field} input").click()
        me.page.get_by_role("option", name=re.compile(choice)).first.click()

    def value(field: str):
        return me.page.locator(f"#{field} input").first

    rows, check = me.page.locator("#loras select"), me.page.locator("#check")
    expect(me.page.locator("#loras")).to_contain_text("2 LoRAs found, for other pipelines.")
    pick("scheduler", "Heun")
    pick("pipeline", "models.sora")
    expect(value("steps")).to_have_value("100")
    expect(value("guidance")).to_have_value("7.5")
    expect(value("scheduler")).to_have_value("Euler ancestral (default)")  # it has no Heun
    expect(me.page.locator("#limits")).to_contain_text("no sections, continuation")
    expect(me.page.locator("#start-from")).to_be_hidden()
    expect(check).to_contain_text("17 frames on the model's grid (1+4k), plays 0.7 s at 24 fps, 16x16")
    pick("scheduler", "DDIM")
    me.press("Add a LoRA", "#loras")
    me.fill("loras", "0.5")
    me.page.locator("#loras input").press("Tab")
    me.generate("a red balloon", seconds="0.7", seed="3")
    expect(me.status).to_have_attribute("data-state", "done")
    expect(me.page.locator("#about")).to_contain_text(
        re.compile(r"scheduler ddim · LoRA \S*sora-style 0.5 · pipeline sora"))

    pick("pipeline", "models.wan")
    expect(me.page.locator("#scheduler")).to_be_hidden()
    expect(check).to_contain_text("sora-style is for another model than this WanPipeline")
    me.page.get_by_role("button", name="remove LoRA 1").click()
    me.press("Add a LoRA", "#loras")
    expect(check).to_contain_text("81 frames on the model's grid (1+4k), plays 5.1 s at 16 fps, 832x480")
    me.press("Reuse settings")
    expect(value("pipeline")).to_have_value(re.compile("sora"))
    expect(value("scheduler")).to_have_value("DDIM")
    expect(rows).to_have_count(1)
    expect(me.page.locator("#loras input")).to_have_value("0.5")
    me.page.reload()
    expect(value("pipeline")).to_have_value(re.compile("sora"))
    expect(rows.locator("option:checked")).to_contain_text("sora-style (rank 2)")
    assert me.errors == []
