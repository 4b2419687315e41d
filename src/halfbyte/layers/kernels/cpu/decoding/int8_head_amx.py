"""The head in 8 bits by AMX: 16 rows of 64 whole numbers with up to 16 vectors at once.

What: a vector's numbers of 16 bits are upper bytes times 256 plus lower ones, so two products of bytes, each exactly
summed in 32 bits, are its product: the same integers as `int8_head.py` has. Four numbers of a vector lie together, as
AMX reads a right side; neighbours are the same four of other vectors.
Source: TDPBSSD, TDPBSUD in Intel's SDM volume 2.
"""

from llvmlite import ir

from halfbyte.layers.kernels.cpu.decoding.codes_amx import move
from halfbyte.layers.kernels.cpu.decoding.codes_bf16 import ROWS

from halfbyte.layers.kernels.cpu.decoding.emit import (  # isort: skip
    AHEAD_BYTES, BF16, F32X16, I8, I16X32, I32X16, I64, Code, emitted, mask,
)  # fmt: skip
from halfbyte.layers.kernels.cpu.decoding.int8_head import PIECE, finish
from halfbyte.layers.kernels.cpu.scalar import Value
from halfbyte.layers.kernels.cpu.tiles import AMX_LEFT, amx_call

MOST_VECTORS = 16
PIECE_BYTES = 2 * PIECE * MOST_VECTORS  # of vectors in order
_TILE, _LINE = 1024, 64  # bytes
_RIGHT = 5  # an AMX register


@emitted("x x_row vectors pieces out", only=BF16)
def order_integers(code: Code, args: Value) -> None:
    """Pieces of 64 numbers of 16 bits of vectors, `x_row` bytes apart -> a tile of upper bytes and one of lower."""
    b, last = code.b, code.b.sub(args.vectors, I64(1))
    rows = [b.select(b.icmp_signed("<", I64(m), last), I64(m), last) for m in range(MOST_VECTORS)]
    with code.rolled(args.pieces) as n:
        for k, shift in enumerate((8, 0)):
            columns = []
            for row in rows:
                halves = [code.load(code.at(args.x, (row, args.x_row), (n, 2 * PIECE), 64 * i), I16X32) for i in (0, 1)]
                halves = [
                    b.trunc(b.ashr(half, ir.Constant(I16X32, [shift] * 32)), ir.VectorType(I8, 32)) for half in halves
                ]
                columns.append(b.bitcast(b.shuffle_vector(*halves, mask(range(64))), I32X16))
            for i, quads in enumerate(code.turned_16(columns)):
                code.store(quads, code.at(args.out, (n, PIECE_BYTES), _TILE * k + _LINE * i))


@emitted("w pieces vectors x steps scales bounds lengths scratch out out_row ends", only=BF16)
def rows_times_vectors(code: Code, args: Value) -> None:
    """16 rows of 8-bit integers times vectors in the order of `order_integers`; else as `int8_head.rows_times_vectors`.
    scratch: two tiles."""
    b = code.b
    for register in (0, 1):
        amx_call(b, "tilezero", register)
    with code.rolled(args.pieces) as n:
        move(code, "tileloadd64", AMX_LEFT, code.at(args.w, (n, PIECE)), code.at(I64(0), (args.pieces, PIECE)))
        for register, product in enumerate(("tdpbssd", "tdpbsud")):
            move(code, "tileloadd64", _RIGHT, code.at(args.x, (n, PIECE_BYTES), _TILE * register), I64(_LINE))
            amx_call(b, product, register, AMX_LEFT, _RIGHT)
        for k in range(ROWS):
            code.prefetch(code.at(args.w, AHEAD_BYTES + _LINE * k, (n, ROWS * PIECE)))
    for register in (0, 1):
        move(code, "tilestored64", register, code.at(args.scratch, _TILE * register), I64(_LINE))
    rows = []
    for r in range(ROWS):
        upper, lower = (code.load(code.at(args.scratch, _TILE * k + _LINE * r), I32X16) for k in (0, 1))
        rows.append(b.add(b.shl(upper, ir.Constant(I32X16, [8] * 16)), lower))
    there = code.row_mask(I64(ROWS), ROWS)
    scales, bounds = (code.load(at, F32X16) for at in (args.scales, args.bounds))
    for m, sums in enumerate(code.turned_16(rows)):
        with b.if_then(b.icmp_signed("<", I64(m), args.vectors)):
            finish(code, args, sums, I64(m), scales, bounds, there)
