"""Which weights of a checkpoint that is quantised already keep their integers in an artifact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import replace

from inferloom.compiler.quantization.rows import StoredWeights
from inferloom.compiler.quantization.scheme import Activations, Scheme


def keep(stored: StoredWeights | None, kernels: Set[tuple[str, str]],
         activations: Activations | None = None) -> tuple[dict[str, Scheme], tuple[str, ...]]:
    """The scheme of each source that stays quantised, and what to tell the user of all of them.

    `kernels`: the formats of weights, each with one of activations, that the target multiplies. Integers are multiplied by
    `activations`, int8 if not given, whatever the checkpoint says of them, unless only the other kind has kernels: the
    integers matter more than the activations. Weights that there are no kernels for at all are unpacked.
    """
    found: dict[str, Scheme] = {}
    counts: Counter[str] = Counter()
    for source, scheme in stored.schemes.items() if stored is not None else ():
        wanted: tuple[Activations, ...] = ("none", "int8") if activations == "none" else ("int8", "none")
        choices = [scheme] if scheme.format == "fp8" else [replace(scheme, activations=a) for a in wanted]
        chosen = next((s for s in choices if (s.format, s.activations) in kernels), None)
        if chosen is None:
            what = f"unpacked (there are no kernels for {scheme})"
        else:
            found[source] = chosen
            what = f"{'rounded anew to' if source in stored.rounded else 'kept as'} {chosen}"  # type: ignore[union-attr]
            if chosen != scheme:
                what += f" with activations {'in int8' if chosen.activations == 'int8' else 'as floats'}"
                if (scheme.format, scheme.activations) in kernels:
                    what += f" (--quant-activations {scheme.activations} leaves them as the checkpoint does)"
        counts[f"{stored.names.get(source, scheme.name)} weights {what}"] += 1  # type: ignore[union-attr]
    return found, tuple(f"{line}: {count}" for line, count in sorted(counts.items()))
