"""Every compiled kernel against its formula in fp64: odd sizes, one row, one element, both dtypes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.layers import norm_gate
from halfbyte.layers.kernels import cpu, dropout
from halfbyte.layers.kernels.cpu import entropy, gate, norm, scores

pytestmark = pytest.mark.skipif(not cpu.enabled(), reason="numba does not work here")
# ||got - wanted|| / ||wanted||: a bf16 result is rounded once.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float32: 2e-6}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
SIZES = pytest.mark.parametrize(("n", "d"), [(5, 123), (1, 576), (123, 5), (1, 1), (257, 64)])


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


@DTYPES
@SIZES
@pytest.mark.parametrize("one_plus", [False, True])
def test_rms_norm(n: int, d: int, dtype: torch.dtype, one_plus: bool) -> None:
    x, w, dy = draw(n, d, dtype=dtype), draw(d, dtype=dtype, seed=1), draw(n, d, dtype=dtype, seed=2)
    y, rstd, _ = norm.norm(x, w, 1e-5, one_plus=one_plus)
    dx = norm.norm_backward(dy, x, w, rstd, one_plus=one_plus)
    x64 = x.double().requires_grad_()
    factor = w.double() + 1 if one_plus else w.double()
    wanted = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-5) * factor
    wanted.backward(dy.double())
    assert x64.grad is not None
    assert off(y, wanted.detach()) < 2 * TOLERANCE[dtype]  # llama rounds before it multiplies
    assert off(rstd, torch.rsqrt(x64.detach().square().mean(-1) + 1e-5)) < 1e-6
    if d > 1:  # of one number the norm is its sign, and the gradient noise
        assert off(dx, x64.grad) < TOLERANCE[dtype]


@DTYPES
@SIZES
@pytest.mark.parametrize(("one_plus", "biased"), [(False, True), (True, True), (False, False)])
def test_layer_norm(n: int, d: int, dtype: torch.dtype, one_plus: bool, biased: bool) -> None:
    x, w, dy = draw(n, d, dtype=dtype) + 3, draw(d, dtype=dtype, seed=1), draw(n, d, dtype=dtype, seed=2)
    b = draw(d, dtype=dtype, seed=3) if biased else None
    y, rstd, mean = norm.norm(x, w, 1e-5, one_plus=one_plus, centred=True, bias=b)
    beside = draw(n, d, dtype=dtype, seed=4)
    dx = norm.norm_backward(dy, x, w, rstd, mean, one_plus=one_plus, beside=beside)
    x64 = x.double().requires_grad_()
    wanted = F.layer_norm(x64, (d,), w.double() + one_plus, None if b is None else b.double(), 1e-5)
    wanted.backward(dy.double())
    assert x64.grad is not None
    if d > 1:  # of one number there is nothing left but the bias
        assert off(y, wanted.detach()) < 2 * TOLERANCE[dtype]
        assert off(dx, x64.grad + beside.double()) < 2 * TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("kind", range(4))
def test_activation(dtype: torch.dtype, kind: int) -> None:
    x, dy = 3 * draw(37, 65, dtype=dtype), draw(37, 65, dtype=dtype, seed=1)
    given = x.clone().requires_grad_()
    y = norm_gate.activation(given, kind)
    y.backward(dy)
    x64 = x.double().requires_grad_()
    wanted = norm_gate.activation_formula(x64, kind)
    wanted.backward(dy.double())
    assert given.grad is not None and x64.grad is not None
    assert off(y.detach(), wanted.detach()) < TOLERANCE[dtype]
    assert off(given.grad, x64.grad) < 2 * TOLERANCE[dtype]


def test_a_models_own_dropout_is_the_mask_by_its_definition_both_ways() -> None:
    seed = dropout.TokenSeed(torch.arange(50, dtype=torch.int32) * 77, 5)
    x = draw(50, 64).requires_grad_()
    y = norm_gate.Dropout.apply(x, 0.25, seed)
    keep = dropout.keep_mask(seed, (50, 64), 0.25, torch.device("cpu"))
    assert torch.equal(y.detach(), torch.where(keep, x.detach() * (1 / 0.75), 0.0))
    y.backward(torch.ones(50, 64))
    assert torch.equal(x.grad, torch.where(keep, torch.full((50, 64), 1 / 0.75), 0.0))


@DTYPES
@SIZES
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["silu", "gelu by tanh", "gelu"])
def test_gated_activation(n: int, d: int, dtype: torch.dtype, kind: int) -> None:
    g, u, dh = draw(n, d, dtype=dtype), draw(n, d, dtype=dtype, seed=1), draw(n, d, dtype=dtype, seed=2)
    g = g * 4
    for scale in (1.0, 0.7):
        apart, both = [x.clone().requires_grad_() for x in (g, u)], torch.cat((g, u), 1).requires_grad_()
        h, of_both = norm_gate.glu(apart, kind, scale), norm_gate.glu([both], kind, scale)
        h.backward(dh)
        of_both.backward(dh)
        g64, u64 = g.double().requires_grad_(), u.double().requires_grad_()
        how = "none" if kind == 2 else "tanh"
        wanted = (F.silu(scale * g64) if kind == 0 else F.gelu(scale * g64, approximate=how)) * u64
        wanted.backward(dh.double())
        for got, want in (
            (h.detach(), wanted.detach()),
            *zip((x.grad for x in apart), (g64.grad, u64.grad), strict=True),
        ):
            assert off(got, want) < TOLERANCE[dtype]
        assert torch.equal(of_both, h) and torch.equal(both.grad, torch.cat([x.grad for x in apart], 1))


def test_an_activation_of_extreme_numbers() -> None:
    g = torch.tensor([-1e4, -88.0, 0.0, 88.0, 1e4, float("inf"), float("nan")])
    h = gate.glu(g[None], torch.ones_like(g)[None], 0)[0]
    assert torch.equal(h[:5].abs() < 1e-20, torch.tensor([True, True, True, False, False]))
    assert h[3:5].tolist() == [88.0, 1e4]
    assert not h[5:].isfinite().any()


@DTYPES
def test_dropout_keeps_its_share_and_repeats(dtype: torch.dtype) -> None:
    x, p = torch.ones(400, 500, dtype=dtype), 0.1
    first, again, other = (torch.empty_like(x) for _ in range(3))
    gate.drop(x, first, p, 7)
    gate.drop(x, again, p, 7)
    gate.drop(x, other, p, 8)
    kept = float(first.float().mean())
    assert abs(kept - (1 - p)) < 5 * math.sqrt(p * (1 - p) / x.numel())
    assert torch.equal(first, again)
    both = float(((first == 0) & (other == 0)).float().mean())  # two seeds drop as if they knew nothing of each other
    assert abs(both - p * p) < 5 * math.sqrt(p * p / x.numel())
    for shift in (1, 2, 500):  # nor do neighbours
        a = (first.flatten()[shift:] == 0) & (first.flatten()[:-shift] == 0)
        assert abs(float(a.float().mean()) - p * p) < 5 * math.sqrt(p * p / x.numel())


@DTYPES
def test_dropout_in_place_is_the_same(dtype: torch.dtype) -> None:
    x = draw(7, 44, dtype=dtype)
    out = torch.empty_like(x)
    gate.drop(x, out, 0.3, 5)
    gate.drop(x, x, 0.3, 5)
    assert torch.equal(x, out) and (x == 0).any()


@DTYPES
@pytest.mark.parametrize(("k", "v"), [(5, 123), (1, 50000), (3, 1)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(k: int, v: int, dtype: torch.dtype, smoothing: float) -> None:
    logits = draw(k, v, dtype=dtype) * 5
    targets = torch.randint(v, (k,), generator=torch.Generator().manual_seed(0))
    z = logits.double().requires_grad_()
    wanted = F.cross_entropy(z, targets, reduction="none", label_smoothing=smoothing)
    wanted.sum().backward()
    given = logits.clone()
    entropy.cross_entropy_(given, targets, smoothing=smoothing, gradient=False)
    assert torch.equal(given, logits)
    losses = entropy.cross_entropy_(given, targets, smoothing=smoothing, gradient=True)
    assert z.grad is not None
    assert off(losses, wanted.detach()) < 1e-5 or float(wanted.detach().norm()) < 1e-9
    assert float((given.double() - z.grad).norm()) < TOLERANCE[dtype] * max(float(z.grad.norm()), 1e-3)


@DTYPES
@pytest.mark.parametrize("place", [3, 2047, 2048, 4999])  # sums are made in parts of 2048
def test_a_loss_that_is_not_finite_shows(place: int, dtype: torch.dtype) -> None:
    logits = torch.full((5, 5000), -2.0, dtype=dtype)
    for row, value in enumerate((math.nan, -math.nan, math.inf)):
        logits[row, place] = value
    logits[3, place] = -math.inf  # a logit that is none leaves the others
    losses = entropy.cross_entropy_(logits, torch.ones(5, dtype=torch.int64), smoothing=0.0, gradient=True)
    assert losses.isfinite().tolist() == [False, False, False, True, True]
    assert losses[3:].tolist() == pytest.approx([math.log(4999), math.log(5000)], rel=1e-6)


def blocks(x: Tensor, lengths: list[int]) -> Tensor:
    """(T, heads, D) by tokens -> the same by examples and heads, by slicing."""
    return torch.cat([part.transpose(0, 1).reshape(-1) for part in x.split(lengths)])


@DTYPES
@pytest.mark.parametrize("rotated", [0, 8, 16])
def test_blocks_and_back_are_rotary_and_its_inverse(dtype: torch.dtype, rotated: int) -> None:
    lengths, heads, d = [5, 1, 12], 3, 16
    total = sum(lengths)
    x = draw(total, heads, d, dtype=dtype)
    angles = draw(total, rotated // 2, seed=3).double().repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    sizes = torch.tensor(lengths)
    start = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    length = torch.repeat_interleave(sizes, sizes)
    out = scores.to_blocks(x, cos, sin, start, length)
    turned, rest = x.double()[..., :rotated], x.double()[..., rotated:]
    half = rotated // 2
    other = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    wanted = torch.cat([turned * cos.double()[:, None] + other * sin.double()[:, None], rest], -1)
    assert off(out.flatten(), blocks(wanted, lengths)) < TOLERANCE[dtype]
    assert off(scores.from_blocks(out, cos, sin, start, length), x) < 3 * TOLERANCE[dtype]


@DTYPES
def test_softmax_backward(dtype: torch.dtype) -> None:
    n, width, offset, tall, scale = 12, 9, 3, 6, 0.3
    s, dp, delta = draw(n, width), draw(n, width, seed=1), draw(n, seed=2)
    visible = torch.arange(width)[None] <= offset + (torch.arange(n) % tall)[:, None]
    masked = (s.double() * scale).masked_fill(~visible, float("-inf"))
    lse = masked.logsumexp(-1)
    p64 = (masked - lse[:, None]).exp()
    ds64 = p64 * (dp.double() - delta.double()[:, None]) * scale
    p, ds = scores.softmax_backward(s, dp, lse.float(), delta, dtype, scale=scale, offset=offset, tall=tall)
    assert off(p, p64) < TOLERANCE[dtype] and off(ds, ds64) < TOLERANCE[dtype]
    assert not p[~visible].any() and not ds[~visible].any()


def test_numba_that_does_not_work_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_KERNELS", "0")
    cpu.enabled.cache_clear()
    try:
        assert not cpu.available(torch.zeros(2))
    finally:
        monkeypatch.undo()
        cpu.enabled.cache_clear()
    assert cpu.available(torch.zeros(2))
    assert not cpu.available(torch.zeros(2, dtype=torch.float64))
    assert not cpu.available(torch.zeros(2), torch.zeros(2, dtype=torch.float16))


@pytest.mark.slow
def test_a_kernel_from_the_cache_gives_the_bits_of_one_compiled_now(tmp_path: Path) -> None:
    """A run and its resumption must end in the same bytes, whichever of them came first on this machine."""
    code = """
