"""The HTML of jobs: every state has its text and buttons, and user text never becomes markup."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from app.storage.jobs import Job, JobKind, JobSignal, JobState, Progress, new_id
from app.ui.html import job as job_html
from app.ui.html.queue import QueueEntry, queue
from app.ui.tabs.history import GalleryItem, gallery
from odvae.utils.format import format_duration

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>\' onclick=\'x\' ${alert(3)} {{7*7}}'
PARAMS = {"prompt": "red", "sections": [[2.0, "blue"]], "negative_prompt": "", "seed": 5, "seconds": 4.125,
          "num_frames": 33, "height": 64, "width": 128, "frame_rate": 8.0, "num_inference_steps": 20, "scheduler": None,
          "guidance_scale": 2.0, "guidance_rescale": 0.5, "shift": None, "history_groups": 2, "history_noise": 0.1,
          "upload": "", "job": "", "pipeline": "", "tile": None}  # fmt: skip


def job(state: JobState, **changes: Any) -> Job:
    made = Job(new_id(), JobKind.GENERATE, "me", state, PARAMS, "red", created=1e9, started=1e9, finished=1e9 + 75)
    return replace(made, **changes)


DONE = {"final": True, "frames": 33, "seconds": 4.125, "drift": {"jump": 1.25, "first_to_last": {"colour": 0.014}}}


def actions(html: str) -> list[str]:
    return re.findall(r'data-action="(\w+)"', html)


SAMPLING = Progress("sampling", group=3, groups=9, step=12, steps=20, frames=17, seconds_left=65, done=54, total=189)
DECODING = replace(SAMPLING, phase="decoding", part=1, parts=2)


@pytest.mark.parametrize(("state", "changes", "words", "buttons"), [
    (JobState.QUEUED, {}, "Next in the queue", {"pause", "edit", "cancel"}),
    (JobState.RUNNING, {"progress": Progress("loading")}, "Loading the model", {"pause", "stop", "cancel"}),
    (JobState.RUNNING, {"progress": Progress("text")}, "Encoding the prompt", {"pause", "stop", "cancel"}),
    (JobState.RUNNING, {"progress": SAMPLING}, "Group 3 of 9, step 12 of 20", {"pause", "stop", "cancel"}),
    (JobState.RUNNING, {"progress": SAMPLING}, "about 1 min 05 s left", {"pause"}),
    (JobState.RUNNING, {"progress": SAMPLING}, "2.1 of 4.1 s ready", {"pause"}),
    (JobState.RUNNING, {"progress": DECODING}, "Group 3 of 9, decoding part 1 of 2", {"stop"}),
    (JobState.RUNNING, {"signal": JobSignal.STOP}, "Stopping", {"cancel"}),
    (JobState.PAUSED, {}, "Can be resumed", {"resume", "edit", "cancel"}),
    (JobState.PAUSED, {"revision": 2}, "Paused", {"resume", "stop", "cancel"}),
    (JobState.DONE, {"result": DONE}, "took 1 min 15 s", {
        "extend", "decode", "reuse", "reseed", "duplicate", "favorite", "delete"}),
    (JobState.DONE, {"result": DONE, "favorite": True}, "jump at joins 1.25", {"unfavorite"}),
    (JobState.STOPPED, {"result": DONE | {"frames": 9}}, "The finished part is kept", {"resume", "extend", "decode"}),
    (JobState.CANCELLED, {}, "The results were discarded", {"resume", "reuse", "delete"}),
    (JobState.FAILED, {"error": "No memory.", "advice": "Ask for less."}, "Ask for less.",
     {"resume", "reuse", "delete"}),
])  # fmt: skip
def test_every_state_has_its_text_and_buttons(state, changes, words, buttons):
    one = job(state, **changes)
    shown = job_html.status(one) + job_html.about(one)
    assert words in shown
    assert buttons <= set(actions(shown))


def test_impossible_actions_have_no_button():
    assert "edit" not in actions(job_html.about(job(JobState.QUEUED, revision=3)))  # it was begun
    assert not {"stop", "delete", "decode"} & set(actions(job_html.about(job(JobState.QUEUED))))
    assert not {"extend", "decode"} & set(actions(job_html.about(job(JobState.FAILED))))  # it has no video
    decoded = job(JobState.DONE, kind=JobKind.DECODE, params={"job": new_id(), "tile": 64}, result=DONE)
    assert "decoded again in tiles of 64" in job_html.about(decoded)
    assert not {"extend", "decode", "reuse", "edit"} & set(actions(job_html.about(decoded)))
    trained = job(JobState.QUEUED, kind=JobKind.TRAIN, params={"run": "x"})
    assert not {"edit", "reuse", "duplicate"} & set(actions(queue([QueueEntry(trained)])))


class Strict(HTMLParser):
    """Records everything that could be executed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag] if tag in ("script", "iframe", "object", "x") else []
        for name, value in attrs:
            if name.startswith("on") or (name in ("href", "src") and not re.match(r"media/[0-9a-f]{32}/", value or "")):
                self.found.append(f"{tag} {name}={value}")


