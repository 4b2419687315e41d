"""The attention function against plain eager attention with an explicit mask, in fp64, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward as stock_sdpa

from halfbyte.layers import packed_attention as A

H, K, D = 4, 2, 8
LENGTHS = {"uneven": [5, 1, 9, 2], "one": [7], "equal": [4, 4, 4], "runs": [3, 3, 1, 1, 6, 3], "ones": [1, 1, 1]}


class Module(torch.nn.Module):
    is_causal = True
    num_key_value_groups = H // K


def cu(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def qkv(tokens: int, dtype: torch.dtype = torch.float64, value_dim: int = D) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = ((H, D), (K, D), (K, value_dim))  # as models make them: (1, T, heads, D) seen as (1, heads, T, D)
    made = (torch.randn(1, tokens, h, d, generator=g, dtype=torch.float64).to(dtype) for h, d in sizes)
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in made)
    return q, k, v


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scaling: float | None = None,
) -> Tensor:
    """One dense (T, T) mask over the whole pack, and the textbook formula."""
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    at = torch.arange(len(number))
    sees = (number[:, None] == number) & (at[:, None] >= at)
    if window is not None:
        sees &= at[:, None] - at < window
    k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
    scores = q @ k.mT * (D**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~sees, -torch.inf)
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[None, :, None, None]
    return (weights / total @ v).transpose(1, 2)


def packed(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], **kwargs: Any) -> Tensor:
    kwargs = {"cu_seq_lens_q": cu(lengths), "cu_seq_lens_k": cu(lengths)} | kwargs
    return A.attention(Module(), q, k, v, A.no_mask("cpu"), **kwargs)[0]


SINKS = torch.tensor([0.3, -0.5, 1.0, 0.0], dtype=torch.float64)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "scaling": ({"scaling": 0.7}, {"scaling": 0.7}),
    "window": ({"sliding_window": 3}, {"window": 3}),
    "window of one": ({"sliding_window": 1}, {"window": 1}),
    "window longer than all": ({"sliding_window": 99}, {}),
    "softcap": ({"softcap": 0.5}, {"softcap": 0.5}),
    "softcap and window": ({"softcap": 0.5, "sliding_window": 2}, {"softcap": 0.5, "window": 2}),
    "softcap and scaling": ({"softcap": 0.5, "scaling": 1.3}, {"softcap": 0.5, "scaling": 1.3}),
    "sinks": ({"s_aux": SINKS}, {"sinks": SINKS}),
    "sinks and window": ({"s_aux": SINKS, "sliding_window": 4}, {"sinks": SINKS, "window": 4}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_equals_the_dense_formula_with_gradients(lengths: list[int], variant: str) -> None:
    ours, theirs = VARIANTS[variant]
    q, k, v = qkv(sum(lengths))
    got, wanted = packed(q, k, v, lengths, **ours), reference(q, k, v, lengths, **theirs)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    grads = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (got, wanted)]
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


def test_gradcheck() -> None:
    q, k, v = (x.detach().requires_grad_() for x in qkv(6))
    for kwargs in ({}, {"sliding_window": 2}, {"softcap": 0.7, "s_aux": SINKS}):
        assert torch.autograd.gradcheck(lambda *x, kw=kwargs: packed(*x, [2, 1, 3], **kw), (q, k, v))


def test_value_heads_of_another_size() -> None:
    lengths = LENGTHS["uneven"]
    q, k, v = qkv(sum(lengths), value_dim=5)
    torch.testing.assert_close(packed(q, k, v, lengths), reference(q, k, v, lengths), rtol=1e-12, atol=1e-12)


def test_bf16_is_as_near_as_bf16_can_be() -> None:
    lengths = LENGTHS["uneven"]
    q, k, v = qkv(sum(lengths), torch.bfloat16)
    wanted = reference(q.double(), k.double(), v.double(), lengths)
    # two roundings to 8 bits: of the weights before they meet v, and of the output
    torch.testing.assert_close(packed(q, k, v, lengths).double(), wanted, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("kwargs", [{}, {"sliding_window": 3}, {"softcap": 0.5}])
def test_an_example_does_not_see_another(kwargs: dict[str, Any]) -> None:
    lengths = [5, 1, 9]
    q, k, v = (x.detach() for x in qkv(15))
    before = packed(q, k, v, lengths, **kwargs)
    for x in (q, k, v):
        x[:, :, 5:6] += 10.0
    after = packed(q, k, v, lengths, **kwargs)
    assert torch.equal(before[:, :5], after[:, :5]) and torch.equal(before[:, 6:], after[:, 6:])
    assert not torch.equal(before[:, 5:6], after[:, 5:6])


@pytest.mark.parametrize("kwargs", [{}, {"softcap": 0.5}])
def test_dropout_is_applied(kwargs: dict[str, Any]) -> None:
    q, k, v = (x.detach() for x in qkv(200))
    v.fill_(1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = packed(q, k, v, [200], dropout=0.5, **kwargs)
    late = out[:, 100:]  # many weights each: their sum over kept ones, doubled, is 1 on average but not everywhere
    assert late.mean().item() == pytest.approx(1.0, abs=0.05) and late.std().item() > 0.02


def test_without_lengths_it_is_stock_sdpa() -> None:
    q, k, v = (x.detach() for x in qkv(6))
    stock = stock_sdpa(Module(), q, k, v, None, scaling=0.3)[0]
    assert torch.equal(A.attention(Module(), q, k, v, None, scaling=0.3)[0], stock)
    mask = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    mask |= torch.eye(6, dtype=torch.bool)
    stock = stock_sdpa(Module(), q, k, v, mask)[0]
    assert torch.equal(A.attention(Module(), q, k, v, mask)[0], stock)
    newest = q[:, :, -1:]
    stock = stock_sdpa(Module(), newest, k, v, None)[0]
    assert torch.equal(A.attention(Module(), newest, k, v, None)[0], stock)


def test_softcap_without_lengths_which_stock_sdpa_refuses() -> None:
    q, k, v = (x.detach() for x in qkv(6))
    got = A.attention(Module(), q, k, v, None, softcap=0.5)[0]
    torch.testing.assert_close(got, reference(q, k, v, [6], softcap=0.5))
    last = A.attention(Module(), q[:, :, -1:], k, v, None, softcap=0.5)[0]  # decoding: the newest token sees all
    torch.testing.assert_close(last, got[:, -1:])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cu_seq_lens_q": None}, "without their lengths"),
        ({"cu_seq_lens_q": cu([3, 2])}, "must cover the 6 tokens, got 5"),
        ({"cu_seq_lens_k": cu([2, 4])}, "cu_seq_lens_k must equal"),
        ({"is_causal": False}, "causal attention only"),
        ({"position_bias": torch.zeros(1)}, "not understood: position_bias"),
    ],
)
def test_what_it_cannot_do_it_refuses(change: dict[str, Any], says: str) -> None:
    q, k, v = qkv(6)
    with pytest.raises(A.PackingError, match=says):
        packed(q, k, v, [3, 3], **change)


def test_a_mask_that_reaches_other_code_fails_there() -> None:
    with pytest.raises(RuntimeError):
        torch.zeros(1, H, 6, 6) + A.no_mask("cpu")
