"""The History tab: a gallery with search, restoring settings from a file, and the disk limit."""

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
from app.ui.html import job as job_html
from app.ui.html.labels import VIDEO_KINDS
from app.ui.html.templates import render
from app.ui.page import FILES, SILENT_EVENT, Page, owner_of, read_static, uploaded
from app.ui.tabs.generate import Form

PAGE_SIZE = 12  # cards at first; "Show more" adds twice as many
MAX_SHOWN = 600
TOTAL_LIFETIME = 5.0  # seconds for which the total size is reused
GIB = 2**30
STARTED = [state for state in JobState if state is not JobState.QUEUED]  # queued jobs are in the queue panel
VIDEOS, FAVORITES, ALL = "videos", "favorites", "jobs of every kind"


@dataclass(frozen=True)
class GalleryItem:
    """A job as the gallery shows it."""

    job: Job
    bytes: int = 0
    poster: bool = False

    @property
    def settings(self) -> list[str]:
        return job_html.settings_parts(self.job)


@dataclass
class Sizes:
    """The sizes of the jobs' files, cached for jobs that have ended."""

    job_files: JobFiles
    _known: dict[tuple[str, int, str], int] = field(default_factory=dict)
    _total: int = 0
    _total_at: float = -math.inf

    def of(self, job: Job) -> int:
        key = (job.id, job.revision, job.state.value)
        if key not in self._known:
            size = self.job_files.size_of(job)
            if not job.state.ended:
                return size
            self._known[key] = size
        return self._known[key]

    def total(self) -> int:
        """Return the bytes of all users' jobs, to which the limit applies."""
        if time.monotonic() - self._total_at >= TOTAL_LIFETIME:
            jobs = self.job_files.store.find(limit=-1)
            ids = {job.id for job in jobs}
            self._known = {key: size for key, size in self._known.items() if key[0] in ids}
            self._total, self._total_at = sum(map(self.of, jobs)), time.monotonic()
        return self._total


class Handlers:
    def __init__(self, service: JobService) -> None:
        self.service, self.sizes = service, Sizes(service.job_files)

    def update(self, followed: str | None, search: str | None, filter_name: str, limit: int,
             request: gr.Request) -> tuple[Any, ...]:  # fmt: skip
        """Return the cards, the visibility of "Show more", and the disk usage."""
        limit = min(max(PAGE_SIZE, limit or 0), MAX_SHOWN)
        jobs = self.service.history(owner_of(request), search=(search or "")[:200], favorites=filter_name == FAVORITES,
                                 kinds=() if filter_name == ALL else VIDEO_KINDS,
                                 states=STARTED if filter_name == VIDEOS else (),
                                 limit=limit + 1)  # fmt: skip
        job_files = self.service.job_files
        cards = [
            GalleryItem(job, self.sizes.of(job), job_files.public_file(job, "poster.webp") is not None)
            for job in jobs[:limit]
        ]
        filtered = bool((search or "").strip()) or filter_name == FAVORITES
        return gallery(cards, followed, filtered), gr.update(visible=len(jobs) > limit), self.disk()

    @property
    def limit(self) -> int:
        """The bytes that the history may take; 0: no limit."""
        return int((self.service.store.get_value("options") or {}).get("max_disk", self.service.config.max_disk))

    def disk(self) -> str:
        subject = "The histories of all users take" if self.service.private else "The history takes"
        return render("gallery.html", "disk", subject, self.sizes.total(), self.limit)

    def set_limit(self, gib: float | None) -> str:
        if gib is None or not math.isfinite(gib) or not 0 <= gib <= 10**6:
            return job_html.notice("The limit must be a number of GiB, 0 for none.", "error")
        options = dict(self.service.store.get_value("options") or {})
        self.service.store.set_value("options", options | {"max_disk": int(gib * GIB)})
        return job_html.notice("The limit applies from the end of the next job." if gib else "There is no limit now.")


def build(page: Page) -> None:
    """Add the tab's components and events. It fills the form of the Generate tab, which is built first."""
    handlers, form = Handlers(page.service), cast(Form, page.form)
    shown_cards = gr.State(PAGE_SIZE)
    with gr.Row(elem_classes="lv-tools", equal_height=True):
        search = gr.Textbox(label="Search", placeholder="words of the prompt or the settings", max_lines=1, scale=3,
                            min_width=220, elem_id="history-search")
        filter_name = gr.Radio([VIDEOS, FAVORITES, ALL], value=VIDEOS, label="Show", scale=3, min_width=300,
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
    with gr.Row(equal_height=False, elem_id="disk-row"):
        disk = gr.HTML("", elem_id="disk")
        limit = gr.Number(handlers.limit / GIB, label="Limit in GiB, 0 for none", minimum=0, elem_id="disk-limit",
                          min_width=200, scale=0)
        save = gr.Button("Set the limit", size="sm", elem_id="disk-limit-set", min_width=120, scale=0)

    refresh = page.poll(handlers.update, [form.followed, search, filter_name, shown_cards], [cards, more, disk])
    for change in search.change, filter_name.change:
        change(lambda: PAGE_SIZE, None, [shown_cards], **SILENT_EVENT).then(**refresh)
    more.click(lambda count: min(count + 2 * PAGE_SIZE, MAX_SHOWN), [shown_cards], [shown_cards],
               **SILENT_EVENT).then(**refresh)
    save.click(handlers.set_limit, [limit], [notice], **SILENT_EVENT).then(**refresh)
    form.listen(cards, notice, refresh)

    def restore(file: Any, seed: bool) -> dict[Any, Any]:
        if not file:
            return {notice: gr.skip()}
        return {file_field: None} | form.run(
            lambda: form.actions.restore(read_settings(*uploaded(file)), bool(seed)), notice)

    file_field.upload(restore, [file_field, seed], [notice, file_field, *form.outputs], **FILES)


def gallery(items: Sequence[GalleryItem], followed: str | None = None, filtered: bool = False) -> str:
    """Return the cards, newest first, as HTML. `filtered`: by a search or a filter."""
    if items:
        return render("gallery.html", "gallery", items, followed)
    return render("gallery.html", "empty", "Nothing matches." if filtered else
                  "Nothing yet. Every video that you generate stays here, also after a restart.")  # fmt: skip
