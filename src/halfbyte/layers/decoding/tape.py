"""Write the operations of a token for `kernels.cpu.decoding.interpreter`, and run them.

What: operations are added in groups; a group begins when the one before is done. Buffers and tensors that operations
point to are kept alive here. Run again, the same operations read what their buffers hold now.
Source: `kernels/cpu/decoding/slots.py` says what an operation's numbers mean, with a picture.
Cost: a microsecond an operation to write; a run is one call on torch's threads.

Letters: M vectors (texts at once), D in, O out, R rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from halfbyte.layers.decoding.decoder import TapeRun
from halfbyte.layers.decoding.operands import CachedAttention, Int8Head, Int16Vectors, NormFormula, largest_int16
from halfbyte.layers.kernels import cpu
from halfbyte.layers.kernels.cpu.decoding import slots as s
from halfbyte.quant.number_format import BlockRows
from halfbyte.system import pages

MAX_VECTORS = 16  # beyond, a matrix product on dequantised weights is faster
_ITEM_BYTES = 64 * 1024  # of a matrix that a thread takes at once
_ITEMS_OF_INT8_HEAD = 4  # of them: each item of the head looks at what all have found
_MIN_ITEMS = 16  # of 4-bit rows: what a thread may have to wait for is one of them


@cache
def isa(dtype: torch.dtype) -> str | None:
    """Which instructions the kernels use for activations of this dtype; None: none here."""
    if not cpu.enabled() or dtype not in (torch.bfloat16, torch.float32):
        return None
    from halfbyte.layers.kernels.cpu import tiles

    if dtype == torch.bfloat16:
        return "avx512" if tiles.available() else None
    return "avx2" if tiles.has("avx2") and tiles.has("fma") else None


@dataclass(frozen=True)
class Vectors:
    """What products read: M vectors (M, width), in fp32, zeros up to `width`; and in the kernels' types and orders, by
    their place among the `slots.NORM_ORDERS`, those that products have asked for; and in pairs, for AMX."""

    plain: Tensor
    width: int
    orders: dict[int, Tensor] = field(default_factory=dict)
    pairs: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Scales:
    """Of each block, in fp32; or 8-bit codes in `absmax`, with the table and the outer scales they stand for."""

    absmax: Tensor
    nested: Tensor | None = None
    table: Tensor | None = None
    offset: float = 0.0


@dataclass
class TextAdapters:
    """Which of a model's adapters each text uses. Tapes of one model share it, and with it what is copied of LoRA."""

    names: tuple[str, ...]  # PEFT's names of them
    uses: Tensor  # (names, M) fp32, 1.0 where a text uses the adapter, else 0.0
    copies: dict[nn.Module, tuple[list[Tensor], Tensor]] = field(default_factory=dict)

    def use(self, text: int, name: str | None) -> None:
        """From now on a text uses this adapter; None: the base alone."""
        self.uses[:, text] = 0.0
        if name is not None:
            self.uses[self.names.index(name), text] = 1.0


