"""Configuration: pydantic schemas next to the code they configure, YAML overrides, then `key.sub=value` arguments."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from .errors import UserError, output_path
from .files import write_text
from .format import format_problem


class Config(BaseModel):
    """The base of every schema: frozen, and unknown keys are errors.

    `may_change`: fields that may differ when a run resumes, because they do not affect what is learned.
    """

    may_change: ClassVar[frozenset[str]] = frozenset()
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, protected_namespaces=(),
                              allow_inf_nan=False)


OutputPath = Annotated[Path, AfterValidator(output_path)]  # of a file or folder to write
Schema = TypeVar("Schema", bound=BaseModel)
_Path = tuple[Any, ...]


def load_config(schema: type[Schema], path: Path | str | None, overrides: Sequence[str] = ()) -> Schema:
    """Merge the schema's defaults, the YAML file and the overrides, in this order.

    Args:
        path: a YAML file with what differs from the defaults, or None. A bare name that is no file in the current
            folder is the name of a config that ships with the schema's package.
        overrides: "key.sub=value", the value parsed as YAML; later ones win.

    Raises:
        UserError: an unknown key (with the nearest known one), a value of the wrong type or out of range, a file that
            is missing or not YAML, an argument that is not key=value; names the file and line, or the argument.
    """
    if path is not None:
        path = find_config(path, schema.__module__.partition(".")[0])
    text = _read(path) if path is not None else ""
    values = _parse(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {values!r}")
    lines = _lines(text)
    arguments: dict[_Path, str] = {}
    for argument in overrides:
        key, equals, value = argument.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"argument {argument!r}: expected key=value or key.sub=value")
        _set(values, key.split("."), _parse(value, f"argument {argument!r}"), argument)
        arguments[tuple(key.split("."))] = argument
    try:
        return schema.model_validate(_fill(schema, values))
    except ValidationError as error:
        messages = [_message(schema, problem, str(path) if path is not None else None, lines, arguments)
                    for problem in error.errors()]
        raise UserError("\n".join(messages)) from error


def shipped_configs(package: str) -> list[Path]:
    """Return the YAML files that ship with a package ("odvae", "lvdm" or "app"), recipes last, sorted by name.

    An installed package has them in its folder `configs` and in that one's `recipes`, the repository in configs/PACKAGE
    and configs/recipes/PACKAGE.
    """
    root = Path(__file__).parents[2]
    folders = (f"{package}/configs", f"configs/{package}", f"{package}/configs/recipes", f"configs/recipes/{package}")
    return [path for folder in folders for path in sorted(root.glob(f"{folder}/*.yaml"))]


def find_config(path: Path | str, package: str) -> Path:
    """Return `path`, or the config of that name that ships with `package`, if `path` is a bare name and no file."""
    path = Path(path)
    if path.exists() or path.name != str(path):
        return path
    return next((shipped for shipped in shipped_configs(package) if shipped.name == path.name), path)


def override(config: Schema, values: dict[str, Any], where: str) -> Schema:
    """Return `config` with some values, also nested ones, replaced; UserError as `load_config`, naming `where`."""
    schema = type(config)
    try:
        return schema.model_validate(_merge(config.model_dump(), values))
    except ValidationError as error:
        raise UserError("\n".join(_message(schema, problem, where, {}, {}) for problem in error.errors())) from error


def differences(before: Config, now: Config, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the values, by dotted key, in which two configs of one schema differ, without those in `may_change`."""
    different: dict[str, tuple[Any, Any]] = {}
    for name in type(now).model_fields.keys() - type(now).may_change:
        different |= _differences(getattr(before, name), getattr(now, name), f"{prefix}{name}")
    return dict(sorted(different.items()))


def _differences(before: Any, now: Any, key: str) -> dict[str, tuple[Any, Any]]:
    if isinstance(now, Config) and type(before) is type(now):
        return differences(before, now, f"{key}.")
    if isinstance(now, tuple) and isinstance(before, tuple) and len(before) == len(now):
        return {name: pair for i, (one, other) in enumerate(zip(before, now, strict=True))
                for name, pair in _differences(one, other, f"{key}.{i}").items()}
    return {} if before == now else {key: (before, now)}


