"""Which weights of a checkpoint that is quantised already keep their integers in an artifact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import replace

from inferloom.compiler.quantization.rows import StoredWeights
from inferloom.compiler.quantization.scheme import Scheme


def keep(stored: StoredWeights | None, kernels: Set[tuple[str, str]]) -> tuple[dict[str, Scheme], tuple[str, ...]]:
    """The scheme of each source that stays quantised, and what to tell the user of all of them.

    `kernels`: the formats of weights, each with one of activations, that the target multiplies. Where it has none for a
    weight alone, but one for the weight by int8 activations, that is taken: the integers matter more than the activations.
    Weights that it has no kernels for at all are unpacked.
    """
    found: dict[str, Scheme] = {}
    counts: Counter[str] = Counter()
    for source, scheme in stored.schemes.items() if stored is not None else ():
        chosen = next((s for s in (scheme, replace(scheme, activations="int8") if scheme.format != "fp8" else scheme)
                       if (s.format, s.activations) in kernels), None)
        if chosen is None:
            what = f"unpacked (there are no kernels for {scheme})"
        else:
            found[source] = chosen
            what = f"{'rounded anew to' if source in stored.rounded else 'kept as'} {chosen}"  # type: ignore[union-attr]
            if chosen != scheme:
                what += " with activations in int8 (there are no kernels for these weights alone)"
        counts[f"{stored.names.get(source, scheme.name)} weights {what}"] += 1  # type: ignore[union-attr]
    return found, tuple(f"{line}: {count}" for line, count in sorted(counts.items()))
