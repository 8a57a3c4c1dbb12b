"""Frozen specs: what a user asks for, as data that forbids unknown keys.

A spec is read from YAML, changed with dotted `--set key=value` overrides and identified by a
fingerprint that leaves out what cannot change results.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from keepshot.errors import ConfigError, nearest


class Spec(BaseModel):
    """Base of every spec: frozen, unknown keys refused, one documentation string per field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    spec_version: ClassVar[int] = 1
    """Raised when the meaning of a field changes, so that old fingerprints no longer match."""

    no_effect_on_results: ClassVar[frozenset[str]] = frozenset()
    """Names of fields that the fingerprint leaves out."""

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change whenever the results could."""
        content = self.model_dump(mode="json", exclude=set(self.no_effect_on_results))
        text = json.dumps(
            [type(self).__name__, self.spec_version, content], sort_keys=True, ensure_ascii=False
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def from_mapping(cls, content: dict[str, Any], *, source: str) -> Self:
        """Validate `content`; `source` names its origin in error messages.

        Raises:
            ConfigError: naming the first offending key, its value and the nearest known key.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ConfigError(_explain(error, cls, source)) from None

    @classmethod
    def from_yaml(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file and apply `key=value` overrides with dotted keys.

        Raises:
            ConfigError: if the file cannot be read, is not YAML, or does not fit the spec.
        """
        return cls.from_mapping(apply_overrides(read_yaml(path), overrides), source=str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping, with errors that name file and line."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}"
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found a {type(content).__name__}")
    return content


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads `1e-4` as a number, as YAML 1.2 does and 1.1 does not."""


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Read YAML text safely.

    Raises:
        yaml.YAMLError: if it is none.
    """
    return yaml.load(text, Loader=_Loader)


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `content` with dotted `key=value` overrides applied; values are read as YAML.

    Raises:
        ConfigError: if an override has no `=`, or its key leads through a value.
    """
    result = json.loads(json.dumps(content, default=str))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override!r}: expected key=value, such as --set seed=1")
        *parents, last = key.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {override!r}: {parent!r} is a value and has no keys")
        try:
            place[last] = parse_yaml(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {override!r}: {text!r} is not a YAML value") from None
    return result


def is_none(value: Any) -> bool:
    """Say what a newer key leaves out of a spec's content, so that older specs stay the same."""
    return value is None


def changes(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    left_out: Collection[str] = (),
    most: int = 4,
) -> list[str]:
    """Word what differs between two dumped specs: dotted keys, with both values.

    Args:
        before: what was stored.
        now: what is asked.
        left_out: keys whose values do not count.
        most: differences that are worded; a last entry counts the others.
    """
    old, new = _flat(before), _flat(now)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key) and key not in left_out]
    told = [
        f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}" for key in keys[:most]
    ]  # fmt: skip
    return told + ([f"{len(keys) - most} more"] if len(keys) > most else [])


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Return single values by dotted key; the items of a list count from 0."""
    if isinstance(content, (list, tuple)):
        content = {str(number): item for number, item in enumerate(content)}
    if not isinstance(content, Mapping):
        return {prefix: content}
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _short(value: Any) -> str:
    if value is None:
        return "not given"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _explain(error: ValidationError, spec: type[BaseModel], source: str) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the file"
    if first["type"] == "extra_forbidden":
        known = _known_keys(spec, first["loc"][:-1])
        close = nearest(str(first["loc"][-1]), known)
        hint = f"; nearest is {close!r}" if close else f"; known keys: {', '.join(sorted(known))}"
        return f"{source}: key `{place}` is unknown{hint}"
    if first["type"] == "missing":
        return f"{source}: key `{place}` is missing"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], (dict, BaseModel)):
        return f"{source}: {f'`{place}`: ' if first['loc'] else ''}{message}"
    return f"{source}: `{place}` = {first['input']!r}: {message}"


def _known_keys(spec: type[BaseModel], path: Sequence[int | str]) -> set[str]:
    """Collect the field names allowed at `path`, looking through containers and unions."""
    candidates: list[type[BaseModel]] = [spec]
    for part in path:
        fields = [m.model_fields[part] for m in candidates if part in m.model_fields]  # type: ignore[index]
        if fields:
            candidates = [m for field in fields for m in _models_in(field.annotation)]
        else:  # an index into a list, a key of a mapping, or the tag of a union member
            tagged = [m for m in candidates if part in _tags(m)]
            candidates = tagged or candidates
    return {name for model in candidates for name in model.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _tags(model: type[BaseModel]) -> set[Any]:
    return {
        value
        for field in model.model_fields.values()
        for value in get_args(field.annotation)
        if isinstance(value, str)
    }
