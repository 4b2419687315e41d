"""Attention over packed examples on a CPU, causal or to both sides, with rotary: one kernel of our own, or torch's
flash forward and a backward of matrix products.

Why: torch's flash attention for CPUs runs its backward at a tenth of the matmul's rate (SmolLM2 on GSM8K: a fifth of a
step), and rotary in plain torch makes some twenty passes over q and k.
What: q and k are rotated while they are copied into blocks of heads (`kernels/cpu/scores.py`). All else is one kernel
(`kernels/cpu/attention/`) in fp32 with AVX2, and in bf16 with AVX512-BF16. Elsewhere (on ARM) forward is torch's flash
kernel, whose log-sum-exp is kept; backward computes scores and dP in fp32 by batched matmul, turns both into P and dS
in one pass, and gets dq, dk, dv from three more matmuls in the compute dtype. Query heads of one key head are rows of
one matrix, so nothing is repeated. Long examples go in blocks of rows that see only the columns before them.
Source: FlashAttention-2, arXiv:2307.08691, section 3.1 (the backward's formulas).
Cost: q, k, v, the output and one fp32 a head and token are kept; 5 matmuls of L x L x D in backward.

Letters: T tokens, H query heads, K key heads, G = H / K, D head size, R rotated part, L tokens in an example, n
examples of one length.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from halfbyte.layers.kernels import CAUSAL, pool
from halfbyte.layers.kernels.cpu import available, enabled, whole_attention
from halfbyte.layers.kernels.dropout import ScoreTerms, TokenSeed
from halfbyte.models import structure

if TYPE_CHECKING:
    from halfbyte.layers.kernels.cpu.attention.tasks import Attention, Segments

ROWS = 512  # rows of queries whose scores are computed at once in the backward of a long example
SCORES_BYTES = 24_000_000  # fp32 scores at once; as many again for dP


@dataclass(frozen=True, eq=False)
class HeadBlocks:
    """Where each token of a pack goes. `runs` are (first token, n, L) for neighbours of equal length. The blocks of an
    example, or of a segment of a tree, begin at row H * start of H * T rows, head after head, L rows each."""

    lengths: tuple[int, ...]
    levels: tuple[int, ...]
    runs: tuple[tuple[int, int, int], ...]
    start: Tensor  # (T,) int64: tokens before the example of token t
    length: Tensor  # (T,) int64: tokens of its example

    @cached_property
    def tree(self) -> "Segments":
        from halfbyte.layers.kernels.cpu.attention.tasks import Segments

        return Segments.of(self.lengths, self.levels)


@lru_cache(maxsize=16)
def blocks_of(lengths: tuple[int, ...], levels: tuple[int, ...] = ()) -> HeadBlocks:
    runs, first = [], 0
    for length, same in groupby(lengths):
        n = sum(1 for _ in same)
        runs.append((first, n, length))
        first += n * length
    sizes = torch.tensor(lengths)
    start = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    return HeadBlocks(lengths, levels, tuple(runs), start, torch.repeat_interleave(sizes, sizes))


@contextmanager
def in_two_pieces(lengths: Sequence[int], levels: Sequence[int]) -> Iterator[None]:
    """While it lasts a tree's first family is cut behind half of what follows its root, as large families are
    (`Segments`); one in a proof is small."""
    if not enabled():
        yield
        return
    from halfbyte.layers.kernels.cpu.attention import tasks

    end = next((n for n, level in enumerate(levels) if n and level == 0), len(levels))
    branches = [n for n in range(end) if levels[n] == 1] or [end]
    half = branches[len(branches) // 2] if len(branches) > 1 else end
    blocks_of.cache_clear()
    try:
        with structure.replaced((tasks, "ROOT_SHARE", sum(lengths[1:half]) / lengths[0])):
            yield
    finally:
        blocks_of.cache_clear()


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these (T, heads, D) tensors can go this way."""
    same = q.dtype == k.dtype == v.dtype and q.shape[2] == k.shape[2] == v.shape[2]
    return available(q) and same and q.shape[2] % 2 == 0 and q.shape[1] % k.shape[1] == 0


def attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, cos: Tensor | None, sin: Tensor | None,
    levels: tuple[int, ...] = (), slopes: Tensor | None = None, p: float = 0.0, seed: TokenSeed | None = None,
    reach: tuple[int, int] = CAUSAL,
) -> Tensor:  # fmt: skip
    """Attention of each example to itself, or of each segment of a tree to its path (`kernels.card.PackLengths`;
    only where `whole_attention` is one kernel).

    Args:
        q: (T, H, D). k, v: (T, K, D). lengths: of the examples or segments; they sum to T.
        cos, sin: (T, R), rotary tables for q and k; None for none.
        levels: how many segments each follows; none where nothing is shared.
        slopes: (H,), ALiBi's. p, seed: dropout of chances. reach: how many tokens before and after itself a token sees.
            All but a causal mask of these only where `whole_attention` says so.

    Returns:
        (T, H, D).
    """
    if cos is None or sin is None:
        cos = sin = q.new_empty((q.shape[0], 0))
    rotary = cos.to(q.dtype).contiguous(), sin.to(q.dtype).contiguous()
    terms = ScoreTerms(slopes, p, seed)
    return BlockAttention.apply(q, k, v, *rotary, blocks_of(lengths, levels), scale, terms, reach)


class BlockAttention(torch.autograd.Function):
    """`attention` above; keeps the rotated blocks, the output and the log-sum-exp."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, blocks: HeadBlocks, scale: float,
        terms: ScoreTerms, reach: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        none = cos[:, :0]
        qb, kb = _to_blocks(q, cos, sin, blocks), _to_blocks(k, cos, sin, blocks)
        vb = _to_blocks(v, none, none, blocks)
        if whole_attention(q):
            out, lse = _kernels(q).forward(qb, kb, vb, blocks.tree, scale, terms, reach)
        else:
            out, lse = _forward_by_torch(qb, kb, vb, blocks, scale)
        ctx.blocks, ctx.scale = blocks, scale
        ctx.terms, ctx.reach = terms, reach
        ctx.save_for_backward(qb, kb, vb, out, lse, cos, sin)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from halfbyte.layers.kernels.cpu import scores as kernels

        qb, kb, vb, out, lse, cos, sin = ctx.saved_tensors
        blocks, none = ctx.blocks, cos[:, :0]
        dout = grads[0].contiguous()
        if whole_attention(out):
            given = qb, kb, vb, out, dout, lse, blocks.tree, ctx.scale, ctx.terms, ctx.reach
            dqb, dkb, dvb = _kernels(out).backward(*given)
        else:
            dob = _to_blocks(dout, none, none, blocks)
            delta = kernels.row_dots(dout, out, blocks.start, blocks.length)
            dqb, dkb, dvb = _backward_by_matmul(qb, kb, vb, dob, lse, delta, blocks, ctx.scale)
        dq = kernels.from_blocks(dqb, cos, sin, blocks.start, blocks.length)
        dk = kernels.from_blocks(dkb, cos, sin, blocks.start, blocks.length)
        dv = kernels.from_blocks(dvb, none, none, blocks.start, blocks.length)
        return dq, dk, dv, None, None, None, None, None, None


def _kernels(x: Tensor) -> "Attention":
    """The kernels for all of attention in x's dtype; compiled when they are first asked for."""
    if x.dtype == torch.bfloat16:
        from halfbyte.layers.kernels.cpu.attention import bf16

        return bf16.KERNELS
    from halfbyte.layers.kernels.cpu.attention import fp32

    return fp32.KERNELS


def _forward_by_torch(qb: Tensor, kb: Tensor, vb: Tensor, blocks: HeadBlocks, scale: float) -> tuple[Tensor, Tensor]:
    """The output (T, H, D) by tokens, and the log-sum-exp in blocks of (H, L), fp32."""
    tokens, heads, d = qb.shape
    groups = heads // kb.shape[1]
    out = pool.empty_like(qb)
    lse = torch.empty(tokens * heads, dtype=torch.float32)
    for first, n, length in blocks.runs:
        q, k, v = (_run(x, first, n, length) for x in (qb, kb, vb))  # (n, heads, L, D)
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        o, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        hidden = sums == 0  # what its AVX2 form gives for a query of NaN, with zeros as output
        if hidden.any():
            o.masked_fill_((hidden & ~q.isfinite().all(-1))[..., None], torch.nan)
        last = first + n * length
        out[first:last].view(n, length, heads, d).copy_(o.transpose(1, 2))
        lse[first * heads : last * heads].view(n, heads, length).copy_(sums)
    return out, lse


