"""Dot products of a row of plain numbers with a few vectors, in registers: an unquantised head, LoRA's A.

Why: a head of bf16 is read from memory once; for several vectors most of its time went into widening each number once
for each of them. Here a piece of the row is widened once, and multiplied with up to eight vectors.
What: each vector has one register of sums, over every 16th (avx2: 8th) number; so its sum is the same to the bit,
whatever stands beside it.
Cost: for eight vectors about three times the time of one, where one is bound by memory.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from halfbyte.layers.kernels.cpu.nibbles import Code, zeros

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
LANES_BF16, LANES_FP32 = 16, 8


def _dots(vectors: int) -> Callable[..., None]:
    """An intrinsic: a row times `vectors` vectors of fp32 -> out (vectors,) in fp32.

    Its arguments: like: an array of uint16 (a row of bf16) or of float32. Then int64. w: the row. x, x_row: bytes from
    one vector to the next. pieces: of LANES numbers each. out.
    """

    @intrinsic
    def row_dots(typing_context, like, w, x, x_row, pieces, out):  # type: ignore[no-untyped-def]
        is_bf16 = like.dtype == types.uint16
        lanes = LANES_BF16 if is_bf16 else LANES_FP32

        def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
            code, (w, x, x_row, pieces, out) = Code(builder), args[1:]
            kind, half = ir.VectorType(_F32, lanes), ir.VectorType(_I16, lanes)
            sums = [cgutils.alloca_once_value(builder, zeros(kind)) for _ in range(vectors)]
            for one in sums:
                builder.store(zeros(kind), one)
            with code.rolled(pieces) as piece:
                if is_bf16:
                    wide = builder.zext(code.load(code.at(w, (piece, 2 * lanes)), half), ir.VectorType(_I32, lanes))
                    upper = ir.Constant(ir.VectorType(_I32, lanes), [16] * lanes)
                    row = builder.bitcast(builder.shl(wide, upper), kind)
                else:
                    row = code.load(code.at(w, (piece, 4 * lanes)), kind)
                for m, total in enumerate(sums):
                    part = code.load(code.at(x, (x_row, m), (piece, 4 * lanes)), kind)
                    builder.store(code.fma(row, part, builder.load(total)), total)
            for m, total in enumerate(sums):
                to = builder.inttoptr(code.at(out, 4 * m), _F32.as_pointer())
                builder.store(code.total(builder.load(total)), to)
            return context.get_dummy_value()

        return types.void(like, *(5 * [types.int64])), build

    made: Callable[..., None] = row_dots
    return made


dots_of_1, dots_of_2, dots_of_4, dots_of_8 = (_dots(n) for n in (1, 2, 4, 8))
