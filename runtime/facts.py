"""What a step tells kernels of each token besides its position, for variants of attention that ask."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

#: A prompt whose tokens see each other is computed in one step.
PREFIX_LEN, DOCUMENT_START = "prefix_len", "document_start"


class Facts:
    """Facts of one sequence, whose tokens only grow: its prompt's length, and where the documents in it begin.

    A document ends with one of the tokens `ends`; the next token begins another.
    """

    def __init__(self, names: Sequence[str], prompt_len: int, ends: Collection[int]) -> None:
        self.names, self.prompt_len, self.ends = names, prompt_len, ends
        self._starts, self._seen = [0], 0

    def of(self, tokens: Sequence[int], begin: int, end: int) -> NDArray[np.int32]:
        """i32 [facts, end - begin] of `tokens[begin:end]`."""
        made = np.empty((len(self.names), end - begin), np.int32)
        for row, name in zip(made, self.names, strict=True):
            row[:] = self.prompt_len if name == PREFIX_LEN else self._documents(tokens, begin, end)
        return made

    def _documents(self, tokens: Sequence[int], begin: int, end: int) -> NDArray[np.int32]:
        self._starts += [i + 1 for i in range(self._seen, end) if tokens[i] in self.ends]
        self._seen = max(self._seen, end)
        starts = np.array(self._starts, np.int32)
        return starts[np.searchsorted(starts, np.arange(begin, end), side="right") - 1]
