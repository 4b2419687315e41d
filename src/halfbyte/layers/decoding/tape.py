"""Write the operations of a token for `kernels.cpu.decoding.tape`, and run them.

What: operations are added in groups; a group begins when the one before is done. Buffers and tensors that operations
point to are kept alive here. Run again, the same operations read what their buffers hold now.
Cost: a microsecond an operation to write; a run is one call on torch's threads.

Letters: M vectors (texts at once), D in, O out, R rank.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from halfbyte.layers.kernels import cpu
from halfbyte.system import pages

MAX_VECTORS = 16  # beyond, a matrix product on dequantised weights is faster
_ITEM_BYTES = 64 * 1024  # of a matrix that a thread takes at once
_ITEMS_OF_EIGHT = 4  # of them, of a head in 8 bits: each of its items looks at what all have found
_FEWEST_ITEMS = 16  # of 4-bit rows: what a thread may have to wait for is one of them
_ROWS = 8  # of codes, that the kernels for fp32 take at once


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
    """What products read: M vectors (M, wide), in fp32, and in the kernels' order and type; zeros up to `wide`."""

    plain: Tensor
    ordered: Tensor
    wide: int


@dataclass
class TextAdapters:
    """Which of a model's adapters each text uses. Tapes of one model share it, and with it what is copied of LoRA.

    Args:
        names: PEFT's names of them. uses: (names, M) fp32, 1.0 where a text uses the adapter, else 0.0.
    """

    names: tuple[str, ...]
    uses: Tensor
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
        from halfbyte.layers.kernels.cpu.decoding import tape

        name = isa(dtype)
        if name is None:
            raise ValueError(f"no kernels for {dtype} here")
        self.dtype, self.m, self.max_tokens, self.kinds, self.adapters = dtype, vectors, max_tokens, tape, adapters
        self._rows: list[np.ndarray] = []
        self._kept: list[object] = []
        self.before, self._group = (0, 0), 0
        self.used = vectors  # those of them that a run computes; the first ones
        self.isa, self._groups, self._blocks, self._scratch = name, 1, 1, 0
        self._levels: dict[bytes, Tensor] = {}
        self._caches: pages.Arena | None = None
        self._planes_of: dict[bytes, Tensor] = {}
        self._slots: np.ndarray | None = None

    # ------------------------------------------------------------------ memory
    def kept(self, tensor: Tensor) -> int:
        """The address of a contiguous tensor, which lives as long as the tape."""
        if not tensor.is_contiguous():
            raise ValueError("not contiguous")
        self._kept.append(tensor)
        return tensor.data_ptr()

    def buffer(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        made = torch.zeros(shape, dtype=dtype)
        self._kept.append(made)
        return made

    def vectors(self, width: int) -> Vectors:
        from halfbyte.layers.kernels.cpu.decoding import nibbles

        wide = -(-width // nibbles.CHUNK) * nibbles.CHUNK
        count = self.m * wide
        if self.isa == "avx2":  # in whole numbers of 16 bits, once more for eight vectors at once; and their steps
            groups, blocks = -(-self.m // 8), wide // nibbles.BLOCK
            count = (2 * count + 16 * groups * wide + 32 * groups * blocks + 4 * self.m * blocks) // 4
        elif self.m == 1:  # from its last block on once more (`single.py`)
            count *= 2
        return Vectors(self.buffer(self.m, wide), self.buffer(count, dtype=self.dtype), wide)

    # -------------------------------------------------------------- operations
    def __len__(self) -> int:
        return len(self._rows)

    def then(self) -> None:
        """What is added from now on begins when all before is done."""
        if len(self._rows) > self._group:
            self.before, self._group = (self._group, len(self._rows)), len(self._rows)

    def _add(self, kind: int, items: int, slots: dict[int, int | float]) -> None:
        row = np.zeros(self.kinds.WIDTH, np.int64)
        row[:4] = kind, items, *self.before
        for at, value in slots.items():
            if isinstance(value, float):
                row.view(np.float64)[at] = value
            else:
                row[at] = value
        self._rows.append(row)

    def norm(
        self, x: Tensor, to: Vectors, weight: Tensor | None, eps: float = 0.0, one_plus: bool = False,
        whole: Whole | None = None,
    ) -> None:  # fmt: skip
        """x (M, D..) -> to, normalised where there is a weight (D,); and to `whole`, what `largest` reads."""
        d = len(weight) if weight is not None else min(x.shape[1], to.wide)
        address = self.kept(weight) if weight is not None else 0
        slots: dict[int, int | float] = {
            4: self.kept(x), 5: x.shape[1], 6: address, 7: d, 8: eps, 9: int(one_plus), 10: to.plain.data_ptr(),
            11: to.ordered.data_ptr(), 12: to.wide,
        }  # fmt: skip
        if whole is not None:
            slots |= {14: self.kept(whole.lengths), 15: self.kept(whole.numbers), 16: self.kept(whole.steps)}
            slots[17] = float(whole.most)
        self._add(self.kinds.NORM, self.m, slots)

    def whole(self, to: Vectors, d: int) -> Whole:
        """Memory for what `largest` reads of M vectors (M, D)."""
        lengths, steps = self.buffer(self.m), self.buffer(self.m)
        return Whole(lengths, steps, largest_whole(d), self.buffer(self.m, to.wide, dtype=torch.int16))

    def norm_onto(self, x: Tensor, onto: Tensor, weight: Tensor, eps: float, one_plus: bool) -> None:
        """onto += norm(x), both (M, D)."""
        self._add(
            self.kinds.NORM, self.m,
            {4: self.kept(x), 5: x.shape[1], 6: self.kept(weight), 7: len(weight), 8: eps, 9: int(one_plus),
             13: self.kept(onto)},
        )  # fmt: skip

    def dense(
        self, w: Tensor, x: Tensor, out: Tensor, *, onto: bool = False, bias: Tensor | None = None, scale: float = 0.0,
        taken: Tensor | None = None,
    ) -> None:  # fmt: skip
        """x (M, D.. fp32) times w (O, D) -> out (M, O..), a view into a buffer; with a scale, times it, in `dtype`.
        taken: (M,) fp32; a vector whose number is 0.0 gives zeros."""
        o, d = w.shape
        rows = self._item_rows(o, d * w.itemsize)
        self._add(
            self.kinds.DENSE, -(-o // rows),
            {4: self.kept(w), 9: d, 10: o, 11: x.data_ptr(), 12: x.stride(0) * 4, 13: out.data_ptr(), 14: out.stride(0),
             15: int(onto), 16: 0 if bias is None else self.kept(bias.float()), 17: int(scale != 0.0), 18: scale,
             19: 0 if taken is None else self.kept(taken), 23: rows, 24: self.m},
        )  # fmt: skip

    def largest(self, w: Tensor, eight: Eight, x: Tensor, whole: Whole, out: Tensor) -> None:
        """x (M, D fp32) times w (O, D) -> out (M, O): exact where it may be the largest, elsewhere less and within
        `eight.bounds` times the lengths of x. In two groups."""
        o, d = w.shape
        rows = -(-_ITEMS_OF_EIGHT * self._item_rows(o, d) // 16) * 16  # whole ones of `single.py`
        items = -(-o // rows)
        slots: dict[int, int | float] = {
            6: self.kept(eight.bounds), 7: self.kept(whole.lengths), 8: self.buffer(2, items, self.m).data_ptr(), 9: d,
            10: o, 11: x.data_ptr(), 12: x.stride(0) * 4, 13: out.data_ptr(), 14: out.stride(0), 23: rows, 24: self.m,
            15: whole.numbers.data_ptr(), 16: 2 * whole.numbers.stride(0), 17: whole.steps.data_ptr(),
        }  # fmt: skip
        self._add(self.kinds.EIGHTS, items, {**slots, 4: self.kept(eight.rows), 5: self.kept(eight.scales)})
        self.then()
        self._add(self.kinds.EXACT, items, {**slots, 4: self.kept(w), 5: items})

    def codes(
        self, codes: Tensor, scales: Scales, values: Tensor, shape: tuple[int, int], x: Vectors, out: Tensor, *,
        onto: bool = False, bias: Tensor | None = None, up: Tensor | None = None, h: Tensor | None = None,
    ) -> None:  # fmt: skip
        """x (M, D) times 4-bit rows (O, D) with the 16 `values`, plus h (M, R) times up: (O, R) in pieces of
        32 bytes; in fp32 (R, O ..)."""
        from halfbyte.layers.kernels.cpu.decoding import single

        o, d = shape
        nested = scales.nested is not None and scales.table is not None
        in_planes = nested and self.isa == "avx512" and single.available(nested)
        rows = self._item_rows(o, d // 2)
        if self.isa == "avx2":
            rows = -(-rows // _ROWS) * _ROWS
        else:
            rows = max(1, min(rows, o // _FEWEST_ITEMS) // single.ROWS) * single.ROWS
        self._blocks = max(self._blocks, d // 64)
        self._groups = max(self._groups, rows * (d // 64) // 256 + 2)
        table = self._planes(scales.table) if in_planes else scales.table
        slots: dict[int, int | float] = {
            4: self.kept(codes), 5: self.kept(scales.absmax), 6: self.kept(table) if nested else 0,
            7: self.kept(scales.nested) if nested else 0, 8: scales.offset, 9: d, 10: o, 11: x.ordered.data_ptr(),
            12: 2 * x.wide, 13: out.data_ptr(), 14: out.stride(0), 15: int(onto),
            16: 0 if bias is None else self.kept(bias.float()), 22: self._table(values), 23: rows, 24: self.m,
            25: int(in_planes),
        }  # fmt: skip
        if up is not None and h is not None:
            row_bytes = h.shape[1] * h.itemsize
            count = h.shape[1] if self.isa == "avx2" else row_bytes // 32
            slots |= {17: self.kept(up), 18: up.shape[1] * up.itemsize, 19: self.kept(h), 20: row_bytes, 21: count}
        self._add(self.kinds.CODES, -(-o // rows), slots)

    def gate(self, g: Tensor, u: Tensor, inner: int, kind: int, to: Vectors) -> None:
        """act(g) * u, both (M, I) views with one stride -> to."""
        parts = -(-to.wide // self.kinds.GATE_ELEMENTS)
        self._add(
            self.kinds.GATE, self.m * parts,
            {4: g.data_ptr(), 5: u.data_ptr(), 6: g.stride(0), 7: inner, 8: kind, 9: self.m, 22: to.plain.data_ptr(),
             23: to.ordered.data_ptr(), 24: to.wide},
        )  # fmt: skip

    def attend(self, attention: Attention, cos: Tensor, sin: Tensor, out: Tensor) -> None:
        """Keys and values to their caches, rotated (cos, sin: (M, R)), then attention -> out: (M, H d). In two groups
        where vectors may be tokens of one text, which look at each other's keys."""
        from halfbyte.layers.kernels.cpu.decoding import attend

        a, items = attention, self.m * attention.key_heads
        self._scratch = max(self._scratch, attend.scratch_bytes(a.keys.stride(2) * a.keys.itemsize, a.keys.itemsize))
        rotated = {9: self.kept(cos), 10: self.kept(sin), 8: cos.shape[1], 13: a.eps, 14: int(a.one_plus)}
        for at, weight in ((11, a.q_norm), (12, a.k_norm)):
            rotated[at] = 0 if weight is None else self.kept(weight)
        if a.places is not None:
            self._add(self.kinds.ROTATE, items, a.slots() | rotated)
            self.then()
            rotated = {}
        slots = {19: a.scale, 20: a.cap, 21: a.window, 22: out.data_ptr(), 24: out.shape[1]}
        self._add(self.kinds.ATTEND, items, a.slots() | rotated | slots)

    def cache(self, key_heads: int, d: int, count: int = 2) -> Tensor:
        """Keys or values (M, K, T, d), zeros, as `attend` reads them: rows of whole registers. In large pages where the
        system has them, in one piece for `count` of this size; they take memory as texts are put there."""
        shape = self._shape(key_heads, d)
        if self._caches is None:
            self._caches = pages.Arena(count * math.prod(shape) * self.dtype.itemsize)
        return self._caches.zeros(shape, self.dtype)[..., :d]

    def _shape(self, key_heads: int, d: int) -> tuple[int, int, int, int]:
        from halfbyte.layers.kernels.cpu.decoding import attend

        chunk = attend.CHUNK_BYTES[self.dtype.itemsize] // self.dtype.itemsize
        return self.m, key_heads, self.max_tokens, -(-d // chunk) * chunk

    def _item_rows(self, rows: int, row_bytes: int) -> int:
        return max(1, min(_ITEM_BYTES // max(1, row_bytes), math.ceil(rows / 8)))

    def _table(self, values: Tensor) -> int:
        from halfbyte.layers.kernels.cpu.decoding import nibbles, words

        numbers = values.numpy()
        key = numbers.tobytes()
        if key not in self._levels:
            table = words.table if self.isa == "avx2" else nibbles.table
            self._levels[key] = torch.from_numpy(table(numbers))
        return self.kept(self._levels[key])

    def _planes(self, table: Tensor | None) -> Tensor:
        """One for all matrices whose scales stand for the same numbers."""
        from halfbyte.layers.kernels.cpu.decoding import single

        assert table is not None
        numbers = table.contiguous().numpy()
        key = numbers.tobytes()
        if key not in self._planes_of:
            self._planes_of[key] = torch.from_numpy(single.planes(numbers))
        return self._planes_of[key]

    # --------------------------------------------------------------------- run
    def run(self, first: int = 0, last: int | None = None) -> None:
        """Run operations first .. last; a token begins with the first one."""
        from halfbyte.layers.kernels.cpu import parallel

        threads, slots = torch.get_num_threads(), self._slots
        # within a token the shares stay: what is done is counted by them, and more or fewer threads may come
        if slots is None or slots[1] != len(self._rows) or (first == 0 and slots[9] != threads):
            self._finish(threads)
        assert self._slots is not None
        if first == 0:
            self._counters.fill(0)
        self._arrived.fill(0)
        self._slots[2:4] = first, len(self._rows) if last is None else last
        self._ops[self.kinds.USED :: self.kinds.WIDTH] = self.used
        parallel.start(self.kinds.compiled(self.dtype), self._slots)

    def _finish(self, threads: int) -> None:
        self._ops = np.concatenate(self._rows)
        self._counters = np.zeros((threads + 1) * len(self._rows) * self.kinds.LINE, np.int64)
        self._arrived = np.zeros(self.kinds.LINE, np.int64)
        self._slots = np.zeros(32, np.int64)
        self._slots[:2] = self._ops.ctypes.data, len(self._rows)
        scratch = max(self._scratch, 12 * 1024 + 160 * self.m + 32 * self._blocks)
        self._slots[4:9] = self._counters.ctypes.data, self._groups, self.max_tokens, scratch, _yield_address()
        self._slots[9:11] = threads, self._arrived.ctypes.data
        self._name_matrices()

    def _name_matrices(self) -> None:
        """In each operation the next matrix, itself included: address, items, bytes of an item."""
        widths, ops = {self.kinds.CODES: 0.5, self.kinds.EIGHTS: 1.0, self.kinds.DENSE: self.dtype.itemsize}, self._ops
        following = np.zeros(3, np.int64)
        for row in ops.reshape(-1, self.kinds.WIDTH)[::-1]:
            if row[0] in widths:
                following[:] = row[4], row[1], int(row[23] * row[9] * widths[int(row[0])])
            row[28:31] = following


@dataclass(frozen=True)
class Eight:
    """Rows in 8 bits: whole numbers (O, D) int8, scales (O,), bounds (O,) of the error for a vector of length 1."""

    rows: Tensor
    scales: Tensor
    bounds: Tensor


@dataclass(frozen=True)
class Whole:
    """What the head in 8 bits reads of M vectors: lengths (M,), and whole numbers (M, D..) int16 up to `most` with a
    step for each vector (M,)."""

    lengths: Tensor
    steps: Tensor
    most: int
    numbers: Tensor


def largest_whole(d: int) -> int:
    """Whole numbers of x (D,) up to this times 8 bits: sums of D / 8 products are below 2^31."""
    return min(2**14, (2**31 - 1) // (127 * -(-d // 8)))


@dataclass(frozen=True)
class Scales:
    """Of each block, in fp32; or 8-bit codes in `absmax`, with the table and the outer scales they stand for."""

    absmax: Tensor
    nested: Tensor | None = None
    table: Tensor | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Attention:
    """One layer's attention: where its queries, keys and values are, and what it does with them.

    Args:
        qkv: (M, (H + 2 K) d) fp32. keys, values: (M, K, T, d), of `Tape.cache`. positions: (M,) int64, of this token.
        places: (M,) int64, of its cache among those that there are; None: M of them, in order.
        cap: of scores, by tanh; 0: none. window: tokens seen, itself included; 0: all.
    """

    qkv: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    heads: int
    key_heads: int
    d: int
    scale: float
    cap: float = 0.0
    window: int = 0
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0
    one_plus: bool = False
    places: Tensor | None = None

    def slots(self) -> dict[int, int | float]:
        return {
            4: self.qkv.data_ptr(), 5: self.heads, 6: self.key_heads, 7: self.d, 15: self.keys.data_ptr(),
            16: self.values.data_ptr(), 17: self.values.shape[2], 18: self.positions.data_ptr(),
            25: 0 if self.places is None else self.places.data_ptr(),
            26: self.keys.stride(2) * self.keys.itemsize,
        }  # fmt: skip


@cache
def _yield_address() -> int:
    """Of `sched_yield`, which lets other threads have the core; 0 where there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):
        return 0
