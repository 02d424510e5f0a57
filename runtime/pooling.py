"""Pooling: hidden states of a sequence's tokens become one vector.

Rows are added one after the other in float64, so that the mean's bits depend on nothing but the rows: not on how the
sequence was cut into steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from inferloom.runtime.errors import RequestError
from inferloom.runtime.manifest import POOLINGS

_WRONG = {"embed": "the artifact was compiled to generate, and gives no hidden states: compile the model with --task embed",
          "generate": "the artifact was compiled to embed, and gives no logits: compile the model without --task embed"}


def check_task(have: str, wanted: str) -> None:
    """RequestError unless an artifact of the task that one has does what is wanted."""
    if have != wanted:
        raise RequestError(_WRONG[wanted])


class Pool:
    """The hidden states of one sequence, as they come: in order, each once."""

    def __init__(self, pooling: str) -> None:
        if pooling not in POOLINGS:
            raise RequestError(f"pooling {pooling!r} is not known; choose from: {', '.join(POOLINGS)}")
        self.mean, self.count = pooling == "mean", 0
        self._sum: NDArray[np.float64] | None = None

    def add(self, rows: NDArray[np.float32]) -> None:
        """Rows f32 [n, hidden] of the next `n` tokens; all of them for a mean, else of the last one."""
        for row in rows:
            if self._sum is None or not self.mean:
                self._sum = row.astype(np.float64)
            else:
                self._sum += row
        self.count += len(rows)

    def vector(self) -> NDArray[np.float32]:
        """f32 [hidden]. RequestError when the model gave what is no number."""
        if self._sum is None or not np.isfinite(self._sum).all():
            raise RequestError("the model's hidden states are not finite")
        return (self._sum / (self.count if self.mean else 1)).astype(np.float32)


def shortened(vector: NDArray[np.float32], dimensions: int | None = None, normalize: bool = True) -> NDArray[np.float32]:
    """The first `dimensions` numbers of a vector f32 [hidden] (all if None), of length 1 if `normalize`; zeros stay zeros.

    Only models that were trained for it (Matryoshka representation learning, https://arxiv.org/abs/2205.13147) give shorter
    vectors that are of use. RequestError for more numbers than there are.
    """
    if dimensions is not None and not 1 <= dimensions <= len(vector):
        raise RequestError(f"dimensions must be 1 to {len(vector)}, got {dimensions}")
    wide = vector[:dimensions].astype(np.float64)
    length = float(np.sqrt((wide * wide).sum())) if normalize else 1.0
    return (wide / (length or 1.0)).astype(np.float32)