def save_config(config: BaseModel, path: Path | str) -> None:
    """Write every value, defaults included, as YAML, atomically; `load_config` reads it back to an equal config."""
    write_text(path, yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


# --- YAML 1.2. PyYAML follows version 1.1, where `no` is false, 1:30 is 90 and 1e-5 is a string. ---

_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$|0x[0-9a-fA-F]+$")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {name!r}", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quote strings that either version of YAML would read as another type."""


for _name, _pattern, _first in (
        ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), "tTfF"),
        ("null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
        ("int", _INT, "-+0123456789"),
        ("float", _FLOAT, "-+0123456789.")):
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, list(_first))


def _read(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}: {getattr(error, 'strerror', None) or error}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain values only
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where} is not valid YAML: {error}") from error


def _lines(text: str) -> dict[_Path, int]:
    """Return the line (from 1) of every key in the file."""
    lines: dict[_Path, int] = {}

    def walk(node: yaml.Node | None, prefix: _Path) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            lines[(*prefix, key.value)] = key.start_mark.line + 1
            walk(value, (*prefix, key.value))

    walk(yaml.compose(text, Loader=_Loader), ())
    return lines


# --- merging ---


def _set(values: dict[str, Any], keys: list[str], value: Any, argument: str) -> None:
    for i, key in enumerate(keys[:-1]):
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise UserError(f"argument {argument!r}: {'.'.join(keys[:i + 1])} is {values!r}, which has no keys")
    values[keys[-1]] = value


def _fill(schema: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """Complete partial sections from the field's default, which may differ from its class's defaults."""
    filled = dict(values)
    for name, field in schema.model_fields.items():
        section = values.get(name)
        if not isinstance(section, dict):
            continue
        default = None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})
        if isinstance(default, BaseModel) and type(default) is field.annotation:
            filled[name] = _merge(default.model_dump(), section)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            filled[name] = _fill(field.annotation, section)
    return filled


def _merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    return base | {k: _merge(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
                   for k, v in update.items()}


# --- error messages ---


def _message(schema: type[BaseModel], error: Any, path: str | None, lines: dict[_Path, int],
             arguments: dict[_Path, str]) -> str:
    location: _Path = error["loc"]
    where = _origin(location, path, lines, arguments)
    key = ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}; {_suggestion(schema, location)}"
    if error["type"] == "missing":
        return f"{where}: {key} is missing; give a value"
    message = format_problem(error)
    return f"{where}: {key} = {error['input']!r}: {message}" if location else f"{where}: {message}"


def _origin(location: _Path, path: str | None, lines: dict[_Path, int], arguments: dict[_Path, str]) -> str:
    """Return the argument that set `location`, else its file and line, else an argument that set a part of it."""
    for key, argument in reversed(arguments.items()):
        if location[:len(key)] == key:
            return f"argument {argument!r}"
    for n in range(len(location), 0, -1):
        if location[:n] in lines:
            return f"{path}, line {lines[location[:n]]}"
    for key, argument in reversed(arguments.items()):
        if location and key[:len(location)] == location:
            return f"argument {argument!r}"
    return path or "config"


def _suggestion(schema: type[BaseModel], location: _Path) -> str:
    """Return the nearest key of the same section, else one of any section with a similar name, else all of the
    section."""
    *parents, name = map(str, location)
    section: type[BaseModel] | None = schema
    for key in parents:
        field = section.model_fields.get(key) if section else None
        section = _section(field.annotation) if field else None
    siblings = [".".join([*parents, key]) for key in (section.model_fields if section else ())]
    near = difflib.get_close_matches(".".join([*parents, name]), siblings, 1, 0.6 if not parents else 0.8)
    near = near or [key for key in siblings if difflib.get_close_matches(name, [key.rpartition(".")[2]], 1, 0.6)]
    if not near:
        by_name: dict[str, str] = {}
        for key in _all_keys(schema):
            by_name.setdefault(key.rpartition(".")[2], key)
        near = [by_name[match] for match in difflib.get_close_matches(name, by_name, 1, 0.8)]
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(siblings) or 'none'}"


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the schema of a section, also of an optional one."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _all_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        section = _section(field.annotation)
        if section is not None:
            yield from _all_keys(section, f"{prefix}{name}.")
