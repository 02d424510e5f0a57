"""Token ids of outputs: views that behave as tuples."""

from __future__ import annotations

import pytest

from inferloom.runtime.outputs import TokenIds


def test_token_ids_are_a_tuple_that_takes_no_copy() -> None:
    tokens = [9, 1, 2, 3]
    ids = TokenIds(tokens, 1, 4)
    tokens.append(5)
    assert ids == (1, 2, 3) == ids and hash(ids) == hash((1, 2, 3)) and repr(ids) == "(1, 2, 3)"
    assert len(ids) == 3 and ids[0] == 1 and ids[-1] == 3 and ids[1:] == (2, 3) and ids[:-1] == (1, 2) and [*ids] == [1, 2, 3]
    assert ids != (1, 2) and ids != [1, 2, 3] and 5 not in ids and 9 not in ids
    for outside in (3, -4):
        with pytest.raises(IndexError):
            ids[outside]
