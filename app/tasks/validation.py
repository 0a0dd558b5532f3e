"""What comes in is checked here, on the server, whatever the page has checked before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, StringConstraints, ValidationError

from odvae.utils.errors import UserError

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
    context = item.get("ctx", {})
    given = repr(item["input"])
    given = given if len(given) <= SHOWN else given[:SHOWN] + "..."
    match item["type"]:
        case "missing":
            return f"{field}: is missing."
        case "string_too_long" | "too_long":
            return f"{field}: is too long, at most {context['max_length']} are allowed."
        case "greater_than_equal" | "less_than_equal" | "greater_than" | "less_than":
            kind = {"greater_than_equal": "at least", "less_than_equal": "at most", "greater_than": "more than",
                    "less_than": "less than"}[item["type"]]  # fmt: skip
            limit = next(context[key] for key in ("ge", "le", "gt", "lt") if key in context)
            return f"{field}: must be {kind} {limit}, but {given} was given."
        case "extra_forbidden":
            return f"{field}: there is no such setting."
        case "int_from_float" | "int_parsing" | "int_type" | "int_parsing_size":
            return f"{field}: must be a whole number, but {given} was given."
        case "float_parsing" | "float_type" | "finite_number":
            return f"{field}: must be a number, but {given} was given."
        case "string_pattern_mismatch":
            return f"{field}: {given} is no id of this app."
        case _:
            return f"{field}: {item['msg'][0].lower()}{item['msg'][1:]}, but {given} was given."
