"""Layouts: transposes and unsqueezes cost nothing, reshapes keep the token axis first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferloom.compiler.frontends.layout import Layouts, Traced, natural_axes
from inferloom.compiler.frontends.source import location
from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Builder
from inferloom.ir.interpret import interpret
from inferloom.ir.types import DType, Sym, TensorType

T = Sym("tokens", 64)


def start(*dims: int) -> tuple[Layouts, Traced]:
    """A traced [1, tokens, *dims] held by an input [tokens, *dims]."""
    builder = Builder("g")
    value = builder.input("x", TensorType(DType.F32, (T, *dims)))
    return Layouts(builder), Traced(value, (1, T, *dims), tuple(range(1, len(dims) + 2)))


def test_attention_reshapes_make_one_node_each() -> None:
    """linear -> view -> transpose -> transpose -> view, as every attention has it."""
    layouts, x = start(8)
    heads = layouts.view(x, (1, T, 2, 4))
    turned = heads.renumber((1, 2, T, 4), {0: 0, 1: 2, 2: 1, 3: 3})
    assert turned.axes == (2, 1, 3) and turned.token_axis == 2
    back = turned.renumber((1, T, 2, 4), {0: 0, 2: 1, 1: 2, 3: 3})
    flat = layouts.view(back, (1, T, 8))
    assert [n.op for n in layouts.builder.nodes] == ["reshape", "reshape"]
    assert flat.value.type == x.value.type


def test_views_that_only_move_ones_make_no_node() -> None:
    layouts, x = start(8)
    for shape in ((T, 8), (1, 1, T, 1, 8), (T, 1, 8, 1)):
        assert layouts.view(x, shape).value is x.value
    assert layouts.builder.nodes == []


@pytest.mark.parametrize("shape", [(T, 2, 3), (8, 8), (1, T)])
def test_views_that_mix_tokens_are_refused(shape: tuple) -> None:
    layouts, x = start(8)
    with pytest.raises(UnsupportedError, match="reshape"):
        layouts.view(x, shape)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_moves_do_what_numpy_does(data: st.DataObject) -> None:
    """Random permutes and views of trailing dims, and a broadcast sum, against NumPy on the traced shapes."""
    layouts, x = start(2, 3, 4)
    tokens = 5
    array = np.arange(tokens * 24, dtype=np.float32).reshape(1, tokens, 2, 3, 4)
    moved = array
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(moved.ndim)))
            x = x.renumber(tuple(x.shape[a] for a in order), {a: i for i, a in enumerate(order)})
            moved = moved.transpose(order)
        else:
            place = x.token_axis
            assert place is not None
            head, tail = moved.shape[:place], moved.shape[place + 1:]
            if data.draw(st.booleans()):
                tail = (int(np.prod(tail)),) if tail else (1,)
            else:
                head = (int(np.prod(head)),) if head else (1, 1)
            x = layouts.view(x, (*head, T, *tail))
            moved = moved.reshape(*head, tokens, *tail)
    (a, b), axes = layouts.broadcast([x, Traced(x.value, x.shape, x.axes)], x.shape)
    total = Traced(layouts.builder.emit("add", a, b), x.shape, axes)
    out = layouts.ordered(total)
    graph = layouts.builder.finish([out.value])
    (got,) = interpret(graph, {"x": array[0]}, {})
    place = out.token_axis
    assert place is not None
    want = np.moveaxis(moved, place, 0) * 2
    assert np.array_equal(got.reshape(-1), want.reshape(-1))


def test_natural_axes_put_tokens_first_and_drop_ones() -> None:
    assert natural_axes((1, 4, T, 1, 8)) == (2, 1, 4)


def test_location_is_the_innermost_line_of_the_model() -> None:
    trace = ('  File "/x/transformers/models/llama/modeling_llama.py", line 10, in forward\n    y\n'
             '  File "/x/transformers/models/llama/modeling_llama.py", line 99, in forward\n    z\n'
             '  File "/x/transformers/activations.py", line 5, in forward\n'
             '  File "/x/torch/nn/modules/linear.py", line 7, in forward\n')
    assert location(trace) == "modeling_llama.py:99"
    assert location('File "/me/mine.py", line 3, in forward\nFile "/x/torch/nn/f.py", line 7') == "mine.py:3"
    assert location("") == ""
