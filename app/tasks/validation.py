"""Validate input on the server, whatever the page has validated before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, StringConstraints, ValidationError

from odvae.utils.errors import UserError
from odvae.utils.format import format_problem

ID = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
MaybeID = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{32})?$")]  # "" for none
Model = TypeVar("Model", bound=BaseModel)
MAX_SHOWN = 60  # characters of a wrong value in an error message


def checked(model: type[Model], raw: Mapping[str, Any]) -> Model:
    """Validate `raw` by a pydantic model. Raises UserError with one sentence for each invalid value."""
    try:
        return model.model_validate(dict(raw))
    except (ValidationError, TypeError, ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise UserError(f"settings: cannot be read ({type(error).__name__}).") from None
        problems = dict.fromkeys(explain(item) for item in error.errors()[:8])
        raise UserError(" ".join(problems)) from None


def explain(item: Any) -> str:
    """Describe an item of a `ValidationError` in one sentence."""
    field = ".".join(str(part)[:MAX_SHOWN] for part in item["loc"]) or "settings"
    problem = format_problem(item)
    if item["type"] == "string_pattern_mismatch":
        problem = "is not an id of this app"
    if item["type"] in ("missing", "extra_forbidden", "string_too_long", "too_long"):
        return f"{field}: {problem}."  # the value is meaningless or too long to repeat
    value = repr(item["input"])
    return f"{field}: {problem}, but {value if len(value) <= MAX_SHOWN else value[:MAX_SHOWN] + '...'} was given."
