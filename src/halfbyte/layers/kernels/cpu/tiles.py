"""A tile of a matrix product in registers, of bf16 or fp32, for products whose operands already lie in cache.

Why: attention's products are small (a head, a few hundred tokens), and a call of the matmul library for each of them
costs more than its arithmetic; written as one kernel, the scores between two products never leave the cache.
What: C (12, 32) in fp32 = or += A (12, K) B (K, 32) for bf16 operands by AVX512-BF16's dot products of pairs. B lies in
pairs: 32 bits hold rows 2k and 2k + 1 of a column. A's pairs may lie at any distance, so a transposed A costs nothing.
Where the processor has AMX: C (16, 32) of an A whose pairs are neighbours, in steps of 16 pairs.
Source: VDPBF16PS and TDPBF16PS, Intel SDM volume 2; blocking after Goto and van de Geijn, "Anatomy of high-performance
matrix multiplication" (ACM TOMS 2008): 24 of 32 registers accumulate, 2 hold B, A is broadcast from memory.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from halfbyte.layers.kernels.cpu import scalar
from halfbyte.layers.kernels.cpu.scalar import Value, broadcast, call, inlined, instruction

BFloat, has = scalar.BFloat, scalar.has
ROWS, COLUMNS = 12, 32
_I32, _I64 = ir.IntType(32), ir.IntType(64)


def available() -> bool:
    """Whether the processor that numba compiles for multiplies pairs of bf16."""
    return has("avx512bf16")


@inlined
def rows_into(here, x, first, many):  # type: ignore[no-untyped-def]
    """Rows [first, first + many) of x (N, K) -> the beginning of `here`, of a tile's rows; those behind stay."""
    width = x.shape[1]
    for i in range(many):
        for j in range(width):
            here[i * width + j] = x[first + i, j]


def _either_way(builder: Value, add: Value, do: Callable[[bool], None]) -> None:
    """do(True) where `add` is not 0, else do(False)."""
    with builder.if_else(builder.icmp_signed("!=", add, _I64(0))) as (then, otherwise):
        with then:
            do(True)
        with otherwise:
            do(False)


def _tile(rows: int, columns: int, lanes: int, *, pairs: bool) -> Value:
    """A tile of this size, of registers of `lanes` numbers: of pairs of bf16, else of fp32."""
    half, vector = range(columns // lanes), ir.VectorType(ir.FloatType(), lanes)
    places = [(row, column) for row in range(rows) for column in half]
    operands = ir.VectorType(BFloat(), 2 * lanes) if pairs else vector
    multiply = "llvm.x86.avx512bf16.dpbf16ps.512" if pairs else f"llvm.fma.v{lanes}f32"

    @intrinsic
    def tile(typing_context, c, c_row, a, a_row, a_step, b, b_step, steps, add):  # type: ignore[no-untyped-def]
        """C = A B, or C += A B where `add` is not 0, for one tile.

        Args: c, a, b: arrays that begin with the tile; of 32 bits, which hold a pair or a number. c_row, a_row: from a
            row to the next. a_step: from a pair (number) of a row of A to its next. b_step: from a row of (pairs of) B
            to the next. steps: pairs (numbers) that are summed.
        """

        def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
            _, c_row, _, a_row, a_step, _, b_step, steps, add = args
            arrays = (context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 2, 5))
            c, a, b = (builder.ptrtoint(array.data, _I64) for array in arrays)

            def at(start: Value, offset: Value, column: int, kind: Value) -> Value:
                bytes_ = builder.mul(builder.add(offset, _I64(column * lanes)), _I64(4))
                return builder.inttoptr(builder.add(start, bytes_), kind.as_pointer())

            def begin(there: bool) -> None:
                for place in places:
                    zero = ir.Constant(vector, None)
                    builder.store(builder.load(c_at[place], align=4) if there else zero, sums[place])

            def end(there: bool) -> None:
                for place in places:
                    total = builder.load(sums[place])
                    if there:
                        total = builder.fadd(builder.load(c_at[place], align=4), total)
                    builder.store(total, c_at[place], align=4)

            c_at = {(row, column): at(c, builder.mul(c_row, _I64(row)), column, vector) for row, column in places}
            sums = {place: cgutils.alloca_once(builder, vector) for place in places}
            _either_way(builder, add, begin) if pairs else begin(False)
            with cgutils.for_range(builder, steps, intp=_I64) as loop:
                b_row = builder.mul(loop.index, b_step)
                right = [builder.load(at(b, b_row, column, operands), align=4) for column in half]
                for row in range(rows):
                    place = builder.add(builder.mul(loop.index, a_step), builder.mul(a_row, _I64(row)))
                    number = builder.load(at(a, place, 0, _I32 if pairs else ir.FloatType()), align=4)
                    left = builder.bitcast(broadcast(builder, number, lanes), operands)
                    for column in half:
                        total = builder.load(sums[row, column])
                        given = (total, left, right[column]) if pairs else (left, right[column], total)
                        builder.store(call(builder, multiply, vector, *given), sums[row, column])
            # in fp32 what is there is added last: a long sum in parts is then as exact as its parts are short
            end(False) if pairs else _either_way(builder, add, end)
            return context.get_dummy_value()

        n = types.int64
        return types.void(c, n, a, n, n, b, n, n, n), build

    return tile


