"""LLVM's language in short: products of this folder that numba's own code would not turn into the right instructions.

What: `emitted` makes a function that kernels can call out of a function that writes its instructions; `Code` has short
names for what is written often.
Source: llvmlite's IRBuilder; intrinsics of LLVM's X86 backend.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import Parameter, Signature
from types import SimpleNamespace

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from halfbyte.layers.kernels.cpu import scalar
from halfbyte.layers.kernels.cpu.scalar import Value
from halfbyte.layers.kernels.cpu.tiles import BFloat

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
# Registers of 64 bytes, and of 32.
I8X64, I16X32, I32X16 = (ir.VectorType(kind, 512 // kind.width) for kind in (I8, I16, I32))
F32X16, BF16X32 = ir.VectorType(F32, 16), ir.VectorType(BFloat(), 32)
I8X32, I16X16, I32X8 = (ir.VectorType(kind, 256 // kind.width) for kind in (I8, I16, I32))
F32X8 = ir.VectorType(F32, 8)
AHEAD_BYTES = 8192  # of a matrix, that are asked for before they are needed
BF16, FP32 = types.uint16, types.float32  # elements of `like`


def emitted(names: str, *, only: Value = None) -> Callable[[Callable[["Code", Value], None]], Callable[..., None]]:
    """A decorator: `build(code, args)`, which writes instructions -> a function that kernels call.

    It is called with `like`, an array of the type that is computed in (bf16 as uint16, or float32), then with the
    arguments in `names`, which are attributes of `args`: int64 (addresses, bytes, counts), or float32 as `name:f`.

    Args:
        only: the one element type of `like` for which anything is written.
    """
    kinds = {name.removesuffix(":f"): FP32 if name.endswith(":f") else types.int64 for name in names.split()}

    def decorate(build: Callable[["Code", Value], None]) -> Callable[..., None]:
        def define(typing_context, like, *args):  # type: ignore[no-untyped-def]
            def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
                if only is None or like.dtype == only:
                    build(Code(builder, like), SimpleNamespace(**dict(zip(kinds, values[1:], strict=True))))
                return context.get_dummy_value()

            return types.void(like, *kinds.values()), generate

        parameters = [Parameter(name, Parameter.POSITIONAL_ONLY) for name in ("typing_context", "like", *kinds)]
        define.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        define.__name__, define.__doc__ = build.__name__, build.__doc__
        product: Callable[..., None] = intrinsic(define)
        return product

    return decorate


class Code:
    """Instructions being written. `b` is llvmlite's builder, for the rest."""

    def __init__(self, builder: Value, like: types.Array) -> None:
        self.b, self.is_bf16 = builder, like.dtype == BF16

    # ------------------------------------------------------------------ memory
    def at(self, base: Value, *terms: Value) -> Value:
        """base + the terms; a pair is multiplied, a number is one of bytes."""
        for term in terms:
            if isinstance(term, tuple):
                a, c = (I64(t) if isinstance(t, int) else t for t in term)
                term = self.b.mul(a, c)
            base = self.b.add(base, I64(term) if isinstance(term, int) else term)
        return base

    def load(self, at: Value, kind: Value) -> Value:
        return self.b.load(self.b.inttoptr(at, kind.as_pointer()), align=1)

    def store(self, value: Value, at: Value) -> None:
        self.b.store(value, self.b.inttoptr(at, value.type.as_pointer()), align=1)

    def row_mask(self, count: Value, lanes: int) -> Value:
        """A bit for each lane: whether it is one of the first `count`."""
        numbers = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
        return self.b.icmp_signed("<", numbers, self.every(count, lanes))

    def masked_load(self, at: Value, kind: Value, mask: Value) -> Value:
        """A register; zeros, and nothing read, where the mask has no bit."""
        pointer, size = self.b.inttoptr(at, kind.as_pointer()), _bytes(kind.element)
        name = f"llvm.masked.load.{_name(kind)}.p0"
        return self.call(name, kind, pointer, I32(size), mask, zeros(kind))

    def masked_store(self, value: Value, at: Value, mask: Value) -> None:
        pointer, size = self.b.inttoptr(at, value.type.as_pointer()), _bytes(value.type.element)
        self.call(f"llvm.masked.store.{_name(value.type)}.p0", ir.VoidType(), value, pointer, I32(size), mask)

    def prefetch(self, at: Value, *, once: bool = False) -> None:
        """Ask for a line, into the second cache; `once`: it is read once, and need not stay in any but the first."""
        pointer = self.b.inttoptr(at, I8.as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(0 if once else 2), I32(1))

    def variables(self, kind: Value, count: int) -> list[Value]:
        """Zeros, in memory that LLVM turns into registers."""
        places = [cgutils.alloca_once(self.b, kind) for _ in range(count)]
        for place in places:
            self.b.store(zeros(kind), place)
        return places

    # -------------------------------------------------------------------- flow
    def call(self, name: str, kind: Value, *args: Value) -> Value:
        """A call of one of LLVM's functions, which gives a `kind`."""
        return scalar.call(self.b, name, kind, *args)

    @contextmanager
    def rolled(self, count: Value) -> Iterator[Value]:
        """A loop that is not unrolled; yields its index."""
        b = self.b
        before, head, end = b.block, b.append_basic_block("rolled"), b.append_basic_block("rolled.end")
        b.cbranch(b.icmp_signed(">", count, I64(0)), head, end)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(I64(0), before)
        yield index
        after = b.add(index, I64(1))
        index.add_incoming(after, b.block)
        back = b.cbranch(b.icmp_signed("<", after, count), head, end)
        never = b.module.add_metadata([ir.MetaDataString(b.module, "llvm.loop.unroll.disable")])
        loop = b.module.add_metadata([never])
        loop.operands = (loop, never)
        back.set_metadata("llvm.loop", loop)
        b.position_at_end(end)

    def ladder(self, count: Value, sizes: Sequence[int] = (8, 4, 2, 1)) -> Iterator[tuple[int, Value]]:
        """`count` vectors in parts of these sizes, the largest as often as it fits. Yields (size, first vector of the
        part); what the caller writes then is there once for each size."""
        largest, *smaller = sizes
        with self.rolled(self.b.udiv(count, I64(largest))) as index:
            yield largest, self.b.mul(index, I64(largest))
        for size in smaller:
            with self.when(self.b.and_(count, I64(size))):
                yield size, self.b.and_(count, I64(-2 * size))

    def cases(self, value: Value, numbers: Sequence[int]) -> Iterator[int]:
        """Yields each of the numbers; what the caller writes then runs where the value is that one."""
        for number in numbers:
            with self.b.if_then(self.b.icmp_signed("==", value, I64(number))):
                yield number

    @contextmanager
    def when(self, flag: Value) -> Iterator[None]:
        """What is written inside runs where an int64 is not 0."""
        with self.b.if_then(self.b.icmp_signed("!=", flag, I64(0))):
            yield

    # --------------------------------------------------------------- registers
    def fma(self, a: Value, b: Value, c: Value) -> Value:
        return self.call(f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)

    def every(self, value: Value, lanes: int) -> Value:
        """A number in each lane."""
        return scalar.broadcast(self.b, value, lanes)

    def total(self, vector: Value) -> Value:
        """The sum of a vector's lanes, by halves."""
        lanes = vector.type.count
        while lanes > 1:
            lanes //= 2
            low = self.b.shuffle_vector(vector, vector, mask(range(lanes)))
            vector = self.b.fadd(low, self.b.shuffle_vector(vector, vector, mask(range(lanes, 2 * lanes))))
        return self.b.extract_element(vector, I32(0))

    def add(self, x: Value, y: Value) -> Value:
        return (self.b.fadd if x.type.element == F32 else self.b.add)(x, y)

    def halves(self, vectors: list[Value], width: int = 16) -> list[Value]:
        """Neighbours, registers of 64 bytes of rows of `width` lanes each -> one register of the sums of these rows'
        halves."""
        half, pairs = width // 2, zip(vectors[::2], vectors[1::2], strict=True)
        low = [16 * side + first + i for side in (0, 1) for first in range(0, 16, width) for i in range(half)]
        high = [place + half for place in low]
        shuffle = self.b.shuffle_vector
        return [self.add(shuffle(x, y, mask(low)), shuffle(x, y, mask(high))) for x, y in pairs]

    def sums_of_16(self, rows: list[Value], width: int = 16) -> Value:
        """The sums of 16 rows of `width` lanes, in registers of 64 bytes, as one; each added up as `total` does."""
        while width > 1:
            rows, width = self.halves(rows, width), width // 2
        return rows[0]

    def interleaved(self, a: Value, b: Value, by: int) -> tuple[Value, Value]:
        """In each half of a register of 32 bytes: the first `by` numbers of a and of b in turns, and the last ones."""
        low, high = list[int](), list[int]()
        for lane in (0, 4):
            for first, to in ((0, low), (2, high)):
                for i in range(0, 2, by):
                    for side in (0, 8):
                        to += [lane + first + i + k + side for k in range(by)]
        return self.b.shuffle_vector(a, b, mask(low)), self.b.shuffle_vector(a, b, mask(high))

    def sums_of_8(self, vectors: list[Value]) -> Value:
        """The sums of the lanes of 8 registers of 32 bytes, as one."""
        pairs = [self.add(*self.interleaved(vectors[i], vectors[i + 1], 1)) for i in range(0, 8, 2)]
        fours = [self.add(*self.interleaved(pairs[i], pairs[i + 1], 2)) for i in (0, 2)]
        return self.add(*(self.b.shuffle_vector(*fours, mask(places)) for places in _QUARTERS))

    def turned(self, rows: list[Value]) -> list[Value]:
        """8 registers of 8 -> row i's lane j is row j's lane i."""
        pairs = [self.interleaved(rows[i], rows[i + 1], 1) for i in range(0, 8, 2)]
        fours = [[half for k in (0, 1) for half in self.interleaved(pairs[i][k], pairs[i + 1][k], 2)] for i in (0, 2)]
        return [self.b.shuffle_vector(fours[0][k], fours[1][k], mask(places)) for places in _QUARTERS for k in range(4)]

    def turned_16(self, rows: list[Value]) -> list[Value]:
        """16 registers of 16 -> row i's lane j is row j's lane i."""
        for by in (1, 2, 4, 8):  # pairs of rows change places of so many lanes
            low = [i if not i & by else 16 + i - by for i in range(16)]
            rows = [
                self.b.shuffle_vector(rows[i & ~by], rows[i | by], mask(low if not i & by else [k + by for k in low]))
                for i in range(16)
            ]
        return rows


# The lower halves of two registers of 8 lanes, and the upper ones.
_QUARTERS = ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])


def mask(places: Value) -> Value:
    """Which lanes a shuffle takes."""
    places = list(places)
    return ir.Constant(ir.VectorType(I32, len(places)), places)


def zeros(kind: Value) -> Value:
    return ir.Constant(kind, None)


def _name(vector: Value) -> str:
    element = "f32" if vector.element == F32 else f"i{vector.element.width}"
    return f"v{vector.count}{element}"


def _bytes(element: Value) -> int:
    return 4 if element == F32 else int(element.width) // 8


@scalar.instruction(types.void, types.int64)
def ask(b: Value, at: Value) -> None:
    """Ask for the line at an address into the second cache."""
    Code(b, types.Array(FP32, 1, "C")).prefetch(at)
