"""Prompt schedules: prompts that change in the course of a video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

from odvae.utils.errors import UserError

PromptSchedule = Sequence[tuple[float, str]]  # (start in seconds, prompt), ascending, the first at 0
Prompt = str | PromptSchedule


def parse_schedule(prompt: Prompt) -> tuple[tuple[float, str], ...]:
    """Return a video's prompt as sections; a plain prompt is one section.

    Raises:
        UserError: there is none, the first does not start at 0, or they are not ascending.
    """
    if isinstance(prompt, str):
        return ((0.0, prompt),)
    schedule = tuple((float(second), str(text)) for second, text in prompt)
    seconds = [second for second, _ in schedule]
    if not schedule or seconds[0] != 0 or not all(a < b < math.inf for a, b in pairwise(seconds)):
        raise UserError(f"a prompt's sections must start at second 0 and ascend, they start at "
                        f"{', '.join(f'{second:g}' for second in seconds) or 'none'}")
    return schedule


def as_list(prompt: Prompt | Sequence[Prompt]) -> list[tuple[tuple[float, str], ...]]:
    """Return one prompt or several, each as sections.

    Raises:
        UserError: there is none, or its sections are invalid.
    """
    if isinstance(prompt, str):
        return [parse_schedule(prompt)]
    if not prompt:
        raise UserError("no prompt given; \"\" is a prompt")
    first = prompt[0]
    if not isinstance(first, str) and len(first) == 2 and isinstance(first[0], int | float):
        return [parse_schedule(cast(PromptSchedule, prompt))]
    return [parse_schedule(item) for item in cast(Sequence[Prompt], prompt)]


def prompt_at(schedule: PromptSchedule, second: float) -> str:
    """Return the prompt that holds at a time."""
    return [text for start, text in schedule if start <= second + 1e-9][-1]


def format_prompt(prompt: Prompt) -> str:
    """Return a prompt as one line."""
    return " > ".join(text for _, text in parse_schedule(prompt))
