"""The head in 8 bits, for the largest logit alone: the same token, for half or a quarter of the bytes.

Why: a small model's head is over half of what a token reads.
What: each row w of the head is also held as whole numbers q with a scale s and a bound: for any x, the logit by q is
within bound * |x| of the logit by w. One pass over q gives all logits roughly, and what the largest is at least. Rows
that may reach that are multiplied again, as they are; all others are smaller. So the largest logit is the same to the
bit, and the token too. The others are rough: whatever looks at more than the largest takes the whole head.
Source: |(w - s q) x| <= |w - s q| |x| (Cauchy-Schwarz), and the usual bound of a sum's rounding (Higham, "Accuracy and
Stability of Numerical Algorithms", 3.1). The difference w - s q is that of the numbers as they are held.
Cost: a byte a number, and one pass when it is made, once a model; with it a proof, of rows of the head and of noise as
vectors, through the kernels and through torch.
"""

import logging
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from halfbyte.layers.decoding.operands import Int8Head, largest_int16
from halfbyte.layers.decoding.tape import Tape
from halfbyte.system import pages

_log = logging.getLogger(__name__)
_PIECE = 64  # numbers that a row is a multiple of
_CHUNK = 4096  # rows that are widened at once
_EPS = 2.0**-24  # of fp32, to nearest
_PROBES = 15  # vectors of the proof: 8 + 4 + 2 + 1, one of each kernel
_int8_heads: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], Int8Head | None]] = WeakKeyDictionary()


def of(head: nn.Module, dtype: torch.dtype) -> Int8Head | None:
    """The head in 8 bits, made and proven when it is first asked for; None where it is no plain linear layer of rows of
    whole 64 numbers, or where the proof failed, which the log says."""
    weight = getattr(head, "weight", None)
    if (
        type(head) is not nn.Linear
        or not isinstance(weight, Tensor)
        or head.bias is not None
        or weight.dtype != dtype
        or weight.device.type != "cpu"
        or not weight.is_contiguous()
        or weight.shape[1] % _PIECE
    ):
        return None
    key = (weight.data_ptr(), weight._version, dtype)
    known = _int8_heads.get(head)
    if known is None or known[0] != key:
        with torch.no_grad():
            int8_head = rounded(weight.detach())
            fault = fault_of(weight.detach(), int8_head)
        if fault is not None:
            _log.warning("the head is not used in 8 bits: %s", fault)
        _int8_heads[head] = known = key, int8_head if fault is None else None
    return known[1]


def rounded(weight: Tensor) -> Int8Head:
    """Rows (O, D) of bf16 or fp32 in 8 bits, each with a scale of its logit and its bound."""
    o, d = weight.shape
    rows = pages.Arena(o * d).empty((o, d), torch.int8)
    scales, bounds = torch.empty(o), torch.empty(o)
    # Sums of d products over at least 8 lanes, and a few more roundings: scale, comparison, the difference below.
    sums = (d / 8 + 16) * _EPS
    # x is rounded too, each number by at most half of a step, which is |x| / most at the largest.
    also = d**0.5 / (2 * largest_int16(d))
    for first in range(0, o, _CHUNK):
        w, at = weight[first : first + _CHUNK].float(), slice(first, first + _CHUNK)
        s = w.abs().amax(1) / 127
        s = torch.where(s > 0, s, 1.0)
        q = (w / s[:, None]).round_()
        rows[at], scales[at] = q, s
        q *= s[:, None]
        size = w.norm(dim=1) + q.norm(dim=1)
        off = (w - q).norm(dim=1) + also * q.norm(dim=1)
        bounds[at] = (off + 2 * sums * size) * (1 + 4 * d * _EPS)  # the norms are rounded, x's too
    return Int8Head(rows, scales, bounds)


def fault_of(weight: Tensor, head: Int8Head) -> str | None:
    """What the kernels get wrong with these rows, against torch; None where all is within the bounds."""
    o, d = weight.shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((_PROBES, d), generator=generator)
    some = torch.randint(0, o, (_PROBES // 2,), generator=generator)
    x[: len(some)] = weight[some].float() * (d**0.5 / weight[some].float().norm(dim=1, keepdim=True).clamp_min(1e-30))
    return _fault(weight, head, x) or _fault(weight, head, x[:1]) or _fault(weight, head, x[-1:])


def _fault(weight: Tensor, head: Int8Head, x: Tensor) -> str | None:
    """The same for vectors (M, D)."""
    (o, d), m = weight.shape, len(x)
    tape = Tape(weight.dtype, m)
    to, out = tape.vectors(d), tape.buffer(m, o)
    integers = tape.int16_vectors(to, d)
    tape.norm(x, to, None, integers=integers)
    tape.then()
    tape.largest(weight, head, to.plain, integers, out)
    tape.run()
    exact = torch.cat([x @ weight[i : i + _CHUNK].float().T for i in range(0, o, _CHUNK)], 1)
    allowed = head.bounds * x.norm(dim=1)[:, None]
    if not (torch.isfinite(out).all() and ((out - exact).abs() <= allowed).all()):
        worst = ((out - exact).abs() / allowed).max()
        return f"a logit is {float(worst):.3g} times as far off as its bound allows"
    token = out.argmax(1, keepdim=True)
    slack = 4 * d * _EPS * weight[token[:, 0]].float().norm(dim=1) * x.norm(dim=1)
    logit = exact.gather(1, token)[:, 0]
    if not ((out.gather(1, token)[:, 0] - logit).abs() <= slack).all():
        return "the largest logit is not that of the whole head"
    if not (exact.amax(1) - logit <= slack).all():
        return "another token has the largest logit"
    return None
