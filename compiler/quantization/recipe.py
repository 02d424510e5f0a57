"""Which scheme each weight of a model gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from inferloom.compiler.quantization.scheme import Activations, Scheme, parse

#: What options call a layer that stays as it is.
NONE = "none"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Schemes of linear layers, of the LM head and of the token embedding; None leaves a layer as it is.

    `stored` are the schemes of weights that the checkpoint holds quantised, by the source of a graph's param: these keep
    their integers, whatever the others say, unless `unpack`. `activations`: what these are multiplied by, if it is chosen.
    """

    linear: Scheme | None = None
    head: Scheme | None = None
    embedding: Scheme | None = None
    stored: Mapping[str, Scheme] = field(default_factory=dict)
    unpack: bool = False
    activations: Activations | None = None

    @property
    def active(self) -> bool:
        return bool(self.linear or self.head or self.embedding or self.stored)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme that a layer may get."""
        return tuple(dict.fromkeys(s for s in (self.linear, self.head, self.embedding, *self.stored.values()) if s))


def recipe(quant: str | None, head: str | None = None, embedding: str | None = None, activations: str | None = None,
           stored: Mapping[str, Scheme] | None = None) -> Recipe:
    """The recipe of the options `--quant`, `--quant-head`, `--quant-embedding`: names of schemes, "none", or None.

    Head and embedding without an option of their own are quantised as the other layers are, but to 8 bits where these
    get 4: a vocabulary's rows stand for themselves, and nothing evens out what is wrong with one. `quant` "none" unpacks
    what the checkpoint stores quantised, too. `activations` ("int8" or "none") stands above what the names say of them.
    UnsupportedError on a name that is not known.
    """
    chosen = None if activations is None else Scheme(activations=activations).activations  # type: ignore[arg-type]
    linear, head_scheme, table = (_scheme(name, chosen) for name in (quant, head, embedding))
    usual = linear
    if linear is not None and linear.format == "int4":
        usual = Scheme("int8", activations=linear.activations)
    return Recipe(linear, usual if head is None else head_scheme, usual if embedding is None else table,
                  dict(stored or {}), quant == NONE, chosen)


def _scheme(name: str | None, activations: Activations | None) -> Scheme | None:
    if name is None or name == NONE:
        return None
    found = parse(name)
    return found if activations is None else replace(found, activations=activations)
