"""What sampling needs of the logits, found on the device: each row's largest, and the sum of its exponentials.

A row of logits is half a megabyte; its `TOP` largest are enough to draw from with top-k, top-p or min-p nearly always,
and then nothing else is copied to the host. The first kernel finds the largest of each block of columns, the second
those of the row. A logit and its token's id are one 64-bit key that sorts as the logit does, lower ids first.
"""

from __future__ import annotations

from collections.abc import Mapping

from inferloom.targets.base import OUTPUT, Logits, Scratch
from inferloom.targets.triton.source import KernelText, next_power_of_2

TOP = 64
#: A step's kernels after its last source.
AFTER = -1


def kernels(logits: Logits) -> tuple[list[KernelText], int, int]:
    """The two kernels, bytes of scratch memory, and where in it the results are: see `Top` in the manifest."""
    columns = max(TOP, min(next_power_of_2(logits.vocab), 2048 if logits.vocab <= 2048 * 128 else 4096))
    blocks = -(-logits.vocab // columns)
    rows = logits.rows
    sizes = {"top_keys": rows * TOP * 8, "top_stats": rows * 8, "keys": rows * blocks * TOP * 8, "stats": rows * blocks * 8}
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // 256) * 256
    first = f"""\
    pid = tl.program_id(0)
    row = pid // {blocks}
    if row < tl.load(dims + 2):
        ids = pid % {blocks} * {columns} + tl.arange(0, {columns})
        # Adding zero makes one of the two zeros.
        x = tl.load(logits + row * {logits.ld} + ids, mask=ids < {logits.vocab}, other=float("-inf")) + 0.0
        bits = x.to(tl.int32, bitcast=True)
        order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - ids)
        tl.store(keys + pid * {TOP} + tl.arange(0, {TOP}), tl.topk(key, {TOP}))
        scaled = x * tl.load(sharpness + row)
        top = tl.max(scaled, 0)
        tl.store(stats + pid * 2, top)
        tl.store(stats + pid * 2 + 1, tl.sum(tl.exp(scaled - top), 0))"""
    width, parts = next_power_of_2(blocks * TOP), next_power_of_2(blocks)
    second = f"""\
    row = tl.program_id(0)
    if row < tl.load(dims + 2):
        i = tl.arange(0, {width})
        key = tl.load(keys + row * {blocks * TOP} + i, mask=i < {blocks * TOP}, other=-0x7FFFFFFFFFFFFFFF)
        tl.store(top_keys + row * {TOP} + tl.arange(0, {TOP}), tl.topk(key, {TOP}))
        j = tl.arange(0, {parts})
        tops = tl.load(stats + (row * {blocks} + j) * 2, mask=j < {blocks}, other=float("-inf"))
        sums = tl.load(stats + (row * {blocks} + j) * 2 + 1, mask=j < {blocks}, other=0.0)
        top = tl.max(tops, 0)
        tl.store(top_stats + row * 2, top)
        tl.store(top_stats + row * 2 + 1, tl.sum(sums * tl.exp(tops - top), 0))"""
    names = {"keys": "*i64", "stats": "*fp32", "top_keys": "*i64", "top_stats": "*fp32"}

    def text(symbol: str, body: str, inputs: Mapping[str, tuple[str, object]], outputs: tuple[str, ...], mult: int,
             warps: int) -> KernelText:
        parameters = [(n, t) for n, (t, _) in inputs.items()] + [(n, names[n]) for n in outputs]
        args = [a for _, a in inputs.values()] + [Scratch(offsets[n]) for n in outputs]
        return KernelText(symbol, "sampling", AFTER, tuple(body.split("\n")), tuple(parameters), tuple(args), (2, 1, mult),
                          {"num_warps": warps, "num_stages": 1})

    dims = {"dims": ("*i32", "dims")}
    made = [text("sample_blocks", first, {"logits": ("*fp32", OUTPUT), "sharpness": ("*fp32", "sharpness"), **dims},
                 ("keys", "stats"), blocks, 8),
            text("sample_rows", second, dims, ("keys", "stats", "top_keys", "top_stats"), 1, 8)]
    return made, end, offsets["top_stats"]