class Tape:
    """The operations of a token.

    Args:
        dtype: bf16 or fp32, of activations, caches and unquantised weights. vectors: M. max_tokens: of a text.
        adapters: where each text has an adapter of its own.
    """

    def __init__(
        self, dtype: torch.dtype, vectors: int, max_tokens: int = 1, adapters: TextAdapters | None = None
    ) -> None:
        name = isa(dtype)
        if name is None:
            raise ValueError(f"no kernels for {dtype} here")
        from halfbyte.layers.kernels.cpu.decoding import (  # isort: skip
            attend, block_rows, block_vectors, code_tables, codes_amx, codes_bf16, codes_int16, interpreter, recurrent,
        )  # fmt: skip

        self.kernels, self.attention, self.code_tables = interpreter, attend, code_tables
        self.bf16, self.int16 = codes_bf16, codes_int16
        self.amx = codes_amx if interpreter.AMX and dtype == torch.bfloat16 else None
        self.block_rows, self.block_vectors = block_rows, block_vectors
        self.recurrent = recurrent
        self.isa, self.dtype, self.adapters = name, dtype, adapters
        self.compiled_parts = set[str]()  # of the interpreter, which few models need
        self.m = self.used = vectors  # `used`: of them, the first ones, that a run computes
        self.max_tokens = max_tokens
        self._rows: list[np.ndarray] = []
        self.written_to: dict[int, Vectors] = {}  # by the number of the operation that writes them
        self._paired: dict[int, int] = {}  # by the address of vectors, the operation that put them in pairs
        self.before, self._group = (0, 0), 0
        self.constants: list[Tensor] = []  # what operations read, and buffers that were asked for by address
        self.buffers: list[Tensor] = []
        self._tables: dict[tuple[object, bytes], Tensor] = {}
        self._caches: pages.Arena | None = None
        # What the largest operation needs: groups of 256 blocks, blocks of a row, bytes.
        self.groups, self._blocks, self._scratch = 1, 1, 0
        self._run: TapeRun | None = None

    # ------------------------------------------------------------------ memory
    def keep(self, tensor: Tensor | None) -> int:
        """The address of a contiguous tensor, which lives as long as the tape; 0 for none."""
        if tensor is None:
            return 0
        if not tensor.is_contiguous():
            raise ValueError("not contiguous")
        self.constants.append(tensor)
        return tensor.data_ptr()

    def state(self, *shape: int) -> Tensor:
        """A state of each text (M, ..) in fp32, in large pages where the system has them."""
        return pages.Arena(4 * self.m * math.prod(shape)).zeros((self.m, *shape), torch.float32)

    def buffer(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        zeros = torch.zeros(shape, dtype=dtype)
        self.buffers.append(zeros)
        return zeros

    def vectors(self, d: int) -> Vectors:
        """Memory for what products read of M vectors (M, D)."""
        width = -(-d // self.bf16.CHUNK) * self.bf16.CHUNK
        return Vectors(self.buffer(self.m, width), width)

    def _in_order(self, x: Vectors, place: int) -> Tensor:
        """Memory for x in an order: 0 that of `codes`, then those of `block_rows`. What writes x writes it there."""
        if place not in x.orders:
            if place:
                count = self.m * self.block_vectors.ordered_row(x.width)
            elif self.isa == "avx2":
                count = self.int16.ordered_bytes(self.m, x.width)
            else:  # of one vector from its last block on once more (`codes_bf16.py`)
                count = 2 * self.m * x.width * (2 if self.m == 1 else 1)
            x.orders[place] = self.buffer(count, dtype=torch.uint8)
        return x.orders[place]

    def int16_vectors(self, to: Vectors, d: int) -> Int16Vectors:
        """Memory for what `largest` reads of M vectors (M, D)."""
        lengths, steps = self.buffer(self.m), self.buffer(self.m)
        return Int16Vectors(lengths, steps, largest_int16(d), self.buffer(self.m, to.width, dtype=torch.int16))

    def cache(self, key_heads: int, d: int, count: int = 2) -> Tensor:
        """Keys or values (M, K, T, d), zeros, as `attend` reads them: rows of whole registers. In large pages where the
        system has them, in one piece for `count` of this size; they take memory as texts are put there."""
        chunk = self.attention.CHUNK_BYTES[self.dtype.itemsize] // self.dtype.itemsize
        shape = (self.m, key_heads, self.max_tokens, -(-d // chunk) * chunk)
        if self._caches is None:
            self._caches = pages.Arena(count * math.prod(shape) * self.dtype.itemsize)
        return self._caches.zeros(shape, self.dtype)[..., :d]

    # -------------------------------------------------------------- operations
    @property
    def kernel(self) -> str:
        return "_".join(["compiled", *(["with", *sorted(self.compiled_parts)] if self.compiled_parts else [])])

    def needs(self, part: str, scratch_bytes: int) -> None:
        """An operation is one of a part of the interpreter, with memory of its own."""
        self.compiled_parts.add(part)
        self._scratch = max(self._scratch, scratch_bytes)

    def __len__(self) -> int:
        return len(self._rows)

    def then(self) -> None:
        """What is added from now on begins when all before is done."""
        if len(self._rows) > self._group:
            self.before, self._group = (self._group, len(self._rows)), len(self._rows)

    def add(self, kind: int, items: int, numbers: dict[int, int | float]) -> None:
        row = np.zeros(s.WIDTH, np.int64)
        row[[s.KIND, s.ITEMS, s.AFTER, s.UNTIL]] = kind, items, *self.before
        for slot, number in numbers.items():
            row.view(np.float64 if isinstance(number, float) else np.int64)[slot] = number
        self._rows.append(row)

    def norm(self, x: Tensor, to: Vectors, formula: NormFormula | None, integers: Int16Vectors | None = None) -> None:
        """x (M, D..) -> to, normalised where there is a formula; and to `integers`, what `largest` reads."""
        numbers = self._formula(x, formula, min(x.shape[1], to.width)) | {
            s.NORM_PLAIN: to.plain.data_ptr(), s.NORM_WIDTH: to.width,
        }  # fmt: skip
        self.written_to[len(self)] = to
        if integers is not None:
            numbers |= {
                s.NORM_LENGTHS: self.keep(integers.lengths), s.NORM_INTS: self.keep(integers.numbers),
                s.NORM_STEPS: self.keep(integers.steps), s.NORM_MAX_INT: float(integers.largest),
            }  # fmt: skip
        self.add(s.NORM, self.m, numbers)

    def add_norm(self, x: Tensor, to: Tensor, formula: NormFormula, *, add: bool = True) -> None:
        """to += or = norm(x), both (M, D), views into buffers."""
        where = {s.NORM_ADD_TO: to.data_ptr(), s.NORM_TO_ROW: to.stride(0), s.NORM_SET: int(not add)}
        self.add(s.NORM, self.m, self._formula(x, formula, x.shape[1]) | where)

    def _formula(self, x: Tensor, formula: NormFormula | None, d: int) -> dict[int, int | float]:
        """What both have."""
        numbers: dict[int, int | float] = {s.NORM_X: x.data_ptr(), s.NORM_X_ROW: x.stride(0), s.NORM_D: d}
        if formula is not None:
            numbers |= {
                s.NORM_WEIGHT: self.keep(formula.weight), s.NORM_D: len(formula.weight), s.NORM_EPS: formula.eps,
                s.NORM_ONE_PLUS: int(formula.kind.one_plus), s.NORM_CENTRED: int(formula.kind.centred),
                s.NORM_BIAS: self.keep(formula.bias),
            }  # fmt: skip
        return numbers

    def _matrix(
        self, w: Tensor, shape: tuple[int, int], x: Tensor, x_row: int, out: Tensor, item_rows: int
    ) -> dict[int, int | float]:
        """What all products with a matrix (O, D) have."""
        return {
            s.W: self.keep(w), s.D: shape[1], s.O: shape[0], s.X: x.data_ptr(), s.X_ROW: x_row, s.OUT: out.data_ptr(),
            s.OUT_ROW: out.stride(0), s.ITEM_ROWS: item_rows, s.VECTORS: self.m,
        }  # fmt: skip

    def _bias(self, add: bool, bias: Tensor | None) -> dict[int, int | float]:
        return {s.ADD: int(add), s.BIAS: 0 if bias is None else self.keep(bias.float())}

    def dense(
        self, w: Tensor | BlockRows, x: Tensor, out: Tensor, *, add: bool = False, bias: Tensor | None = None,
        scale: float = 0.0, uses: Tensor | None = None,
    ) -> None:  # fmt: skip
        """x (M, D.. fp32) times w (O, D) -> or added to out (M, O..), a view into a buffer; with a scale, times it, in
        `dtype`. uses: (M,) fp32; a vector whose number is 0.0 gives zeros."""
        o, d = w.shape
        codes = w.codes if isinstance(w, BlockRows) else w
        row_bytes = codes.stride(0) * codes.itemsize if isinstance(w, BlockRows) else d * codes.itemsize
        rows = self._item_rows(o, row_bytes)
        numbers = self._matrix(codes, (o, d), x, x.stride(0) * 4, out, rows) | self._bias(add, bias)
        if isinstance(w, BlockRows):
            self.needs("blocks", d * self.dtype.itemsize + 64)
            numbers |= {
                s.DENSE_TYPE: w.kind, s.DENSE_BLOCKS: d // w.weights, s.DENSE_ROW_BYTES: row_bytes,
                s.DENSE_ORDER: self.keep(w.order),
            }  # fmt: skip
        numbers |= {s.DENSE_SCALED: int(scale != 0.0), s.DENSE_SCALE: scale, s.DENSE_USES: self.keep(uses)}
        self.add(s.DENSE, -(-o // rows), numbers)

    def largest(self, w: Tensor, head: Int8Head, x: Tensor, integers: Int16Vectors, out: Tensor) -> None:
        """x (M, D fp32) times w (O, D) -> out (M, O): exact where it may be the largest, elsewhere less and within
        `head.bounds` times the lengths of x. In two groups, or three."""
        o, d = w.shape
        rows = -(-_ITEMS_OF_INT8_HEAD * self._item_rows(o, d) // self.bf16.ROWS) * self.bf16.ROWS
        items = -(-o // rows)
        numbers = self._matrix(w, (o, d), x, x.stride(0) * 4, out, rows) | {
            s.HEAD_BOUNDS: self.keep(head.bounds), s.HEAD_LENGTHS: self.keep(integers.lengths),
            s.HEAD_ENDS: self.buffer(2, items, self.m).data_ptr(), s.HEAD_INTS: integers.numbers.data_ptr(),
            s.HEAD_INTS_ROW: 2 * integers.numbers.stride(0), s.HEAD_STEPS: integers.steps.data_ptr(),
            s.HEAD_ITEMS: items,
        }  # fmt: skip
        if self.amx is not None and 1 < self.m <= self.amx.MOST_VECTORS:
            numbers[s.HEAD_QUADS] = self.buffer(32 * integers.numbers.shape[1], dtype=torch.uint8).data_ptr()
            x_numbers = {s.X: integers.numbers.data_ptr(), s.X_ROW: numbers[s.HEAD_INTS_ROW], s.D: d}
            self.add(s.QUADS, 1, x_numbers | {s.OUT: numbers[s.HEAD_QUADS], s.VECTORS: self.m})
            self.then()
        self.add(s.HEAD_ROUGH, items, {**numbers, s.W: self.keep(head.rows), s.HEAD_SCALES: self.keep(head.scales)})
        self.then()
        self.add(s.HEAD_EXACT, items, numbers)

    def codes(
        self, codes: Tensor, scales: Scales, values: Tensor, shape: tuple[int, int], x: Vectors, out: Tensor, *,
        add: bool = False, bias: Tensor | None = None, up: Tensor | None = None, h: Tensor | None = None,
    ) -> None:  # fmt: skip
        """x (M, D) times 4-bit rows (O, D) with the 16 `values`, plus h (M, R) times up: (O, R) in pieces of 32 bytes;
        in fp32 (R, O ..)."""
        o, d = shape
        rows = self._code_rows(o, d // 2)
        self._blocks = max(self._blocks, d // 64)
        self.groups = max(self.groups, rows * (d // 64) // 256 + 2)
        ordered = self._in_order(x, 0) if self.amx is None else x.pairs[0]
        numbers = self._matrix(codes, shape, ordered, 2 * x.width, out, rows) | self._bias(add, bias)
        levels = self.code_tables.int16_levels if self.isa == "avx2" else self.code_tables.bf16_levels
        numbers |= {s.CODES_SCALES: self.keep(scales.absmax), s.CODES_LEVELS: self.keep(self._made(levels, values))}
        if scales.nested is not None and scales.table is not None:
            in_planes, table = self.isa == "avx512" and self.code_tables.has_planes(), scales.table
            numbers |= {
                s.CODES_TABLE: self.keep(self._made(self.code_tables.planes, table) if in_planes else table),
                s.CODES_IN_PLANES: int(in_planes), s.CODES_OUTER: self.keep(scales.nested),
                s.CODES_OFFSET: scales.offset,
            }  # fmt: skip
        if self.amx is not None:
            self._scratch = max(self._scratch, self.amx.scratch_bytes(self.m, 0 if h is None else h.shape[1]))
        self.add(s.CODES, -(-o // rows), numbers | self._lora(up, h))

    def order(self, x: Vectors) -> None:
        """What is to be there before the group of `codes` begins: x as AMX reads it. Once for all that read it."""
        written, at = max(number for number, to in self.written_to.items() if to is x), x.plain.data_ptr()
        if self.amx is None or self._paired.get(at, -1) > written:
            return
        self._paired[at] = len(self)
        x.pairs[:] = x.pairs or [self.buffer(self.amx.ordered_bytes(self.m, x.width), dtype=torch.uint8)]
        numbers = {s.X: at, s.X_ROW: 4 * x.width, s.OUT: x.pairs[0].data_ptr(), s.VECTORS: self.m}
        self.add(s.PAIRS, -(-x.width // 64 // self.amx.PAIRS_BLOCKS), numbers)

    def _lora(self, up: Tensor | None, h: Tensor | None) -> dict[int, int | float]:
        if up is None or h is None:
            return {}
        row_bytes = h.shape[1] * h.itemsize
        return {
            s.CODES_UP: self.keep(up), s.CODES_UP_ROW: up.shape[1] * up.itemsize, s.CODES_H: self.keep(h),
            s.CODES_H_ROW: row_bytes, s.CODES_PIECES: h.shape[1] if self.isa == "avx2" else row_bytes // 32,
        }  # fmt: skip

    def blocks(
        self, w: BlockRows, x: Vectors, out: Tensor, *, add: bool = False, bias: Tensor | None = None,
        up: Tensor | None = None, h: Tensor | None = None,
    ) -> None:  # fmt: skip
        """`codes` of a matrix of a GGUF file's blocks."""
        o, row_bytes, place = w.shape[0], w.codes.stride(0), 1 + self.block_rows.KINDS[w.kind].order
        rows = self._code_rows(o, row_bytes)
        row = self.block_vectors.ordered_row(x.width)
        self.needs("blocks", self.bf16.SUMS * self.m + 64)
        numbers = self._matrix(w.codes, w.shape, self._in_order(x, place), row, out, rows) | self._bias(add, bias)
        numbers |= {s.BLOCKS_TYPE: w.kind, s.BLOCKS_ROW_BYTES: row_bytes, s.BLOCKS_ORDER: self.keep(w.order)}
        self.add(s.BLOCKS, -(-o // rows), numbers | self._lora(up, h))

    def _code_rows(self, rows: int, row_bytes: int) -> int:
        """Rows of an item, as many as kernels take at a time or several times that."""
        at_once = self._item_rows(rows, row_bytes)
        if self.isa == "avx2":
            return -(-at_once // self.int16.ROWS) * self.int16.ROWS
        return max(1, min(at_once, rows // _MIN_ITEMS) // self.bf16.ROWS) * self.bf16.ROWS

    def gate(self, g: Tensor, u: Tensor | None, inner: int, activation: int, to: Vectors) -> None:
        """act(g) * u, both (M, I) views with one stride, or act(g) -> to."""
        parts = -(-to.width // self.kernels.GATE_ELEMENTS)
        self.written_to[len(self)] = to
        self.add(s.GATE, self.m * parts, {
            s.GATE_G: g.data_ptr(), s.GATE_U: 0 if u is None else u.data_ptr(), s.GATE_ROW: g.stride(0),
            s.GATE_INNER: inner, s.GATE_ACTIVATION: activation, s.GATE_VECTORS: self.m, s.GATE_WIDTH: to.width,
            s.GATE_PLAIN: to.plain.data_ptr(),
        })  # fmt: skip

    def attend(self, a: CachedAttention, cos: Tensor, sin: Tensor, out: Tensor) -> None:
        """Keys and values to their caches, rotated (cos, sin: (M, R)), then attention -> out: (M, H d). In two groups
        where vectors may be tokens of one text, which look at each other's keys."""
        items = self.m * a.key_heads
        cache_row = a.keys.stride(2) * a.keys.itemsize
        self._scratch = max(self._scratch, self.attention.scratch_bytes(cache_row, a.keys.itemsize))
        both: dict[int, int | float] = {
            s.ATTEND_QKV: a.qkv.data_ptr(), s.ATTEND_HEADS: a.heads, s.ATTEND_KEY_HEADS: a.key_heads,
            s.ATTEND_HEAD_SIZE: a.d, s.ATTEND_KEYS: a.keys.data_ptr(), s.ATTEND_VALUES: a.values.data_ptr(),
            s.ATTEND_CACHE_ROW: cache_row, s.ATTEND_MAX_TOKENS: a.values.shape[2],
            s.ATTEND_POSITIONS: a.positions.data_ptr(), s.ATTEND_PLACES: self.keep(a.places),
            s.ATTEND_SLOPES: self.keep(a.slopes), s.ATTEND_LAYOUT: a.together + 2 * a.neighbours + 4 * a.gated,
        }  # fmt: skip
        q_norm, k_norm = a.q_norm, a.k_norm
        rotation: dict[int, int | float] = {
            s.ATTEND_COS: self.keep(cos), s.ATTEND_SIN: self.keep(sin), s.ATTEND_ROTARY: cos.shape[1] // 2 * 2,
        }  # fmt: skip
        if q_norm is not None and k_norm is not None:
            rotation |= {
                s.ATTEND_Q_NORM: self.keep(q_norm.weight), s.ATTEND_K_NORM: self.keep(k_norm.weight),
                s.ATTEND_EPS: q_norm.eps, s.ATTEND_ONE_PLUS: int(q_norm.kind.one_plus),
            }  # fmt: skip
        if a.places is not None:
            self.add(s.ROTATE, items, both | rotation)
            self.then()
            rotation = {}
        self.add(s.ATTEND, items, both | rotation | {
            s.ATTEND_SCALE: a.scale, s.ATTEND_CAP: a.cap, s.ATTEND_WINDOW: a.window, s.ATTEND_OUT: out.data_ptr(),
            s.ATTEND_OUT_ROW: out.shape[1],
        })  # fmt: skip

    def _item_rows(self, rows: int, row_bytes: int) -> int:
        return max(1, min(_ITEM_BYTES // max(1, row_bytes), math.ceil(rows / 8)))

    def _made(self, table: Callable[[np.ndarray], np.ndarray], values: Tensor) -> Tensor:
        """The table that `table` makes of some numbers; one for all matrices whose codes stand for the same."""
        numbers = values.contiguous().numpy()
        key = table, numbers.tobytes()
        if key not in self._tables:
            self._tables[key] = torch.from_numpy(table(numbers))
        return self._tables[key]

    # --------------------------------------------------------------------- run
    def run(self, first: int = 0, last: int | None = None) -> None:
        """Run operations first .. last; a token begins with the first one."""
        threads, run = torch.get_num_threads(), self._run
        # within a token the shares stay: what is done is counted by them, and more or fewer threads may come
        if run is None or run.count != len(self._rows) or (first == 0 and run.threads != threads):
            run = self._run = self.prepared(threads)
        run.used = self.used
        run.run(first, last)

    def prepared(self, threads: int) -> TapeRun:
        """All operations, as so many threads run them."""
        for number, to in self.written_to.items():
            for place, ordered in to.orders.items():
                self._rows[number][s.NORM_ORDERS + place] = ordered.data_ptr()
        operations = np.concatenate(self._rows)
        _name_matrices(operations, self.dtype.itemsize)
        return TapeRun(operations, getattr(self.kernels, self.kernel)(self.dtype), threads, **self.sizes)

    @property
    def sizes(self) -> dict[str, int]:
        """What a run of it is told: memory that an operation needs beside its operands, and for what."""
        scratch = max(self._scratch, 12 * 1024 + 160 * self.m + 32 * self._blocks)
        return {"vectors": self.m, "groups": self.groups, "max_tokens": self.max_tokens, "scratch_bytes": scratch}


def _name_matrices(operations: np.ndarray, itemsize: int) -> None:
    """In each operation the next matrix, itself included: address, items, bytes of an item."""
    itemsizes = {s.CODES: 0.5, s.HEAD_ROUGH: 1.0, s.DENSE: itemsize, s.BLOCKS: 0}
    following = np.zeros(3, np.int64)
    for row in operations.reshape(-1, s.WIDTH)[::-1]:
        if row[s.KIND] in itemsizes:
            item_bytes = int(row[s.ITEM_ROWS] * row[s.D] * itemsizes[int(row[s.KIND])])
            if row[s.KIND] == s.BLOCKS or (row[s.KIND] == s.DENSE and row[s.DENSE_TYPE]):
                row_bytes = s.BLOCKS_ROW_BYTES if row[s.KIND] == s.BLOCKS else s.DENSE_ROW_BYTES
                item_bytes = int(row[s.ITEM_ROWS] * row[row_bytes])
            following[:] = row[s.W], row[s.ITEMS], item_bytes
        row[s.NEXT_W], row[s.NEXT_ITEMS], row[s.NEXT_ITEM_BYTES] = following