import hashlib, torch
from halfbyte.layers import attention, norm_gate
torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16):
    draw = torch.Generator().manual_seed(0)
    g, u, dh, w = (torch.randn(37, 96, generator=draw).to(dtype).requires_grad_() for _ in range(4))
    norm_gate.glu((g, u), 1).backward(dh.detach())
    norm_gate.norm(u, w[0].detach(), 1e-5, norm_gate.NormKind()).backward(dh.detach())
    q, k, v = (torch.randn(1300, n, 64, generator=draw).to(dtype).requires_grad_() for n in (9, 3, 3))
    attended = attention.attention(q, k, v, (600, 400, 300), 0.125, None, None)
    attended.backward(torch.randn(attended.shape, generator=draw).to(dtype))
    for x in (g.grad, u.grad, attended, q.grad, k.grad, v.grad):
        print(hashlib.sha256(x.detach().float().numpy().tobytes()).hexdigest())
"""
    said = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert list(tmp_path.rglob("*.nbc")), "the first has filled the cache"
    assert said[0] == said[1] and said[0].count("\n") == 12


def test_a_kernel_that_the_processor_cannot_run_is_an_error_and_not_the_end_of_the_process() -> None:
    env = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    code = "from halfbyte.layers.kernels.cpu.attention import bf16"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "ImportError" in done.stderr and "avx512_bf16" in done.stderr
