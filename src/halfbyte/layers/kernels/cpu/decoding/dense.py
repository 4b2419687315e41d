"""Rows of plain numbers (a head, LoRA's A) times vectors of fp32.

What: a number of bf16 is widened once for all vectors: that was most of the time of a head. Each vector has one
register of sums, over every 16th (fp32: 8th) number, so its sum is the same to the bit, whatever stands beside it.
"""

from llvmlite import ir

from halfbyte.layers.kernels.cpu.decoding.emit import F32, I16, I32, I64, Code, emitted
from halfbyte.layers.kernels.cpu.scalar import Value

LANES_BF16, LANES_FP32 = 16, 8


@emitted("vectors w x x_row pieces out")
def row_dots(code: Code, args: Value) -> None:
    """A row w times vectors x, `x_row` bytes apart -> out (vectors,). pieces: of LANES numbers each."""
    for size, first in code.ladder(args.vectors):
        _row_dots(code, args, size, code.at(args.x, (args.x_row, first)), code.at(args.out, (first, 4)))


@emitted("w x pieces out")
def row_dot(code: Code, args: Value) -> None:
    """The same for one vector."""
    args.x_row = I64(0)
    _row_dots(code, args, 1, args.x, args.out)


def _row_dots(code: Code, args: Value, vectors: int, x: Value, out: Value) -> None:
    b, lanes = code.b, LANES_BF16 if code.is_bf16 else LANES_FP32
    kind, wide = ir.VectorType(F32, lanes), ir.VectorType(I32, lanes)
    sums = code.variables(kind, vectors)
    with code.rolled(args.pieces) as piece:
        if code.is_bf16:
            half = code.load(code.at(args.w, (piece, 2 * lanes)), ir.VectorType(I16, lanes))
            row = b.bitcast(b.shl(b.zext(half, wide), ir.Constant(wide, [16] * lanes)), kind)
        else:
            row = code.load(code.at(args.w, (piece, 4 * lanes)), kind)
        for m, total in enumerate(sums):
            part = code.load(code.at(x, (args.x_row, m), (piece, 4 * lanes)), kind)
            b.store(code.fma(row, part, b.load(total)), total)
    for m, total in enumerate(sums):
        code.store(code.total(b.load(total)), code.at(out, 4 * m))
