"""Writing keys and values of a token into its block, in the form that kvlayout.py describes."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from inferloom.ir.types import LARGEST, DType, StateType
from inferloom.targets.tvm import vmath
from inferloom.targets.tvm.emit import bind, splat, store, wide
from inferloom.targets.tvm.kvlayout import KEYS, SCALE, KvLayout
from inferloom.targets.tvm.rowvalue import RowValue, loop, materialize, reduce

Expr = Any


def write_kv(pool: Expr, stride: int, type: StateType, slot: Expr, k: RowValue, v: RowValue | None, row: Expr, loc: str) -> None:
    """Store k [heads, k_dim] and v [heads, v_dim] of `row` at `slot` of a pool whose blocks are `stride` elements apart."""
    layout, size = KvLayout(type), type.dtype.itemsize
    layout.check(loc)
    at = bind(slot % type.block_tokens)
    block = bind(wide(slot // type.block_tokens) * stride + wide(at // KEYS) * (layout.tile // size))
    token, pair = bind(at % KEYS), layout.pair

    def narrow(x: Expr, lanes: int) -> Expr:
        return vmath.f32_to_bf16(x, lanes) if type.dtype is DType.BF16 else x

    def head(h: Expr) -> Expr:
        return block + wide(h) * (layout.tiles * layout.tile // size)

    def put_column(source: RowValue, width: int) -> None:
        loop((type.heads, width), 1, lambda index: store(
            pool, narrow(source.load(row, index, 1), 1),
            head(index[0]) + wide((index[1] // pair * KEYS + token) * pair + index[1] % pair), 1))

    def put_row(source: RowValue, width: int, start: int) -> None:
        lanes = source.max_lanes if pair == 1 else 1
        place = bind(start + token // pair * (width * pair) + token % pair)
        loop((type.heads, width), lanes, lambda index: store(
            pool, narrow(source.load(row, index, lanes), lanes), head(index[0]) + wide(place + index[1] * pair), lanes))

    def scaled(source: RowValue, start: int) -> RowValue:
        """The bits of `source` over its scales, if the type has them; they are stored from `start` of the tile on."""
        if not type.scales:
            return source
        source = materialize(source, row)
        scale = reduce(source, row, 1, 0.0, T.max, lambda s: s * T.float32(1 / LARGEST[type.dtype]),
                       lambda x, index, lanes: vmath.absolute(x, lanes))

        def put(index: list[Expr]) -> None:
            bits = bind(T.reinterpret("int32", scale.load(row, index, 1)))
            for byte in range(SCALE):  # a kernel has room for one view of the pool
                part = T.cast(T.shift_right(T.shift_left(bits, T.int32(24 - 8 * byte)), T.int32(24)), "int8")
                store(pool, part, head(index[0]) + wide(start + token * SCALE + byte), 1)

        loop((type.heads,), 1, put)

        def load(row: Expr, index: Any, lanes: int) -> Expr:
            s = bind(scale.load(row, list(index[:-1]), 1))
            by = bind(T.Select(s > T.float32(0.0), s, T.float32(1.0)))
            return vmath.to_8_bits(source.load(row, index, lanes) / splat(by, lanes), type.dtype, lanes)

        return RowValue(source.shape, source.max_lanes, load)

    keys = scaled(materialize(k, row), layout.key_scales)
    if v is None:  # keys that are values too lie as rows
        put_row(keys, type.k_dim, 0)
        return
    put_column(keys, type.k_dim)
    put_row(scaled(v, layout.value_scales), type.v_dim, layout.values // size)
