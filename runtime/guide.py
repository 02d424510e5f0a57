"""What holds a sequence to a grammar."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Guide(Protocol):
    """The state of one sequence in its grammar. What fails here raises RequestError and ends that request alone."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        ...

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool [vocab]; a token that ends the sequence where the grammar may end."""
        ...

    def accept(self, token: int) -> None:
        """The token that came."""
        ...
