"""Rows of 4-bit codes times several vectors in bf16: what texts that are written side by side spend their time on.

Why: with eight texts a step no longer waits for memory but for products, so what counts is what stands beside them.
What: the products of `single.py`, the same to the bit for each vector, two rows at a time.
    Codes are looked up once for all vectors, and a register of x is read once for both rows.
    The last blocks of two rows of an odd number of blocks share a register.
    The sums of 16 rows are added up together, vector after vector.
    Codes are asked for past the larger caches, where the texts' keys and values then stay.
Source: VPERMW, VDPBF16PS in Intel's SDM volume 2; the order is ours.
Cost: of eight vectors 80 products for two times 128 weights, 24 instructions beside.
"""

from collections.abc import Callable

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from halfbyte.layers.kernels.cpu.decoding import nibbles, single
from halfbyte.layers.kernels.cpu.decoding.nibbles import Code, Value, mask, zeros
from halfbyte.layers.kernels.cpu.decoding.single import _HALF, _I64, _LANES, _WORDS, ROWS

binding.initialize_native_asmparser()
_SWAPPED = mask([*range(8, 16), *range(8)])
_TWICE, _BOTH, _BELOW = mask([*range(16), *range(16)]), mask(range(32)), mask([*range(8), *range(16, 24)])


def _levels(code: Code, table: Value, words: Value) -> list[Value]:
    """128 codes, a register of them, as four registers of bf16."""
    shifted = [words, *(code.b.lshr(words, ir.Constant(_WORDS, [n] * 32)) for n in (4, 8, 12))]
    return [code.call(nibbles._CALLS["permute"], _WORDS, table, one) for one in shifted]


def _dot(code: Code, levels: list[Value], x: list[Value]) -> Value:
    total = zeros(_LANES)
    for level, part in zip(levels, x, strict=True):
        total = nibbles._dp(code, total, level, part)
    return total


def _onto_two(code: Code, totals: list[Value], levels: list[list[Value]], shares: list[Value], x: Value) -> None:
    """128 weights of two rows times 128 numbers of a vector, at address x, onto the rows' totals.

    As text, since LLVM would load all vectors first, and put the half of its registers into memory.
    """
    # 0, 1 totals; 2, 3 sums; 4 x; 5 .. 8 and 9 .. 12 levels; 13, 14 shares
    lines = [f"vpxord ${n}, ${n}, ${n}" for n in (2, 3)]
    for k in range(4):
        lines += [f"vdpbf16ps {64 * k}($4), ${first + k}, ${to}" for first, to in ((5, 2), (9, 3))]
    lines += [f"vfmadd231ps ${share}, ${dot}, ${total}" for share, dot, total in ((13, 2, 0), (14, 3, 1))]
    inputs = [x, *levels[0], *levels[1], *shares, *(code.b.load(total) for total in totals)]
    kind = ir.FunctionType(ir.LiteralStructType([_LANES] * 4), [one.type for one in inputs])
    names = ",".join(["=&v"] * 4 + ["r"] + ["v"] * 10 + ["0", "1", "~{memory}"])
    made = code.b.asm(kind, "\n".join(lines), names, inputs, side_effect=True)
    for n, total in enumerate(totals):
        code.b.store(code.b.extract_value(made, n), total)


def _chunks(
    code: Code, table: Value, args: dict[str, Value], w: list[Value], scales: list[Value], totals: list[list[Value]]
) -> None:
    """Whole registers of the rows, onto `totals`, one for each row and vector."""
    with code.rolled(args["chunks"]) as c:
        levels, shares = [], []
        for row, scale in zip(w, scales, strict=True):
            place = code.at(row, (c, 64))
            code.prefetch(code.at(place, nibbles._AHEAD_BYTES), once=True)
            levels.append(_levels(code, table, code.load(place, _WORDS)))
            shares.append(single._two_scales(code, code.at(scale, (c, 8))))
        for m in range(len(totals[0])):
            x = code.at(args["x"], (args["x_row"], m), (c, 256))
            _onto_two(code, [total[m] for total in totals], levels, shares, x)


def _last_blocks(
    code: Code, table: Value, args: dict[str, Value], w: list[Value], scales: list[Value], totals: list[list[Value]]
) -> None:
    """The last blocks of two rows, each in a half of one register, onto the lower halves of `totals`."""
    b, c = code.b, args["chunks"]
    halves = [code.load(code.at(row, (c, 64)), _HALF) for row in w]
    levels = _levels(code, table, b.shuffle_vector(*halves, _BOTH))
    shares = [code.every(code.load(code.at(scale, (c, 8)), ir.FloatType()), 16) for scale in scales]
    shares = [b.shuffle_vector(share, zeros(_LANES), _BELOW) for share in shares]
    for m in range(len(totals[0])):
        at = code.at(args["x"], (args["x_row"], m), (c, 256))
        x = [code.load(code.at(at, 64 * k), _HALF) for k in range(4)]
        dot = _dot(code, levels, [b.shuffle_vector(part, part, _TWICE) for part in x])
        for one, share, total in zip((dot, b.shuffle_vector(dot, dot, _SWAPPED)), shares, totals, strict=True):
            b.store(code.fma(one, share, b.load(total[m])), total[m])


