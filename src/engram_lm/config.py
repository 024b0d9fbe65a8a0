"""Strict dataclass <-> JSON. A configuration lives beside what it configures; unknown keys are errors."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from .errors import ConfigError

T = TypeVar("T")


def to_dict(config: Any) -> Any:
    """A dataclass as plain JSON values; tuples become lists."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return config


def from_dict(cls: type[T], data: Any, where: str = "config") -> T:
    """The dataclass `cls` from JSON values, every nested field checked.

    Raises ConfigError for an unknown key (naming the nearest known one), a missing key or a value of another type;
    `where` prefixes the path in the message.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected an object with the fields of {cls.__name__}, got {data!r}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known keys: {', '.join(fields)}."
            raise ConfigError(f"{where}: unknown key {key!r}; it would have been ignored silently.{hint}")
    hints = typing.get_type_hints(cls)
    values = {key: _value(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    try:
        return cls(**values)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`: dataclass, Literal, union, tuple, list or a scalar."""
    origin = get_origin(hint)
    if origin is Union or origin is types.UnionType:
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        for option in (o for o in options if o is not type(None)):
            try:
                return _value(option, value, where)
            except ConfigError as error:
                problem = error
        raise problem
    if origin is Literal:
        if value not in get_args(hint):
            choices = ", ".join(map(repr, get_args(hint)))
            raise ConfigError(f"{where}: {value!r} is not one of {choices}.")
        return value
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {value!r}.")
        item = get_args(hint)[0]
        return origin(_value(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}.")
    return value


def to_json(config: Any) -> str:
    """Canonical JSON text: two equal configurations give the same characters."""
    return json.dumps(to_dict(config), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def digest(config: Any) -> str:
    """Sixteen hex digits that identify a configuration."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]


def load(cls: type[T], path: str | Path) -> T:
    """Read a configuration file. Raises ConfigError with the path for anything that is not one."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise ConfigError(f"{path}: not a JSON file ({error}).") from None
    return from_dict(cls, data, where=str(path))
