"""A tile of a bf16 matrix product in registers, for products whose operands already lie in cache.

Why: attention's products are small (a head, a few hundred tokens), and a call of the matmul library for each of them
costs more than its arithmetic; written as one kernel, the scores between two products never leave the cache.
What: C (12, 32) in fp32 = or += A (12, K) B (K, 32) for bf16 operands by AVX512-BF16's dot products of pairs. B lies in
pairs: 32 bits hold rows 2k and 2k + 1 of a column. A's pairs may lie at any distance, so a transposed A costs nothing.
Source: VDPBF16PS, Intel SDM volume 2; blocking after Goto and van de Geijn, "Anatomy of high-performance matrix
multiplication" (ACM TOMS 2008): 24 of 32 registers accumulate, 2 hold B, A is broadcast from memory.
"""

from collections.abc import Sequence
from functools import cache

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from halfbyte.layers.kernels.cpu.scalar import Value, broadcast, call, inlined

ROWS, COLUMNS = 12, 32
_LANES = 16
_I32, _I64 = ir.IntType(32), ir.IntType(64)


class BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


_FLOATS = ir.VectorType(ir.FloatType(), _LANES)
_PAIRS = ir.VectorType(BFloat(), 2 * _LANES)
_WORDS = ir.VectorType(_I32, _LANES)


def available() -> bool:
    """Whether the processor that numba compiles for multiplies pairs of bf16."""
    return has("avx512bf16")


@cache
def has(feature: str) -> bool:
    """Whether the processor that numba compiles for has instructions of this name of LLVM's."""
    asked = config.CPU_FEATURES
    if asked is not None:
        return f"+{feature}" in asked.split(",")
    return bool(binding.get_host_cpu_features().get(feature, False))


@inlined
def rows_into(here, x, first, many):  # type: ignore[no-untyped-def]
    """Rows [first, first + many) of x (N, K) -> the beginning of `here`, of a tile's rows; those behind stay."""
    width = x.shape[1]
    for i in range(many):
        for j in range(width):
            here[i * width + j] = x[first + i, j]


def _addresses(context: Value, builder: Value, signature: Value, args: Sequence[Value]) -> tuple[Value, ...]:
    """Of c, a and b, which begin with a tile."""
    arrays = (context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 2, 5))
    return tuple(builder.ptrtoint(array.data, _I64) for array in arrays)


def _tile(rows: int, columns: int) -> Value:
    """`tile` for tiles of this size: as many accumulators as rows times registers of columns, at most 24."""

    @intrinsic
    def tile(typing_context, c, c_row, a, a_row, a_step, b, b_step, steps, add):  # type: ignore[no-untyped-def]
        """C = A B, or C += A B where `add` is not 0, for one tile.

        Args: c, a, b: arrays that begin with the tile. c_row: floats from a row of C to the next. a_row, a_step: pairs
            from a row of A to the next and from a pair of a row to its next. b_step: pairs from a row of pairs of B to
            the next. steps: pairs.
        """

        def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
            _, c_row, _, a_row, a_step, _, b_step, steps, add = args
            c, a, b = _addresses(context, builder, signature, args)
            half = range(columns // _LANES)

            def read(at: Value, kind: Value) -> Value:
                return builder.load(builder.inttoptr(at, kind.as_pointer()), align=4)

            def c_at(row: int, column: int) -> Value:
                offset = builder.add(builder.mul(c_row, _I64(row)), _I64(column * _LANES))
                return builder.inttoptr(builder.add(c, builder.mul(offset, _I64(4))), _FLOATS.as_pointer())

            places = [(row, column) for row in range(rows) for column in half]
            sums = [[cgutils.alloca_once(builder, _FLOATS) for _ in half] for _ in range(rows)]
            with builder.if_else(builder.icmp_signed("!=", add, _I64(0))) as (then, otherwise):
                with then:
                    for row, column in places:
                        builder.store(builder.load(c_at(row, column), align=4), sums[row][column])
                with otherwise:
                    for row, column in places:
                        builder.store(ir.Constant(_FLOATS, None), sums[row][column])
            with cgutils.for_range(builder, steps, intp=_I64) as loop:
                b_now = builder.add(b, builder.mul(builder.mul(loop.index, b_step), _I64(4)))
                right = [
                    builder.bitcast(read(builder.add(b_now, _I64(column * _LANES * 4)), _WORDS), _PAIRS)
                    for column in half
                ]
                a_now = builder.add(a, builder.mul(builder.mul(loop.index, a_step), _I64(4)))
                for row in range(rows):
                    pair = read(builder.add(a_now, builder.mul(builder.mul(a_row, _I64(row)), _I64(4))), _I32)
                    left = builder.bitcast(broadcast(builder, pair, _LANES), _PAIRS)
                    for column in half:
                        total = builder.load(sums[row][column])
                        total = call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, total, left, right[column])
                        builder.store(total, sums[row][column])
            for row, column in places:
                builder.store(builder.load(sums[row][column]), c_at(row, column), align=4)
            return context.get_dummy_value()

        n = types.int64
        return types.void(c, n, a, n, n, b, n, n, n), build

    return tile