def _with_lora(code: Code, args: dict[str, Value], rows: list[Value], totals: list[list[Value]]) -> None:
    """LoRA's B (these rows) times A x of each vector, 16 ranks at a time, onto the lower halves of `totals`."""
    with code.rolled(args["pieces"]) as piece:
        ups = [nibbles._wide(code, code.at(args["up"], (row, args["up_row"]), (piece, 32))) for row in rows]
        for m in range(len(totals[0])):
            h = nibbles._wide(code, code.at(args["h"], (args["h_row"], m), (piece, 32)))
            for up, total in zip(ups, totals, strict=True):
                code.b.store(nibbles._dp(code, code.b.load(total[m]), up, h), total[m])


def _two_rows(code: Code, table: Value, args: dict[str, Value], two: Value, vectors: int) -> None:
    """The sums of rows 2 two and 2 two + 1 to their places in the scratch, by halves; where there is no second one, of
    the first once more."""
    b, first = code.b, code.b.shl(two, _I64(1))
    second = code.at(first, 1)
    there = b.icmp_signed("<", second, args["rows"])
    rows = [first, b.select(there, second, first)]
    totals = [[cgutils.alloca_once(b, _LANES) for _ in range(vectors)] for _ in rows]
    for total in (one for own in totals for one in own):
        b.store(zeros(_LANES), total)
    w = [code.at(args["w"], (row, args["row"])) for row in rows]
    scales = [code.at(args["scales"], (row, args["scale_row"])) for row in rows]
    _chunks(code, table, args, w, scales, totals)
    with b.if_then(b.icmp_signed("!=", b.and_(args["blocks"], _I64(1)), _I64(0))):
        _last_blocks(code, table, args, w, scales, totals)
    _with_lora(code, args, rows, totals)
    for m, both in enumerate(zip(*totals, strict=True)):
        (sums,) = single._halves(code, [b.load(total) for total in both])
        single._store(code, sums, code.at(args["sums"], (two, 64), single.SUMS * m))


