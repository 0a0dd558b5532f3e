"""Prompts that change in the course of a video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

from odvae.utils.errors import UserError

PromptSchedule = Sequence[tuple[float, str]]  # (from this second on, prompt), the first from 0, in order
Prompt = str | PromptSchedule


def parse_schedule(prompt: Prompt) -> tuple[tuple[float, str], ...]:
    """A video's prompt as sections; one that holds throughout is one section.

    Raises:
        UserError: none, or they do not begin at 0, or are not in order.
    """
    if isinstance(prompt, str):
        return ((0.0, prompt),)
    cut = tuple((float(second), str(text)) for second, text in prompt)
    seconds = [second for second, _ in cut]
    if not cut or seconds[0] != 0 or not all(a < b < math.inf for a, b in pairwise(seconds)):
        raise UserError(f"a prompt's sections must begin at second 0 and go forward, they begin at "
                        f"{', '.join(f'{second:g}' for second in seconds) or 'none'}")
    return cut


def as_list(prompt: Prompt | Sequence[Prompt]) -> list[tuple[tuple[float, str], ...]]:
    """One prompt or several, each as sections.

    Raises:
        UserError: there is none, or its sections make no sense.
    """
    if isinstance(prompt, str):
        return [parse_schedule(prompt)]
    if not prompt:
        raise UserError("no prompt was given; \"\" is a prompt")
    first = prompt[0]
    if not isinstance(first, str) and len(first) == 2 and isinstance(first[0], int | float):
        return [parse_schedule(cast(PromptSchedule, prompt))]
    return [parse_schedule(one) for one in cast(Sequence[Prompt], prompt)]


def prompt_at(schedule: PromptSchedule, second: float) -> str:
    """The prompt that holds at a time."""
    return [text for begin, text in schedule if begin <= second + 1e-9][-1]


def format_prompt(prompt: Prompt) -> str:
    """A line that tells a prompt."""
    return " > ".join(text for _, text in parse_schedule(prompt))