tile = _tile(ROWS, COLUMNS)
# Where a tile of those sizes would be half idle: for 16 columns, and for 8 or 16 rows.
TALL_ROWS, TALL_COLUMNS = 24, 16
LOW_ROWS = 8
tall_tile, low_tile = _tile(TALL_ROWS, TALL_COLUMNS), _tile(LOW_ROWS, COLUMNS)


# Of an fp32 tile: numbers in a register, rows; two registers are columns. Accumulators fill the registers but for those
# that hold B and a number of A: 24 of 32 (AVX-512), 12 of 16.
LANES32 = 16 if has("avx512f") else 8
ROWS32, COLUMNS32 = 12 if LANES32 == 16 else 6, 2 * LANES32


def available32() -> bool:
    """Whether the processor multiplies and adds fp32 vectors of these sizes in one instruction."""
    return has("avx2") and has("fma")


@intrinsic
def tile32(typing_context, c, c_row, a, a_row, a_step, b, b_step, steps, add):  # type: ignore[no-untyped-def]
    """C = A B, or C += A B where `add` is not 0, for one tile of fp32: (ROWS32, COLUMNS32).

    Args: as `tile`, in numbers instead of pairs.
    """

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, c_row, _, a_row, a_step, _, b_step, steps, add = args
        vector, half = ir.VectorType(ir.FloatType(), LANES32), range(2)
        c, a, b = _addresses(context, builder, signature, args)

        def at(start: ir.Value, numbers: ir.Value, column: int, kind: ir.Type = vector) -> ir.Value:
            bytes_ = builder.mul(builder.add(numbers, _I64(column * LANES32)), _I64(4))
            return builder.inttoptr(builder.add(start, bytes_), kind.as_pointer())

        c_at = [[at(c, builder.mul(c_row, _I64(row)), column) for column in half] for row in range(ROWS32)]
        sums = [[cgutils.alloca_once(builder, vector) for _ in half] for _ in range(ROWS32)]
        for row in range(ROWS32):
            for column in half:
                builder.store(ir.Constant(vector, None), sums[row][column])
        with cgutils.for_range(builder, steps, intp=_I64) as loop:
            right = [builder.load(at(b, builder.mul(loop.index, b_step), column), align=4) for column in half]
            for row in range(ROWS32):
                place = builder.add(builder.mul(loop.index, a_step), builder.mul(a_row, _I64(row)))
                number = builder.load(at(a, place, 0, ir.FloatType()), align=4)
                left = broadcast(builder, number, LANES32)
                for column in half:
                    total = builder.load(sums[row][column])
                    total = call(builder, f"llvm.fma.v{LANES32}f32", vector, left, right[column], total)
                    builder.store(total, sums[row][column])
        # what is there is added last: a long sum in parts is then as exact as its parts are short
        with builder.if_else(builder.icmp_signed("!=", add, _I64(0))) as (then, otherwise):
            for branch, more in ((then, True), (otherwise, False)):
                with branch:
                    for row in range(ROWS32):
                        for column in half:
                            total = builder.load(sums[row][column])
                            if more:
                                total = builder.fadd(builder.load(c_at[row][column], align=4), total)
                            builder.store(total, c_at[row][column], align=4)
        return context.get_dummy_value()

    n = types.int64
    return types.void(c, n, a, n, n, b, n, n, n), build
