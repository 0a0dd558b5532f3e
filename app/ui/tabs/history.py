"""The History tab: a gallery with search, settings restored from a file, and the disk limit."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import gradio as gr

from app.api.service import JobService
from app.inference.fragmented_mp4 import read_settings
from app.storage.job_files import JobFiles
from app.storage.jobs import Job, JobState
from app.ui.html import job as views
from app.ui.html.labels import VIDEO_KINDS
from app.ui.html.templates import render
from app.ui.page import FILES, SILENT_EVENT, Page, owner_of, read_static, uploaded
from app.ui.tabs.generate import Form

SHOWN = 12  # cards at first, and more with each press of "More"
MOST = 600
FRESH = 5.0  # seconds that the sum of all files holds
GIB = 2**30
BEGUN = [state for state in JobState if state is not JobState.QUEUED]  # what waits, the queue shows
EVERYTHING, FAVORITES, ALL = "videos", "favorites", "jobs of every kind"


@dataclass(frozen=True)
class GalleryItem:
    """A job as the gallery shows it."""

    job: Job
    bytes: int = 0
    poster: bool = False

    @property
    def settings(self) -> list[str]:
        return views.settings_parts(self.job)


@dataclass
class Sizes:
    """The sizes of the jobs' files; of jobs that have ended they are read once."""

    job_files: JobFiles
    _known: dict[tuple[str, int, str], int] = field(default_factory=dict)
    _total: int = 0
    _at: float = -math.inf

    def of(self, job: Job) -> int:
        key = (job.id, job.revision, job.state.value)
        if key not in self._known:
            taken = self.job_files.size_of(job)
            if not job.state.ended:
                return taken
            self._known[key] = taken
        return self._known[key]

    def total(self) -> int:
        """Return the bytes of all users' jobs, as the limit counts them."""
        if time.monotonic() - self._at >= FRESH:
            jobs = self.job_files.store.find(limit=-1)
            alive = {job.id for job in jobs}
            self._known = {key: size for key, size in self._known.items() if key[0] in alive}
            self._total, self._at = sum(map(self.of, jobs)), time.monotonic()
        return self._total


class Handlers:
    def __init__(self, service: JobService) -> None:
        self.service, self.sizes = service, Sizes(service.job_files)

    def update(self, followed: str | None, search: str | None, shown: str, limit: int,
             request: gr.Request) -> tuple[Any, ...]:  # fmt: skip
        """Return the cards, whether there are more, and the disk usage."""
        limit = min(max(SHOWN, limit or 0), MOST)
        jobs = self.service.history(owner_of(request), search=(search or "")[:200], favorites=shown == FAVORITES,
                                 kinds=() if shown == ALL else VIDEO_KINDS, states=BEGUN if shown == EVERYTHING else (),
                                 limit=limit + 1)  # fmt: skip
        library = self.service.job_files
        cards = [
            GalleryItem(job, self.sizes.of(job), library.public_file(job, "poster.webp") is not None)
            for job in jobs[:limit]
        ]
        narrowed = bool((search or "").strip()) or shown == FAVORITES
        return gallery(cards, followed, narrowed), gr.update(visible=len(jobs) > limit), self.disk()

    @property
    def limit(self) -> int:
        """The bytes that the history may take; 0: no limit."""
        return int((self.service.store.get_value("options") or {}).get("max_disk", self.service.config.max_disk))

    def disk(self) -> str:
        whose = "The histories of all users take" if self.service.private else "The history takes"
        return render("gallery.html", "disk", whose, self.sizes.total(), self.limit)

    def set_limit(self, gib: float | None) -> str:
        if gib is None or not math.isfinite(gib) or not 0 <= gib <= 10**6:
            return views.notice("The limit must be a number of GiB, 0 for none.", "error")
        options = dict(self.service.store.get_value("options") or {})
        self.service.store.set_value("options", options | {"max_disk": int(gib * GIB)})
        return views.notice("The limit applies from the end of the next job." if gib else "There is no limit now.")


def build(page: Page) -> None:
    """Add the tab's components and events. It fills the form of the Generate tab, which is built before."""
    does, form = Handlers(page.service), cast(Form, page.form)
    shown_cards = gr.State(SHOWN)
    with gr.Row(elem_classes="lv-tools", equal_height=True):
        search = gr.Textbox(label="Search", placeholder="words of the prompt or the settings", max_lines=1, scale=3,
                            min_width=220, elem_id="history-search")
        which = gr.Radio([EVERYTHING, FAVORITES, ALL], value=EVERYTHING, label="Show", scale=3, min_width=300,
                         elem_id="history-filter")
    with gr.Row(elem_classes="lv-tools", equal_height=True):
        file_field = gr.File(label="Drop a generated MP4 to restore its settings", file_types=[".mp4"], height=140,
                             scale=3, min_width=220, elem_id="restore-file")
        with gr.Column(scale=3, min_width=300):
            gr.HTML("<p>A generated video stores its settings: drop it to restore them into the form.</p>",
                    elem_classes="lv-title")
            seed = gr.Checkbox(True, label="with its seed", elem_id="restore-seed")
    notice = gr.HTML("", elem_id="history-notice")
    cards = gr.HTML("", js_on_load=read_static("actions.js"), elem_id="history")
    more = gr.Button("Show more", size="sm", visible=False, elem_id="history-more")
    with gr.Row(equal_height=False, elem_id="room"):
        disk = gr.HTML("", elem_id="disk")
        limit = gr.Number(does.limit / GIB, label="Limit in GiB, 0 for none", minimum=0, elem_id="disk-limit",
                          min_width=200, scale=0)
        save = gr.Button("Set the limit", size="sm", elem_id="disk-limit-set", min_width=120, scale=0)

    refresh = page.poll(does.update, [form.followed, search, which, shown_cards], [cards, more, disk])
    for change in search.change, which.change:
        change(lambda: SHOWN, None, [shown_cards], **SILENT_EVENT).then(**refresh)
    more.click(lambda count: min(count + 2 * SHOWN, MOST), [shown_cards], [shown_cards], **SILENT_EVENT).then(**refresh)
    save.click(does.set_limit, [limit], [notice], **SILENT_EVENT).then(**refresh)
    form.listen(cards, notice, refresh)

    def restore(file: Any, seed: bool) -> dict[Any, Any]:
        if not file:
            return {notice: gr.skip()}
        return {file_field: None} | form.run(
            lambda: form.actions.restore(read_settings(*uploaded(file)), bool(seed)), notice)

    file_field.upload(restore, [file_field, seed], [notice, file_field, *form.outputs], **FILES)


def gallery(items: Sequence[GalleryItem], followed: str | None = None, narrowed: bool = False) -> str:
    """Return the cards, newest first, as HTML. `narrowed`: a search or a filter may have left out some."""
    if items:
        return render("gallery.html", "gallery", items, followed)
    return render("gallery.html", "empty", "Nothing matches." if narrowed else
                  "Nothing yet. Every video that you generate stays here, also after a restart.")  # fmt: skip
