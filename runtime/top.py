"""Rows of logits that stay on the device: of each, only the largest are here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray


class TopRow:
    """The largest logits of one row: `values` f32 and `ids`, largest first, lower ids first where equal.

    `log_total` is log(sum(exp(logit / temperature))) over the whole row; it is `finite` unless the model gave a NaN or
    an infinity. `row()` copies the row from the device;
    it is there until the next step.
    """

    def __init__(self, keys: NDArray[np.int64], stats: NDArray[np.float32], row: Callable[[], NDArray[np.float32]]) -> None:
        bits = (keys >> 32).astype(np.int32)
        self.values = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int32).view(np.float32)
        self.ids = (0x7FFFFFFF - (keys & 0xFFFFFFFF)).astype(np.int64)
        seen = self.ids >= 0  # a vocabulary smaller than the list leaves places at its end
        seen &= self.values > -np.inf
        self.values, self.ids = self.values[seen], self.ids[seen]
        with np.errstate(invalid="ignore", divide="ignore"):
            self.log_total = float(np.float64(stats[0]) + np.log(np.float64(stats[1])))
        self.finite = bool(np.isfinite(self.log_total))
        self.row = row


class TopRows:
    """`TopRow` for each row of a step. As an array it is the logits themselves, copied from the device.

    `fetch(begin, end)` copies rows begin to end.
    """

    def __init__(self, keys: NDArray[np.int64], stats: NDArray[np.float32],
                 fetch: Callable[[int, int], NDArray[np.float32]]) -> None:
        self._keys, self._stats, self._fetch = keys, stats, fetch

    def __len__(self) -> int:
        return len(self._keys)

    def best(self) -> tuple[list[int], list[bool]]:
        """The most likely token of each row; and whether the row is `finite`."""
        with np.errstate(invalid="ignore", divide="ignore"):
            finite = np.isfinite(self._stats[:, 0] + np.log(self._stats[:, 1]))
        return (0x7FFFFFFF - (self._keys[:, 0] & 0xFFFFFFFF)).tolist(), finite.tolist()

    def __getitem__(self, i: int) -> TopRow:
        return TopRow(self._keys[i], self._stats[i], lambda: self._fetch(i, i + 1)[0])

    def __iter__(self) -> Iterator[TopRow]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: object = None, copy: bool | None = None) -> NDArray[np.float32]:
        return np.asarray(self._fetch(0, len(self)), dtype)  # type: ignore[call-overload, no-any-return]
