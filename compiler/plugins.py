"""Passes from outside of the project: a Python file, or a name that an installed package offers.

A pass file holds `VARIANT`, a `Variant` of attention that is applied after the built-in ones, or `run(graph, report)`,
a pass over the model-level graph that runs before variants are; or both. In place of `VARIANT`, `make(name=default, ...)`
returns one for the options that are given behind the name, as in `block-sparse:blocks=4,size=64`. An installed package
offers a module that holds the same under the entry point group `inferloom.passes`. Nothing runs unless it is asked for
by name.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from inferloom.compiler.attention.spec import Variant
from inferloom.compiler.report import Report
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph

GROUP = "inferloom.passes"


@dataclass(frozen=True, slots=True)
class Plugin:
    """A pass from outside: `digest` is SHA-256 of its source, which the artifact records."""

    name: str
    digest: str
    module: ModuleType
    variant: Variant | None
    run: Callable[[Graph, Report], Graph] | None


def load(names: Sequence[str]) -> tuple[Plugin, ...]:
    """The passes in order. UnsupportedError for one that cannot be found or holds no pass."""
    return tuple(_load(name) for name in names)


def split(text: str) -> tuple[str, str]:
    """Where a pass is, and the options that it is given: `block-sparse` and `blocks=4` of `block-sparse:blocks=4`."""
    head, _, tail = text.rpartition(":")
    return (head, tail) if "=" in tail else (text, "")


def source_of(name: str) -> Path:
    """The file that a pass is in. UnsupportedError when there is none."""
    if name.endswith(".py"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UnsupportedError(f"pass {name}: there is no such file")
        return path
    offered = {e.name: e.value for e in entry_points(group=GROUP)}
    if name not in offered:
        raise UnsupportedError(f"pass {name!r} is neither a .py file nor offered by an installed package under the entry "
                               f"point {GROUP} (offered: {', '.join(sorted(offered)) or 'none'})")
    spec = find_spec(offered[name])
    if spec is None or spec.origin is None:
        raise UnsupportedError(f"pass {name!r}: its module {offered[name]} cannot be found")
    return Path(spec.origin)


def _options(text: str) -> dict[str, int | float | str]:
    made: dict[str, int | float | str] = {}
    for part in text.split(",") if text else ():
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise UnsupportedError(f"options of a pass are name=value, separated by commas, not {part!r}")
        made[key] = next((number for kind in (int, float) if (number := _number(kind, value)) is not None), value)
    return made


def _number(kind: type[int] | type[float], text: str) -> int | float | None:
    try:
        return kind(text)
    except ValueError:
        return None


def _load(text: str) -> Plugin:
    name, given = split(text)
    options, path = _options(given), source_of(name)
    spec = spec_from_file_location(f"inferloom_pass_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UnsupportedError(f"pass {name}: {path} is not a Python file")
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UnsupportedError(f"pass {name}: {type(error).__name__}: {error}") from error
    variant, run, make = (getattr(module, each, None) for each in ("VARIANT", "run", "make"))
    if options and not callable(make):
        raise UnsupportedError(f"pass {name}: {path} has no make(), so it takes no options")
    if callable(make):
        try:
            variant = make(**options)
        except TypeError as error:
            raise UnsupportedError(f"pass {name}: {error}; it is called as make{inspect.signature(make)}") from None
    if variant is not None and not isinstance(variant, Variant):
        raise UnsupportedError(f"pass {name}: VARIANT must be an inferloom.compiler.attention.Variant, not {variant!r}")
    if variant is None and not callable(run):
        raise UnsupportedError(f"pass {name}: {path} holds neither VARIANT nor run(graph, report)")
    label = (path.stem if name.endswith(".py") else name) + (f":{given}" if given else "")
    return Plugin(label, hashlib.sha256(path.read_bytes()).hexdigest(), module, variant, run)
