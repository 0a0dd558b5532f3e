"""The page in a real browser: a video that grows, survives a reload, and is found again in the history."""

import os
import shutil
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PROMPT = "a red circle moving left over a striped background"
DURATION = "wanted => Math.abs(document.querySelector('#player video.lv-on').duration - wanted) < 0.01"
PLAYS = "() => document.querySelector('#player video.lv-on').currentTime > 0.05"


@pytest.fixture
def browser() -> Iterator:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed")
    if CHROMIUM is None:
        _missing("no chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def _missing(what: str) -> None:
    if os.environ.get("ODVAE_REQUIRE_ALL") == "1":
        pytest.fail(what)
    pytest.skip(what)


def open_page(browser, site, strange: list[str], **options):
    """A new visitor's page. Requests to anywhere else, and errors in the console, are noted in `strange`."""
    from playwright.sync_api import expect

    page = browser.new_context(viewport={"width": 1280, "height": 1000}, **options).new_page()
    page.set_default_timeout(90_000)
    expect.set_options(timeout=90_000)
    page.on("request", lambda r: r.url.startswith((site.url, "blob:", "data:")) or strange.append(r.url))
    page.on("pageerror", lambda error: strange.append(str(error)))
    page.on("console", lambda message: message.type == "error" and strange.append(message.text))
    page.goto(site.url)
    return page


def test_a_video_grows_is_found_after_a_reload_and_stays_in_the_history(browser, start_site, paced, tmp_path):
    from playwright.sync_api import expect

    site, strange = start_site(paced), []
    page = open_page(browser, site, strange)
    status = page.locator("#status section")

    page.locator("#generate").click()
    expect(page.locator("#notice")).to_contain_text("prompt: is empty")
    page.locator("#prompt textarea").fill(PROMPT)
    page.locator("#seed textarea, #seed input").fill("1234")
    page.locator("#generate").click()
    expect(status).to_have_attribute("data-state", "running")
    expect(status).to_contain_text("Group 1 of 5")
    expect(page.locator("#notice")).to_be_empty()
    job = status.get_attribute("data-job")

    paced.allow(2)
    page.wait_for_function(DURATION, arg=9 / 8)
    page.wait_for_function(PLAYS)
    expect(status).to_contain_text("9 of 33 frames")
    expect(status).to_contain_text("seed 1234")

    page.reload()
    expect(status).to_have_attribute("data-job", job)
    expect(status).to_have_attribute("data-state", "running")
    page.wait_for_function(DURATION, arg=9 / 8)
    paced.allow(1)
    page.wait_for_function(DURATION, arg=17 / 8)

    other = open_page(browser, site, strange)  # somebody else, or another browser: finds it in the history
    other.get_by_role("button", name=f"Show {PROMPT}").click()
    other.wait_for_function(DURATION, arg=17 / 8)

    paced.allow(2)
    for one in (page, other):
        one.wait_for_function(DURATION, arg=33 / 8)
        one.wait_for_function(PLAYS)
        expect(one.locator("#status section")).to_have_attribute("data-state", "done")
    box = page.locator("#player video.lv-on").bounding_box()
    assert box and box["width"] >= 400, "a small video is shown large"

    assert strange == []
    other.close()
    site.stop()
    site = start_site(paced, port=site.port)
    later = site.worker.submit({"prompt": "later"})
    expect(cards_of(page)).to_have_count(2)  # the page that was open all the time has found the new server
    site.worker.cancel(later.id)
    strange.clear()  # of refused connections, in between

    page.goto(site.url)
    card = cards_of(page).filter(has_text=PROMPT)
    card.get_by_role("button", name="Reuse settings").click()
    expect(page.locator("#prompt textarea")).to_have_value(PROMPT)
    expect(page.locator("#seed textarea, #seed input")).to_have_value("1234")
    page.on("dialog", lambda dialog: dialog.accept())
    card.get_by_role("button", name="Delete").click()
    expect(card).to_have_count(0)
    assert not (tmp_path / "data" / "videos" / job).exists()
    assert strange == []


def cards_of(page):
    return page.locator("#history article")


def test_behind_a_password_cancel_keeps_what_is_finished(browser, start_site, paced):
    from playwright.sync_api import expect

    site, strange = start_site(paced, auth="ada:secret"), []
    page = open_page(browser, site, strange, http_credentials={"username": "ada", "password": "secret"})
    page.get_by_role("button", name=PROMPT).click()  # an example fills the prompt
    expect(page.locator("#prompt textarea")).to_have_value(PROMPT)
    page.locator("#generate").click()
    paced.allow(2)
    page.wait_for_function(DURATION, arg=9 / 8)
    page.locator("#status").get_by_role("button", name="Cancel").click()
    expect(page.locator("#status section")).to_have_attribute("data-state", "cancelled")
    expect(page.locator("#status")).to_contain_text("What was finished is kept")
    page.wait_for_function(DURATION, arg=9 / 8)
    page.locator("#status").get_by_role("button", name="Queue again").click()
    expect(cards_of(page)).to_have_count(2)
    expect(page.locator("#status section")).to_have_attribute("data-state", "running")
    assert strange == []
