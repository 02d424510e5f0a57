"""Frozen dataclasses from and to parsed JSON, strictly: a record's schema is its class and nothing else.

A field is `int`, `str`, `bool`, `Any`, a `Literal` of strings, `X | None`, `tuple[X, ...]` (a JSON list), `dict[str, X]` or
another record. A field with a default may be left out, and is left out when it holds its default.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, Literal, TypeVar, Union

from inferloom.runtime.errors import ArtifactError

T = TypeVar("T")


def read(kind: type[T], value: object, path: str) -> T:
    """Parsed JSON as a record of class `kind`. ArtifactError names the key path below `path` of what is wrong."""
    result: T = _record(kind, value, path)
    return result


def write(record: Any) -> dict[str, Any]:
    """A record as plain dicts, lists and scalars, in new containers."""
    fields = ((f, getattr(record, f.name)) for f in dataclasses.fields(record))
    return {f.name: _plain(v) for f, v in fields if f.default is dataclasses.MISSING or v != f.default}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return write(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def _wrong(path: str, want: str, value: object) -> ArtifactError:
    shown = repr(value)
    return ArtifactError(f"{path} must be {want}, got {shown if len(shown) <= 60 else shown[:57] + '...'}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _record(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(path, "an object", value)
    hints, fields = _hints(kind), dataclasses.fields(kind)
    for key in value:
        if key not in hints:
            raise ArtifactError(f"{path}.{key} is not a known key; known: {', '.join(sorted(hints))}")
    for field in fields:
        if field.name not in value and field.default is dataclasses.MISSING:
            raise ArtifactError(f"{path}.{field.name} is missing")
    return kind(**{k: _read(hints[k], v, f"{path}.{k}") for k, v in value.items()})


def _read(kind: Any, value: Any, path: str) -> Any:
    if kind is Any:
        return value
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _read(args[0], value, path)
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            raise _wrong(path, "one of " + ", ".join(map(repr, args)), value)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(path, "a list", value)
        return tuple(_read(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(path, "an object", value)
        return {k: _read(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, path)
    if type(value) is not kind:  # exact, so that true is no integer
        raise _wrong(path, {int: "an integer", str: "a string", bool: "true or false"}[kind], value)
    return value