def _all_sums(code: Code, at: Value) -> Value:
    """The sums of 16 rows as `_two_rows` has left them."""
    return single._all_sums(code, [code.load(code.at(at, 64 * n), _LANES) for n in range(ROWS // 2)], width=8)


_ARGUMENTS = (
    "w", "rows", "blocks", "x", "x_row", "scales", "table", "up", "up_row", "h", "h_row", "pieces", "sums", "bias",
    "onto", "out", "out_row",
)  # fmt: skip


def _rows_of_16(vectors: int) -> Callable[..., None]:
    """An intrinsic: up to 16 rows of codes times `vectors` vectors -> or onto `out`, in fp32.

    Its arguments: as `single.rows_of_16` has them, and x_row, h_row, out_row: bytes from a vector to the next. sums:
    `vectors` times single.SUMS bytes of scratch.
    """

    @intrinsic
    def rows_of_16(  # type: ignore[no-untyped-def]
        typing_context,
        like,
        w,
        rows,
        blocks,
        x,
        x_row,
        scales,
        table,
        up,
        up_row,
        h,
        h_row,
        pieces,
        sums,
        bias,
        onto,
        out,
        out_row,
    ):
        def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
            if like.dtype != types.uint16 or not single.available(nested=False):
                return context.get_dummy_value()
            code, b, named = Code(builder), builder, dict(zip(_ARGUMENTS, args[1:], strict=True))
            blocks = named["blocks"]
            named |= {"row": b.shl(blocks, _I64(5)), "scale_row": b.shl(blocks, _I64(2))}
            named["chunks"] = b.lshr(blocks, _I64(1))
            table = code.load(named["table"], _WORDS)
            with code.rolled(b.lshr(code.at(named["rows"], 1), _I64(1))) as two:
                _two_rows(code, table, named, two, vectors)
            for m in range(vectors):
                found = _all_sums(code, code.at(named["sums"], single.SUMS * m))
                single._finish(code, found, named, code.at(named["out"], (named["out_row"], m)))
            return context.get_dummy_value()

        return types.void(like, *(len(_ARGUMENTS) * [types.int64])), build

    made: Callable[..., None] = rows_of_16
    return made


rows_of_1, rows_of_2, rows_of_4, rows_of_8 = (_rows_of_16(n) for n in (1, 2, 4, 8))

_OF_EIGHTS = (
    "w", "rows", "wholes", "x", "x_row", "steps", "scales", "bounds", "lengths", "sums", "out", "out_row", "found",
)  # fmt: skip


def _two_eights(code: Code, args: dict[str, Value], two: Value, vectors: int) -> None:
    """`_two_rows` of whole numbers of 8 bits."""
    b, first, row_bytes = code.b, code.b.shl(two, _I64(1)), code.b.shl(args["wholes"], _I64(6))
    second = code.at(first, 1)
    w = [
        code.at(args["w"], (row, row_bytes))
        for row in (first, b.select(b.icmp_signed("<", second, args["rows"]), second, first))
    ]
    totals = [[cgutils.alloca_once(b, single._INTS) for _ in range(vectors)] for _ in w]
    for total in (one for own in totals for one in own):
        b.store(zeros(single._INTS), total)
    with code.rolled(args["wholes"]) as n:
        for row in w:
            code.prefetch(code.at(row, (n, 64), nibbles._AHEAD_BYTES), once=True)
        for k in (0, 1):
            eights = [code.load(code.at(row, (n, 64), 32 * k), ir.VectorType(single._I8, 32)) for row in w]
            numbers = [b.sext(eight, _WORDS) for eight in eights]
            for m in range(vectors):
                x = code.load(code.at(args["x"], (args["x_row"], m), (n, 128), 64 * k), _WORDS)
                for number, own in zip(numbers, totals, strict=True):
                    pairs = code.call("llvm.x86.avx512.pmaddw.d.512", single._INTS, number, x)
                    b.store(b.add(b.load(own[m]), pairs), own[m])
    for row, own in zip((first, second), totals, strict=True):
        for m, total in enumerate(own):
            single._store(code, b.load(total), code.at(args["sums"], (row, 64), single.SUMS * m))


def _eights_of_16(vectors: int) -> Callable[..., None]:
    """An intrinsic: up to 16 rows of whole numbers of 8 bits times `vectors` vectors of whole numbers of 16 -> out.

    Its arguments: like: an array of uint16; of another type nothing is done. Then int64 (addresses, bytes, counts). w,
    rows. wholes: of 64 numbers in a row. x, steps: whole numbers, of how much; x_row, out_row: bytes from a vector to
    the next. scales, bounds: of the rows. lengths: of x. sums: `vectors` times single.SUMS bytes of scratch. found:
    (vectors, 2, 16) fp32, raised to what each number of `out` is at least and at most, as far as those are numbers.
    """

    @intrinsic
    def eights_of_16(  # type: ignore[no-untyped-def]
        typing_context, like, w, rows, wholes, x, x_row, steps, scales, bounds, lengths, sums, out, out_row, found
    ):
        def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
            if like.dtype != types.uint16 or not single.available(nested=False):
                return context.get_dummy_value()
            code, b, named = Code(builder), builder, dict(zip(_OF_EIGHTS, args[1:], strict=True))
            with code.rolled(b.lshr(code.at(named["rows"], 1), _I64(1))) as two:
                _two_eights(code, named, two, vectors)
            there = single._there(code, named["rows"])
            scales, bounds = (single._some(code, named[name], there) for name in ("scales", "bounds"))
            for m in range(vectors):
                at = code.at(named["sums"], single.SUMS * m)
                sums = single._all_sums(code, [code.load(code.at(at, 64 * r), single._INTS) for r in range(ROWS)])
                step, length = (code.load(code.at(named[name], 4 * m), ir.FloatType()) for name in ("steps", "lengths"))
                about = b.fmul(b.fmul(b.sitofp(sums, _LANES), code.every(step, ROWS)), scales)
                single._give(code, about, code.at(named["out"], (named["out_row"], m)), there)
                off = b.fmul(bounds, code.every(length, ROWS))
                for k, end in enumerate((b.fsub(about, off), b.fadd(about, off))):
                    at = code.at(named["found"], 128 * m + 64 * k)
                    before = code.load(at, _LANES)
                    most = code.call("llvm.maxnum.v16f32", _LANES, end, before)
                    single._store(code, b.select(there, most, before), at)
            return context.get_dummy_value()

        return types.void(like, *(len(_OF_EIGHTS) * [types.int64])), build

    made: Callable[..., None] = eights_of_16
    return made


eights_of_1, eights_of_2, eights_of_4, eights_of_8 = (_eights_of_16(n) for n in (1, 2, 4, 8))
