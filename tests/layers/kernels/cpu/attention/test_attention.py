"""Attention over packed examples, forward and backward, against the formula in fp64: every way it can go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.layers import attention as block_attention
from halfbyte.layers.attention import attention
from halfbyte.layers.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.enabled(), reason="numba does not work here")
TOLERANCE = {torch.bfloat16: 6e-3, torch.float32: 3e-6}
# lengths, query heads, key heads, head size, rotated part
CASES = [
    ((5, 123, 123), 4, 2, 16, 16),
    ((1,), 2, 1, 8, 0),
    ((1, 1, 7), 3, 3, 64, 32),
    ((600,), 2, 1, 32, 32),  # more than one block of rows, and of columns
    ((12, 48, 96, 192, 193), 6, 2, 32, 0),
    ((33, 2), 8, 1, 80, 20),
    ((40, 41), 2, 2, 128, 128),
]


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def formula(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, cos: Tensor, sin: Tensor,
    reach: tuple[int, int] = (1 << 40, 0),
) -> Tensor:  # fmt: skip
    def turned(x: Tensor) -> Tensor:
        r = cos.shape[1]
        a, rest = x[..., :r], x[..., r:]
        other = torch.cat([-a[..., r // 2 :], a[..., : r // 2]], -1)
        return torch.cat([a * cos[:, None] + other * sin[:, None], rest], -1)

    out = []
    for one in zip(*(x.split(list(lengths)) for x in (turned(q), turned(k), v)), strict=True):
        a, b, c = (x.transpose(0, 1) for x in one)  # (heads, L, D)
        b, c = (x.repeat_interleave(a.shape[0] // x.shape[0], 0) for x in (b, c))
        s = a @ b.transpose(1, 2) * scale
        places = torch.arange(s.shape[1])
        behind = places - places[:, None]
        hidden = (behind > reach[1]) | (-behind > reach[0])
        out.append((s.masked_fill(hidden, float("-inf")).softmax(-1) @ c).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("way", ["whole", "matmul"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("lengths", "heads", "key_heads", "d", "rotated"), CASES)
def test_output_and_gradients(
    lengths: tuple[int, ...], heads: int, key_heads: int, d: int, rotated: int, dtype: torch.dtype, way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if way == "whole" and not cpu.whole_attention(torch.zeros(1, dtype=dtype)):
        pytest.skip("one kernel for all: fp32 with AVX2, bf16 with AVX512-BF16")
    if way == "matmul":
        monkeypatch.setattr(block_attention, "whole_attention", lambda x: False)
        monkeypatch.setattr(block_attention, "ROWS", 256)
        monkeypatch.setattr(block_attention, "SCORES_BYTES", 200_000)
    total = sum(lengths)
    q, do = draw(total, heads, d, dtype=dtype), draw(total, heads, d, dtype=dtype, seed=1)
    k, v = draw(total, key_heads, d, dtype=dtype, seed=2), draw(total, key_heads, d, dtype=dtype, seed=3)
    angles = draw(total, rotated // 2, dtype=torch.float64, seed=4).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    scale = d**-0.5 * 1.3
    got = attention(*given, lengths, scale, cos, sin)
    got.backward(do)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = formula(*wide, lengths, scale, cos.double(), sin.double())
    wanted.backward(do.double())
    pairs = [(got, wanted), *((a.grad, b.grad) for a, b in zip(given, wide, strict=True))]
    for name, (a, b) in zip(("out", "dq", "dk", "dv"), pairs, strict=True):
        assert a is not None and b is not None
        apart = float((a.detach().double() - b.detach()).norm())
        assert apart <= TOLERANCE[dtype] * max(float(b.detach().norm()), 0.2), name  # alone, a token has dq = dk = 0


def test_an_output_that_is_not_contiguous_gives_the_same_gradient() -> None:
    q = draw(9, 2, 16, dtype=torch.bfloat16).requires_grad_()
    k = draw(9, 2, 16, dtype=torch.bfloat16, seed=1)
    wide = draw(9, 2, 32, dtype=torch.bfloat16, seed=2)
    grads = []
    for do in (wide[..., :16], wide[..., :16].contiguous()):
        out = attention(q, k, k, (4, 5), 0.25, None, None)
        grads.append(torch.autograd.grad(out, q, do)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("way", ["whole", "matmul"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_number_that_is_not_finite_is_not_hidden(
    dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "matmul":  # where torch's own kernel makes zeros of it under AVX2
        monkeypatch.setattr(block_attention, "whole_attention", lambda x: False)
    q = draw(6, 1, 16, dtype=dtype)
    q[3] = float("nan")
    k = draw(6, 1, 16, dtype=dtype, seed=1)
    out = attention(q.requires_grad_(), k, k, (2, 4), 0.25, None, None)
    assert out[:3].isfinite().all() and not out[3].isfinite().any()


def test_what_it_takes() -> None:
    q, k = torch.zeros(4, 4, 16), torch.zeros(4, 2, 16)
    assert block_attention.takes(q, k, k)
    assert not block_attention.takes(q, k, k[..., :8])  # another head size for values
    assert not block_attention.takes(q[..., :15], k[..., :15], k[..., :15])
    assert not block_attention.takes(q[:, :3], k, k)
    assert not block_attention.takes(q.double(), k.double(), k.double())


def test_the_formula_is_torchs() -> None:
    x = torch.randn(7, 2, 8, dtype=torch.float64)
    none = x.new_empty(7, 0)
    wanted = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for _ in range(3)), is_causal=True)[0]
    torch.testing.assert_close(formula(x, x, x, (7,), 8**-0.5, none, none), wanted.transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("reach", [(1 << 40, 1 << 40), (64, 64), (3, 3), (63, 0)], ids=str)
def test_what_a_token_sees(reach: tuple[int, int], dtype: torch.dtype) -> None:
    """To both sides, and in windows shorter and longer than a tile."""
    if not cpu.whole_attention(torch.zeros(1, dtype=dtype)):
        pytest.skip("one kernel for all: fp32 with AVX2, bf16 with AVX512-BF16")
    lengths = (1, 7, 130, 65)
    q, do = draw(203, 4, 32, dtype=dtype), draw(203, 4, 32, dtype=dtype, seed=1)
    k, v = draw(203, 2, 32, dtype=dtype, seed=2), draw(203, 2, 32, dtype=dtype, seed=3)
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    got = attention(*given, lengths, 0.2, None, None, reach=reach)
    got.backward(do)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    none = torch.zeros(203, 0, dtype=torch.float64)
    wanted = formula(*wide, lengths, 0.2, none, none, reach)
    wanted.backward(do.double())
    for a, b in [(got, wanted), *((a.grad, b.grad) for a, b in zip(given, wide, strict=True))]:
        assert a is not None and b is not None
        assert float((a.detach().double() - b.detach()).norm()) <= TOLERANCE[dtype] * float(b.detach().norm())
