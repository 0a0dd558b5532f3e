"""Format numbers and validation errors for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def format_bytes(size: float) -> str:
    """Format a number of bytes in binary units: "512 bytes", "1.5 KiB", "2.0 GiB"."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def format_duration(seconds: float) -> str:
    """Format a duration by its two largest units: "12 s", "3 min 05 s", "2 h 10 min"."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_problem(error: Mapping[str, Any]) -> str:
    """Say what is wrong with a value, without naming the field or repeating the value: "must be at least 1".

    Args:
        error: one of those that `pydantic.ValidationError.errors` returns.
    """
    context = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            return "there is no such setting"
        case "string_too_long" | "too_long":
            return f"is too long, at most {context['max_length']} are allowed"
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
        case "less_than_equal":
            return f"must be at most {context['le']}"
        case "greater_than":
            return f"must be more than {context['gt']}"
        case "less_than":
            return f"must be less than {context['lt']}"
        case "int_from_float" | "int_parsing" | "int_type" | "int_parsing_size":
            return "must be a whole number"
        case "float_parsing" | "float_type":
            return "must be a number"
    message: str = error["msg"].removeprefix("Value error, ").partition(", unable to")[0]
    if message.startswith("Input should "):
        return message.replace("Input should", "must", 1)
    return message[:1].lower() + message[1:]