@pytest.mark.parametrize("kind", list(JobKind))
@pytest.mark.parametrize("state", list(JobState))
def test_user_text_never_becomes_markup(kind, state):
    params = {**PARAMS, "negative_prompt": HOSTILE, "sections": [[1.0, HOSTILE]], "scheduler": HOSTILE}
    one = job(state, kind=kind, title=HOSTILE, params=params, error=HOSTILE, advice=HOSTILE, notes=(HOSTILE,),
              revision=4, owner=HOSTILE, progress=Progress(HOSTILE, detail=HOSTILE, frames=3),
              result={"final": True, "settings": params})  # fmt: skip
    html = "".join((job_html.status(one, preview=True), job_html.about(one), gallery([GalleryItem(one, 5, True)]),
                    queue([QueueEntry(one, 2, 1, 80.0)], [{"state": HOSTILE, "error": HOSTILE, "number": 0}]),
                    job_html.notice(HOSTILE)))
    parser = Strict()
    parser.feed(html)
    assert parser.found == []
    assert "&lt;script&gt;" in html


def test_player_value_lists_the_available_files():
    assert job_html.player(None)["job"] == ""
    running = job(JobState.RUNNING, result={"chunks": 2, "frames": 9}, revision=2, progress=SAMPLING)
    value = job_html.player(running, preview=True)
    assert (value["chunks"], value["live"], value["final"]) == (2, True, "")
    assert value["preview"] != job_html.player(replace(running, progress=replace(SAMPLING, done=55)), True)["preview"]
    done = job_html.player(job(JobState.DONE, result=DONE | {"chunks": 0}, revision=7))
    assert (done["chunks"], done["live"], done["preview"]) == (0, False, "")
    assert done["final"].endswith("final.mp4?v=7")


def test_queue_panel_shows_position_and_start():
    entries = [QueueEntry(job(JobState.RUNNING)), QueueEntry(job(JobState.QUEUED), 3, 2, 130.0),
               QueueEntry(job(JobState.QUEUED), 4, 2)]
    html = queue(entries)
    assert "2 jobs queued" in html
    assert "3 before it (2 jobs of others)" in html
    assert "starts in about 2 min" in html
    assert html.count("starts in") == 1
    assert {"earlier", "later", "first"} <= set(actions(html))
    assert not {"earlier", "later"} & set(actions(queue(entries[:2])))  # alone, it has nowhere to go
    assert "empty" in queue([])
    loading, restarting = {"number": 0, "state": "loading"}, {"number": 1, "state": "restarting"}
    assert "being loaded" in queue([], [loading]) and "The worker crashed" in queue([], [restarting])
    both = queue([], [loading, restarting])
    assert "Worker 1 crashed" in both and "being loaded" not in both
    broken = {"number": 0, "state": "ready", "error": "no weights"}
    assert queue([], [broken, broken | {"number": 1}]).count("no weights") == 1


def test_gallery_shows_sizes_and_why_it_is_empty():
    html = gallery([GalleryItem(job(JobState.DONE, result=DONE, favorite=True), 3 * 2**20, True)])
    assert all(words in html for words in ("3.0 MiB", "poster.webp", "128x64", "a favorite"))
    assert "Nothing yet" in gallery([])
    assert "Nothing matches" in gallery([], filtered=True)


@pytest.mark.parametrize(("seconds", "words"), [(4.4, "4 s"), (75, "1 min 15 s"), (3725, "1 h 02 min"), (-1, "0 s")])
def test_durations(seconds, words):
    assert format_duration(seconds) == words
