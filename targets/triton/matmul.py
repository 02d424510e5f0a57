"""Matmul kernels: x [rows, k] by weights [n, k], with the pointwise ops that follow.

Several kernels share the rows of a step among them by their number: few rows stream the weights through narrow
tiles (split over k where that alone would not fill the chip; a second kernel then adds the parts in order), many
rows use tiles for the matrix unit. Where the chip has a tensor memory accelerator, as many blocks as it has units
take one tile after the other, so that the next tile's loads hide the end of the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from inferloom.ir.errors import UnsupportedError
from inferloom.ir.graph import Graph, Value
from inferloom.ir.types import DType, TensorType
from inferloom.targets.base import KernelSource, Scratch
from inferloom.targets.chips import GpuChip
from inferloom.targets.triton.aot import DESCRIPTORS
from inferloom.targets.triton.configs import MatmulConfig
from inferloom.targets.triton.source import Index, KernelText, Writer
from inferloom.targets.triton.values import TL_TYPES, Values, dims_of, parameter_type, row_dim, wide_parameters


class Matmul:
    """The kernels of one "matmul" source."""

    def __init__(self, source: KernelSource, number: int, chip: GpuChip) -> None:
        body = source.node.attrs["body"]
        if not isinstance(body, Graph):
            raise TypeError(body)
        self.body, self.source, self.number, self.chip = body, source, number, chip
        (self.node,) = (n for n in body.nodes if n.op == "packed_linear")
        x, packed, *bias = self.node.operands
        if x is None or packed is None or not isinstance(packed.type, TensorType):
            raise TypeError(self.node)
        self.bias = bias[0] if bias else None
        self.n, self.k = int(str(self.node.attrs["n"])), int(str(self.node.attrs["k"]))
        # None: the body makes x of its inputs.
        self.x, self.packed = body.inputs.index(x) if x in body.inputs else None, body.inputs.index(packed)
        self.x_value = x
        self.dtype = packed.type.dtype
        _, steps, tile, pair = dims_of(packed)
        if (tile, pair) != (1, 1):
            raise UnsupportedError(f"{self.node.loc}: the GPU target wants rows of weights, not tiles of {tile}x{pair}")
        self.ldw, self.ldx = steps, source.layouts[self.x].ld if self.x is not None else 0
        self.dim = row_dim(body.outputs)
        self.max_rows = getattr(body.outputs[0].type.shape[0], "bound", 1)  # type: ignore[union-attr]

    def lower(self, config: MatmulConfig, least: int, most: int, suffix: str) -> list[KernelText]:
        """The kernel of one configuration, or two: partial sums in scratch memory, and what adds them up."""
        tiles = -(-self.n // config.n) * config.splits
        grid = (self.dim, config.m, tiles)
        options = {"num_warps": config.warps, "num_stages": config.stages, **dict(config.extra)}
        notes = {"rows": f"{least} to {most}", "tile": f"{config.m} x {config.n} x {config.k}", "splits": config.splits}
        if config.persistent:
            if self.x is None:
                raise UnsupportedError(f"{self.node.loc}: a persistent matmul of rows that it gathers")
            w, parameters, args = self._persistent(config)
            # Whatever the number of rows, as many blocks; each builds its descriptors in the scratch memory.
            return [self._text(suffix, w, parameters, (*args, Scratch(0)), (self.dim, 2**30, config.persistent), options,
                               least, most, notes, True)]
        if config.splits == 1:
            w, parameters, args = self._main(config, False)
            return [self._text(suffix, w, parameters, args, grid, options, least, most, notes, True)]
        w, parameters, args = self._main(config, True)
        main = self._text(suffix, w, parameters, (*args, Scratch(0)), grid, options, least, most, notes, True)
        w, parameters, args = self._reduce(config)
        blocks = -(-self.n // config.reduce_n)
        reduce = self._text(suffix + "_sum", w, parameters, (*args, Scratch(0)), (self.dim, 1, blocks),
                            {"num_warps": 4, "num_stages": 1}, least, most, notes, False)
        return [main, reduce]

    def scratch_bytes(self, config: MatmulConfig, most: int) -> int:
        """Bytes of partial sums, or of descriptors."""
        if config.persistent:
            return config.persistent * DESCRIPTORS
        return config.splits * min(most, self.max_rows) * self.n * 4 if config.splits > 1 else 0

    def _text(self, suffix: str, w: Writer, parameters: Sequence[tuple[str, str]], args: Sequence[object],
              grid: tuple[int, int, int], options: dict[str, int], least: int, most: int, notes: dict[str, object],
              matrix: bool) -> KernelText:
        return KernelText(f"{self.source.symbol}{suffix}", "matmul", self.number, tuple(w.lines), tuple(parameters),
                          tuple(args), grid, options, least, most,
                          wide_parameters([*self.body.inputs, *self.body.outputs], self.source.layouts), notes, matrix)

    # -- the product

    def _main(self, c: MatmulConfig, partial: bool) -> tuple[Writer, list[tuple[str, str]], list[object]]:
        w = Writer()
        columns = -(-self.n // c.n)
        w.line("pid = tl.program_id(0)")
        w.line(f"count = tl.load(dims + {self.dim})")
        if c.splits > 1:
            w.line(f"split = pid % {c.splits}")
            w.line(f"pid = pid // {c.splits}")
        if c.group > 1:
            w.line(f"blocks = tl.cdiv(count, {c.m})")
            self._grouped(w, c, "pid", columns)
        else:
            w.line(f"first = pid // {columns} * {c.m}")
            w.line(f"column = pid % {columns} * {c.n}")
        with w.block("if first < count:"):
            w.line(f"rows = first + tl.arange(0, {c.m})")
            w.line(f"cols = column + tl.arange(0, {c.n})")
            w.line(f"ks = tl.arange(0, {c.k})")
            # Rows and columns that stick out repeat others; their sums are never stored.
            w.line("xs = tl.minimum(rows, count - 1)")
            ws = "cols" if self.n % c.n == 0 else f"tl.minimum(cols, {self.n - 1})"
            wide = ".to(tl.int64)" if self.n * self.ldw >= 2**31 else ""
            if self.x is not None:
                w.line(f"x = p{self.x} + xs[:, None] * {self.ldx} + ks[None, :]")
            else:
                self._rows_first(w)
            w.line(f"y = p{self.packed} + {ws}[None, :]{wide} * {self.ldw} + ks[:, None]")
            w.line(f"acc = tl.zeros([{c.m}, {c.n}], tl.float32)")
            steps = -(-self.k // c.k)
            if c.splits > 1:
                share = -(-steps // c.splits)
                span = f"split * {share * c.k}, tl.minimum(split * {share * c.k} + {share * c.k}, {steps * c.k}), {c.k}"
            else:
                span = f"0, {steps * c.k}, {c.k}"
            with w.block(f"for k in range({span}):"):
                masks = ["", ""]
                if self.k % c.k:
                    w.line(f"here = k + ks < {self.k}")
                    masks = [", mask=here[None, :], other=0", ", mask=here[:, None], other=0"]
                precision = f', input_precision="{c.precision}"' if self.dtype is DType.F32 else ""
                left = f"tl.load(x + k{masks[0]})" if self.x is not None else self._gathered(w, "k + ks[None, :]")
                w.line(f"acc = tl.dot({left}, tl.load(y + k{masks[1]}), acc{precision})")
            row = w.variable("rows[:, None]", self.max_rows, "(rows < count)[:, None]", True)
            parameters, args = self._parameters()
            if partial:
                inside = "(rows < count)[:, None]" + (f" & (cols < {self.n})[None, :]" if self.n % c.n else "")
                most = min(self.max_rows, c.most_rows)
                w.line(f"tl.store(part + ((split * {most} + rows[:, None]) * {self.n} + cols[None, :]), acc, mask={inside})")
                used = [i for i in range(len(parameters)) if any(f"p{i} " in line for line in w.lines)]
                return w, [*(parameters[i] for i in used), ("dims", "*i32"), ("part", "*fp32")], [
                    *(args[i] for i in used), "dims"]
            self._epilogue(w, c, row)
        return w, [*parameters, ("dims", "*i32")], [*args, "dims"]

    def _rows_first(self, w: Writer) -> None:
        """Name the rows to gather before the loop over k."""
        row = w.variable("xs[:, None]", self.max_rows, "", True)
        for node in self.body.nodes:
            if node.op == "gather_rows":
                Values(self.body, self.source.layouts, w).at(node.operands[1], [row])

    def _gathered(self, w: Writer, column: str) -> str:
        """A tile of x that the body computes."""
        values = Values(self.body, self.source.layouts, w)
        row = Index.of("xs[:, None]")
        at = w.variable(f"({column})", self.k, "here[None, :]" if "here = " in w.lines[-1] else "", True)
        narrow = f".to({TL_TYPES[self.dtype]})" if self.dtype is not DType.F32 else ""
        return f"{values.at(self.x_value, [row, at])}{narrow}"

    def _grouped(self, w: Writer, c: MatmulConfig, tile: str, columns: int) -> None:
        """A tile's place: tiles that share weights and rows run at about the same time."""
        w.line(f"group = {tile} // {c.group * columns} * {c.group}")
        w.line(f"tall = tl.maximum(tl.minimum(blocks - group, {c.group}), 1)")
        w.line(f"first = (group + {tile} % {c.group * columns} % tall) * {c.m}")
        w.line(f"column = {tile} % {c.group * columns} // tall * {c.n}")

    def _persistent(self, c: MatmulConfig) -> tuple[Writer, list[tuple[str, str]], list[object]]:
        w = Writer()
        columns = -(-self.n // c.n)
        w.line("pid = tl.program_id(0)")
        w.line(f"count = tl.load(dims + {self.dim})")
        w.line(f"blocks = tl.cdiv(count, {c.m})")
        w.line(f"x = tl.make_tensor_descriptor(p{self.x}, [count, {self.k}], [{self.ldx}, 1], [{c.m}, {c.k}])")
        w.line(f"y = tl.make_tensor_descriptor(p{self.packed}, [{self.n}, {self.k}], [{self.ldw}, 1], [{c.n}, {c.k}])")
        with w.block(f"for tile in tl.range(pid, blocks * {columns}, {c.persistent}, flatten=True):"):
            self._grouped(w, c, "tile", columns)
            w.line(f"acc = tl.zeros([{c.m}, {c.n}], tl.float32)")
            with w.block(f"for k in range(0, {-(-self.k // c.k) * c.k}, {c.k}):"):
                w.line("acc = tl.dot(x.load([first, k]), y.load([column, k]).T, acc)")
            w.line(f"rows = first + tl.arange(0, {c.m})")
            w.line(f"cols = column + tl.arange(0, {c.n})")
            self._epilogue(w, c, w.variable("rows[:, None]", self.max_rows, "(rows < count)[:, None]", True))
        parameters, args = self._parameters()
        return w, [*parameters, ("dims", "*i32")], [*args, "dims"]

    def _parameters(self) -> tuple[list[tuple[str, str]], list[object]]:
        count = len(self.body.inputs)
        values = [*self.body.inputs, *self.body.outputs]
        return [(f"p{i}", parameter_type(v)) for i, v in enumerate(values)], list(range(count + len(self.body.outputs)))

    def _epilogue(self, w: Writer, c: MatmulConfig, row: Index) -> None:
        whole = w.variable("cols[None, :]", self.n, f"(cols < {self.n})[None, :]" if self.n % c.n else "", True)
        half = None
        if any(self._width(v) * 2 == self.n for v in self.body.outputs):
            w.line(f"even, odd = tl.split(tl.reshape(acc, [{c.m}, {c.n // 2}, 2]))")
            w.line(f"halves = column // 2 + tl.arange(0, {c.n // 2})")
            half = w.variable("halves[None, :]", self.n // 2,
                              f"(halves < {self.n // 2})[None, :]" if self.n % c.n else "", True)

        def product(index: Sequence[Index]) -> str:
            at = index[-1]
            if index[0] == row and at == whole:
                return "acc"
            if half is not None and index[0] == row and at in (half * 2, half * 2 + Index(const=1)):
                return "odd" if at.const else "even"
            raise UnsupportedError(f"{self.node.loc}: a matmul kernel's result is read at other places than its own")

        self._store_all(w, row, whole, half, product)

    def _store_all(self, w: Writer, row: Index, whole: Index, half: Index | None,
                   product: Callable[[Sequence[Index]], str]) -> None:
        values = Values(self.body, self.source.layouts, w)

        def result(index: Sequence[Index]) -> str:
            made = product(index)
            return w.name(f"{made} + {values.at(self.bias, [index[-1]])}") if self.bias is not None else made

        values.override = {self.node.result: result}
        for i, value in enumerate(self.body.outputs):
            width = self._width(value)
            if width not in (self.n, self.n // 2) or (width != self.n and half is None):
                raise UnsupportedError(f"{self.node.loc}: a matmul of {self.n} columns with a result of {width}")
            at = whole if width == self.n else half
            index = [row, *w.unflatten(at, dims_of(value))]  # type: ignore[arg-type]
            values.store(value, len(self.body.inputs) + i, index, values.at(value, index))

    def _width(self, value: Value) -> int:
        made = 1
        for d in dims_of(value):
            made *= d
        return made

    # -- adding the parts

    def _reduce(self, c: MatmulConfig) -> tuple[Writer, list[tuple[str, str]], list[object]]:
        w = Writer()
        columns = -(-self.n // c.reduce_n)
        gated = any(self._width(v) * 2 == self.n for v in self.body.outputs)
        w.line("pid = tl.program_id(0)")
        w.line(f"row = pid // {columns}")
        row = w.variable("row", self.max_rows)
        most = min(self.max_rows, c.most_rows)

        def total(at: Index) -> str:
            mask = w.mask([at])
            masked = f", mask={mask}, other=0" if mask else ""
            parts = [f"tl.load(part + (({s * most} + row) * {self.n} + {at}){masked})" for s in range(c.splits)]
            made = parts[0]
            for part in parts[1:]:
                made = w.name(f"{made} + {part}")
            return made

        with w.block(f"if row < tl.load(dims + {self.dim}):"):
            size = c.reduce_n // 2 if gated else c.reduce_n
            columns_in = self.n // 2 if gated else self.n
            w.line(f"cols = pid % {columns} * {size} + tl.arange(0, {size})")
            at = w.variable("cols", columns_in, f"cols < {columns_in}" if columns_in % size else "", True)
            memo: dict[Index, str] = {}

            def product(index: Sequence[Index]) -> str:
                if index[-1] not in memo:
                    memo[index[-1]] = total(index[-1])
                return memo[index[-1]]

            if any(self._width(v) == self.n for v in self.body.outputs) and gated:
                raise UnsupportedError(f"{self.node.loc}: a gated matmul that also stores its product")
            self._store_all(w, row, at, at if gated else None, product)
        parameters, args = self._parameters()
        keep = [i for i in range(len(parameters)) if i not in (self.x, self.packed)]
        return w, [*(parameters[i] for i in keep), ("dims", "*i32"), ("part", "*fp32")], [*(args[i] for i in keep), "dims"]