tile = _tile(ROWS, COLUMNS, 16, pairs=True)
# Where a tile of those sizes would be half idle: for 16 columns, and for 8 or 16 rows.
TALL_ROWS, TALL_COLUMNS = 24, 16
LOW_ROWS = 8
tall_tile, low_tile = _tile(TALL_ROWS, TALL_COLUMNS, 16, pairs=True), _tile(LOW_ROWS, COLUMNS, 16, pairs=True)

AMX_ROWS, AMX_STEPS = 16, 16  # its columns are COLUMNS too
_ASK_FOR_TILES = (158, 0x1023, 18)  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
AMX_LEFT, _SUMS_AND_RIGHT = 4, ((0, 2), (1, 3))  # AMX's registers
AMX_HALF = 6, 7  # of half of the pairs: a left side, and a right one


@cache
def amx() -> bool:
    """Whether the processor has AMX for bf16, and Linux, once asked, lets this process use it."""
    if not (has("amx-bf16") and has("amx-tile") and sys.platform == "linux"):
        return False
    return ctypes.CDLL(None).syscall(*_ASK_FOR_TILES) == 0


def amx_call(builder: Value, name: str, *args: Value) -> None:
    """One of AMX's instructions; its registers are whole numbers of Python's."""
    call(builder, f"llvm.x86.{name}", ir.VoidType(), *(ir.IntType(8)(a) if isinstance(a, int) else a for a in args))


def _lay_out(b: Value, layout: Value, columns: int) -> None:
    """AMX registers of 16 rows: AMX_LEFT and the first of AMX_HALF of 16 pairs and 8, all others of so many columns."""
    byte = ir.IntType(8).as_pointer()

    def put(at: int, bits: int, value: int) -> None:
        place = b.gep(b.bitcast(layout.data, byte), [_I64(at)])
        b.store(ir.IntType(bits)(value), b.bitcast(place, ir.IntType(bits).as_pointer()))

    put(0, 8, 1)  # the palette
    for register in range(8):
        put(16 + 2 * register, 16, {AMX_LEFT: 64, AMX_HALF[0]: 32}.get(register, 4 * columns))
        put(48 + register, 8, AMX_STEPS // 2 if register == AMX_HALF[1] else AMX_ROWS)
    amx_call(b, "ldtilecfg", b.bitcast(layout.data, byte))


@instruction(types.void, None)
def amx_begin(b: Value, layout: Value) -> None:
    """Lay out this thread's AMX registers by 64 zeros, for right sides of 16 columns."""
    _lay_out(b, layout, 16)


@instruction(types.void, None)
def amx_begin_for_one(b: Value, layout: Value) -> None:
    """The same for right sides of one column: what is then stored of sums is one number a row."""
    _lay_out(b, layout, 1)


@instruction(types.void)
def amx_end(b: Value) -> None:
    """Give AMX's registers back: a thread that leaves them laid out is slower to switch to."""
    amx_call(b, "tilerelease")


_WORDS = (None, types.int64)


@instruction(types.void, *_WORDS, *_WORDS, types.int64, *_WORDS, types.int64, types.int64)
def amx_tile(b, c, c_row, a, a_row, a_step, right, b_step, steps, add):  # type: ignore[no-untyped-def]
    """`tile` by AMX, between `amx_begin` and `amx_end`. a_step: 1; steps: a multiple of AMX_STEPS."""
    c_at, a_at, b_at = (b.ptrtoint(x.data, _I64) for x in (c, a, right))
    c_row, a_row, b_row = (b.mul(row, _I64(4)) for row in (c_row, a_row, b_step))
    byte, line = ir.IntType(8).as_pointer(), _I64(4 * AMX_ROWS)

    def move(name: str, register: int, at: Value, row: Value) -> None:
        amx_call(b, name, register, b.inttoptr(at, byte), row)

    ends = list(zip(_SUMS_AND_RIGHT, (c_at, b.add(c_at, line)), strict=True))

    def begin(there: bool) -> None:
        for (register, _), at in ends:
            move("tileloadd64", register, at, c_row) if there else amx_call(b, "tilezero", register)

    _either_way(b, add, begin)
    with cgutils.for_range(b, b.lshr(steps, _I64(4)), intp=_I64) as loop:
        down = b.add(b_at, b.mul(loop.index, b.mul(b_row, _I64(AMX_STEPS))))
        move("tileloadd64", AMX_LEFT, b.add(a_at, b.mul(loop.index, line)), a_row)
        for (total, register), at in zip(_SUMS_AND_RIGHT, (down, b.add(down, line)), strict=True):
            move("tileloadd64", register, at, b_row)
            amx_call(b, "tdpbf16ps", total, AMX_LEFT, register)
    for (register, _), at in ends:
        move("tilestored64", register, at, c_row)


# Of an fp32 tile: numbers in a register, rows; two registers are columns. Accumulators fill the registers but for those
# that hold B and a number of A: 24 of 32 (AVX-512), 12 of 16.
LANES32 = 16 if has("avx512f") else 8
ROWS32, COLUMNS32 = 12 if LANES32 == 16 else 6, 2 * LANES32
tile32 = _tile(ROWS32, COLUMNS32, LANES32, pairs=False)
row32 = _tile(1, COLUMNS32, LANES32, pairs=False)  # of one row


def available32() -> bool:
    """Whether the processor multiplies and adds fp32 vectors of these sizes in one instruction."""
    return has("avx2") and has("fma")
