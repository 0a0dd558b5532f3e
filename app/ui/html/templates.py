"""The Jinja2 templates of the page. Autoescape is on: user text never becomes markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from app.ui.html.buttons import job_buttons, media_url
from app.ui.html.labels import KIND_LABELS, SIGNAL_LABELS, VIDEO_KINDS, count, format_date, state_label
from odvae.utils.format import format_bytes

ENVIRONMENT = Environment(loader=FileSystemLoader(Path(__file__).parents[1] / "templates"), autoescape=True,
                          trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)  # fmt: skip
ENVIRONMENT.globals |= {"job_buttons": job_buttons, "media_url": media_url, "KIND_LABELS": KIND_LABELS,
                        "SIGNAL_LABELS": SIGNAL_LABELS, "VIDEO_KINDS": VIDEO_KINDS}  # fmt: skip
ENVIRONMENT.filters |= {"bytes": format_bytes, "date": format_date, "count": count, "state": state_label}


def render(template: str, macro: str, *args: Any) -> str:
    """Render a macro of a template."""
    return str(getattr(ENVIRONMENT.get_template(template).module, macro)(*args))
