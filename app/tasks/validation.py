"""What comes in is checked here, on the server, whatever the page has checked before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, StringConstraints, ValidationError

from odvae.utils.errors import UserError
from odvae.utils.format import format_problem

ID = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
MaybeID = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{32})?$")]  # "": none
Model = TypeVar("Model", bound=BaseModel)
SHOWN = 60  # characters of a wrong value that an error repeats


def checked(model: type[Model], raw: Mapping[str, Any]) -> Model:
    """`raw` as the model has it. Raises UserError with one clear line for each thing that is wrong."""
    try:
        return model.model_validate(dict(raw))
    except (ValidationError, TypeError, ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise UserError(f"settings: cannot be read ({type(error).__name__}).") from None
        problems = dict.fromkeys(explain(item) for item in error.errors()[:8])
        raise UserError(" ".join(problems)) from None


def explain(item: Any) -> str:
    """Say in a line what an item of a `ValidationError` means."""
    field = ".".join(str(part)[:SHOWN] for part in item["loc"]) or "settings"
    problem = format_problem(item)
    if item["type"] == "string_pattern_mismatch":
        problem = "is no id of this app"
    if item["type"] in ("missing", "extra_forbidden", "string_too_long", "too_long"):
        return f"{field}: {problem}."  # the value says nothing, or is too long to be repeated
    given = repr(item["input"])
    return f"{field}: {problem}, but {given if len(given) <= SHOWN else given[:SHOWN] + '...'} was given."