def _backward_by_matmul(
    qb: Tensor, kb: Tensor, vb: Tensor, dob: Tensor, lse: Tensor, delta: Tensor, blocks: HeadBlocks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the blocks by batched products, scores in memory."""
    heads = qb.shape[1]
    dqb, dkb, dvb = (pool.empty_like(x) for x in (qb, kb, vb))
    for first, n, length in blocks.runs:
        step = max(1, SCORES_BYTES // (heads * length * length * 4))  # examples at once
        for a in range(0, n, step):
            begin, count = first + a * length, min(step, n - a)
            parts = [_run(x, begin, count, length) for x in (qb, kb, vb, dob, dqb, dkb, dvb)]
            rows = slice(begin * heads, (begin + count * length) * heads)
            sums = lse[rows].view(count, heads, length), delta[rows].view(count, heads, length)
            _example_backward(parts, sums, scale)
    return dqb, dkb, dvb


def _example_backward(parts: list[Tensor], sums: tuple[Tensor, Tensor], scale: float) -> None:
    """Gradients of n examples of one length. `parts`: q, k, v, the output's gradient, and dq, dk, dv to be filled; each
    (n, its heads, L, D). `sums`: log-sum-exp and the rows' dots of output and gradient, (n, H, L)."""
    from halfbyte.layers.kernels.cpu import scores as kernels

    q, k, v, do, dq, dk, dv = parts
    n, heads, length, d = q.shape
    key_heads = k.shape[1]
    m, groups = n * key_heads, heads // key_heads
    k, v, dk, dv = (x.view(m, length, d) for x in (k, v, dk, dv))
    k32, v32 = k.float(), v.float()
    for r0 in range(0, length, ROWS):
        r1 = min(length, r0 + ROWS)
        tall = r1 - r0
        # query heads of one key head are rows of one matrix: (m, G * rows, D)
        q1, do1 = (x.view(m, groups, length, d)[:, :, r0:r1].reshape(m, groups * tall, d) for x in (q, do))
        lse, delta = (x.view(m, groups, length)[:, :, r0:r1].reshape(-1) for x in sums)
        s = torch.bmm(q1.float(), k32[:, :r1].transpose(1, 2))  # (m, G rows, r1) fp32
        dp = torch.bmm(do1.float(), v32[:, :r1].transpose(1, 2))
        wide = s.view(-1, r1), dp.view(-1, r1)
        p, ds = kernels.softmax_backward(*wide, lse, delta, q.dtype, scale=scale, offset=r0, tall=tall)
        p, ds = p.view(s.shape), ds.view(s.shape)
        dq1 = torch.bmm(ds, k[:, :r1])  # (m, G rows, D)
        dq.view(m, groups, length, d)[:, :, r0:r1] = dq1.view(m, groups, tall, d)
        if tall == length:
            torch.bmm(p.transpose(1, 2), do1, out=dv)
            torch.bmm(ds.transpose(1, 2), q1, out=dk)
            continue
        if r0 == 0:
            dv.zero_()
            dk.zero_()
        dv[:, :r1].baddbmm_(p.transpose(1, 2), do1)
        dk[:, :r1].baddbmm_(ds.transpose(1, 2), q1)


def _to_blocks(x: Tensor, cos: Tensor, sin: Tensor, blocks: HeadBlocks) -> Tensor:
    """(T, heads, D) -> the same number of elements in blocks, seen as (T, heads, D)."""
    from halfbyte.layers.kernels.cpu import scores as kernels

    return kernels.to_blocks(x if x.stride(2) == 1 else x.contiguous(), cos, sin, blocks.start, blocks.length)


def _run(x: Tensor, first: int, n: int, length: int) -> Tensor:
    """The blocks of n examples of one length from token `first` on: (n, heads, L, D)."""
    heads, d = x.shape[1:]
    return x.view(-1)[first * heads * d :][: n * length * heads * d].view(n, heads, length, d)
