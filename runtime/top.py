"""Rows of logits that stay on the device: of each, only the largest are here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from math import inf

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TopRow:
    """The largest logits of one row: `values` f32 and `ids`, largest first, lower ids first where equal.

    `log_sum` is log(sum(exp((logit - the largest) / temperature))) over the whole row; it is `finite` unless the model
    gave a NaN or an infinity. `row()` is the row itself; it is there until the next step. `sums` f32: of each run of
    `columns` logits, the sum of such exponentials; None if the device does not find them.
    """

    values: NDArray[np.float32]
    ids: NDArray[np.int64]
    log_sum: float
    finite: bool
    row: Callable[[], NDArray[np.float32]]
    sums: NDArray[np.float32] | None = None
    columns: int = 0


class TopRows:
    """`TopRow` for each row of a step. As an array it is the logits themselves, fetched from the device.

    keys i64 [rows, count] and stats f32 [rows, 2] are those of the manifest's `Top`, sums f32 [rows, runs] of `columns`
    each are its `Sums`; `fetch(begin, end)` gives rows begin to end.
    """

    def __init__(self, keys: NDArray[np.int64], stats: NDArray[np.float32],
                 fetch: Callable[[int, int], NDArray[np.float32]], sums: NDArray[np.float32] | None = None,
                 columns: int = 0) -> None:
        self._keys, self._stats, self._fetch, self._runs, self._columns = keys, stats, fetch, sums, columns

    def __len__(self) -> int:
        return len(self._keys)

    def best(self) -> tuple[list[int], list[bool]]:
        """The most likely token of each row; and whether the row is `finite`."""
        finite = [-inf < largest < inf and 0 < total < inf for largest, total in self._stats.tolist()]
        return [0x7FFFFFFF - (key & 0xFFFFFFFF) for key in self._keys[:, 0].tolist()], finite

    @cached_property
    def _rows(self) -> list[TopRow]:
        bits = (self._keys >> 32).astype(np.int32)
        values = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int32).view(np.float32)
        ids = 0x7FFFFFFF - (self._keys & 0xFFFFFFFF)
        # A vocabulary smaller than the list leaves places at its end, which hold no number above minus infinity.
        counts = (values > -np.inf).sum(axis=1).tolist()
        with np.errstate(invalid="ignore", divide="ignore"):
            sums = np.log(self._stats[:, 1].astype(np.float64))
        finite = (np.isfinite(self._stats).all(axis=1) & np.isfinite(sums)).tolist()
        return [TopRow(values[i, :n], ids[i, :n], total, good, partial(_row, self._fetch, i),
                       None if self._runs is None else self._runs[i], self._columns)
                for i, (n, total, good) in enumerate(zip(counts, sums.tolist(), finite))]

    def __getitem__(self, i: int) -> TopRow:
        return self._rows[i]

    def __iter__(self) -> Iterator[TopRow]:
        return iter(self._rows)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> NDArray[np.float32]:
        return np.array(self._fetch(0, len(self)), dtype, copy=copy)  # type: ignore[call-overload, no-any-return]


def _row(fetch: Callable[[int, int], NDArray[np.float32]], i: int) -> NDArray[np.float32]:
    """Not a method: rows that hold what holds them would keep the device's library until memory is swept."""
    row: NDArray[np.float32] = fetch(i, i + 1)[0]
    return row
