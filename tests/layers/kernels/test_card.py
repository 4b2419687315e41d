"""Attention on a card: one call a layer whatever the lengths, windows as transformers has them, no scores in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from halfbyte.layers import packing
from halfbyte.layers.kernels import card
from halfbyte.layers.packed_attention import attention
from tests import fake_card, tiny

LENGTHS = (5, 1, 9, 3, 4)
H, K, D = 4, 2, 8


@pytest.fixture
def cards() -> Iterator[fake_card.Cards]:
    with fake_card.cards() as made:
        yield made


@pytest.fixture
def where(cards: fake_card.Cards) -> torch.device:
    return fake_card.device()


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, sum(LENGTHS), D).to(dtype) for heads in (H, K, K)]


def reference(q: Any, k: Any, v: Any, window: int | None) -> torch.Tensor:
    """Each example alone, in fp64: the last `window` tokens, itself included. (1, T, H, D)."""
    outs = []
    for a, b, c in zip(*(x[0].double().split(LENGTHS, 1) for x in (q, k, v)), strict=True):
        b, c = (x.repeat_interleave(H // K, 0) for x in (b, c))
        back = torch.arange(a.shape[1])[:, None] - torch.arange(a.shape[1])[None]
        seen = (back >= 0) & (back < (window or 10**6))
        scores = (a @ b.transpose(1, 2) / D**0.5).masked_fill(~seen, -torch.inf)
        outs.append((scores.softmax(-1) @ c).transpose(0, 1))
    return torch.cat(outs)[None]


class Layer(nn.Module):
    is_causal = True


def run(leaves: list[torch.Tensor], where: torch.device, window: int | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and gradients by the interface that models call, on a device."""
    there = [x.to(where).requires_grad_() for x in leaves]
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    known = {"packed_lengths": card.PackLengths(LENGTHS)}
    out, _ = attention(
        Layer(), *there, None, sliding_window=window, cu_seq_lens_q=starts, cu_seq_lens_k=starts, **known
    )
    out.backward(torch.ones_like(out) * torch.arange(1.0, D + 1, dtype=out.dtype).to(where))
    return out.detach().cpu(), [x.grad.cpu() for x in there]  # type: ignore[union-attr]


@pytest.mark.parametrize("window", [None, 4, 3, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_pack_on_a_card_is_each_example_alone(
    cards: fake_card.Cards, where: torch.device, dtype: torch.dtype, window: int | None
) -> None:
    leaves = inputs(dtype)
    with torch.enable_grad():
        exact = [x.double().requires_grad_() for x in leaves]
        wanted = reference(*exact, window)
        wanted.backward(torch.ones_like(wanted) * torch.arange(1.0, D + 1))
    got, grads = run(leaves, where, window)
    eps = torch.finfo(dtype).eps  # outputs are about 1, gradients sums of some ten products of up to D
    assert (got.double() - wanted).abs().max() < 8 * eps
    size = sum(float(x.grad.square().sum()) for x in exact) ** 0.5  # type: ignore[union-attr]
    for g, x in zip(grads, exact, strict=True):
        assert (g.double() - x.grad).norm() <= 8 * eps * size  # type: ignore[union-attr]


@pytest.mark.skipif(card._kernel(card.VARLEN) is None, reason="torch from 2.11 on has it")
def test_attention_on_a_card_is_one_call_for_any_lengths(cards: fake_card.Cards, where: torch.device) -> None:
    """One call for each length made cuDNN build a plan for each."""
    leaves = [x.to(where) for x in inputs(torch.bfloat16)]
    cards.reset()
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    with torch.no_grad():
        attention(Layer(), *leaves, None, cu_seq_lens_q=starts, packed_lengths=card.PackLengths(LENGTHS))
    called = [name for name in cards.calls if "attn" in name or "attention" in name]
    assert called == ["torch_attn._varlen_attn.default"]
    assert cards.syncs == []


def test_lengths_are_copied_to_a_card_once(cards: fake_card.Cards, where: torch.device) -> None:
    known = card.PackLengths(LENGTHS)
    assert known.starts(where) is known.starts(where)
    assert known.starts(where).cpu().tolist() == [0, 5, 6, 15, 18, 22]
    assert known.starts(where).dtype == torch.int32


@pytest.mark.parametrize(("dtype", "capability"), [(torch.float32, (9, 0)), (torch.float16, (7, 5))])
def test_without_a_flash_kernel_no_scores_are_made(
    cards: fake_card.Cards, where: torch.device, dtype: torch.dtype, capability: tuple[int, int]
) -> None:
    """SDPA takes grouped heads by flash or by the formula with all scores; Turing and fp32 have no flash."""
    leaves, asked = [x.to(where) for x in inputs(dtype)], []
    own = torch.nn.functional.scaled_dot_product_attention

    def seen(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append((q.shape[1], k.shape[1], kwargs["enable_gqa"], torch.backends.cuda.cudnn_sdp_enabled()))
        return own(q, k, v, *args, **kwargs)

    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    with (
        torch.no_grad(),
        mock.patch.object(fake_card._Module, "get_device_capability", return_value=capability),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", seen),
    ):
        attention(Layer(), *leaves, None, cu_seq_lens_q=starts, packed_lengths=card.PackLengths(LENGTHS))
    assert set(asked) == {(H, H, False, False)}  # and never by cuDNN


def test_a_users_flash_attention_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was replaced without a word, and its kernel never used."""
    lm = tiny.model("llama")
    monkeypatch.setattr(lm, "_flash_attn_can_dispatch", lambda *a, **k: True, raising=False)
    lm.config._attn_implementation = "flash_attention_2"  # as `from_pretrained` leaves it where flash-attn is installed
    packing.install(lm, "cu_seq_lens")
    batch = tiny.batch(LENGTHS, 256)
    assert packing.forward_inputs(lm, batch)["packed_lengths"].kernel == card.FLASH_ATTN
    assert packing.asked_attention(lm) == "flash_attention_2"
    packing.install(lm, "single")
    assert lm.config._attn_implementation == "sdpa"  # the same function, which a proof can run in fp32
    other = tiny.model("llama")
    packing.install(other, "cu_seq_lens")
    assert packing.forward_inputs(other, batch)["packed_lengths"].kernel == card.VARLEN


def test_flash_attn_is_called_where_it_is_asked_for(
    cards: fake_card.Cards, where: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own arguments: the window's tokens without the token itself, causal, lengths as int32 on the card."""
    import sys
    from types import SimpleNamespace

    said: dict[str, Any] = {}

    def func(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, **options: Any) -> Any:
        said.update(options, cu=cu_q.cpu().tolist(), most=(max_q, max_k), heads=(q.shape[1], k.shape[1]))
        return torch.zeros_like(q)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=func))
    monkeypatch.setenv(card.VARIABLE, "flash_attn")
    card._kernel.cache_clear()
    try:
        leaves = [x.to(where) for x in inputs(torch.bfloat16)]
        starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        with torch.no_grad():
            attention(Layer(), *leaves, None, scaling=0.5, sliding_window=4, cu_seq_lens_q=starts)
    finally:
        card._kernel.cache_clear()
    assert said == {
        "softmax_scale": 0.5, "causal": True, "window_size": (3, 0), "cu": [0, 5, 6, 15, 18, 22], "most": (9, 9),
        "heads": (H, K),
    }  # fmt: skip


def test_the_environment_chooses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert card.kernel_name() == card.VARLEN
    assert card.kernel_name("flash_attention_2") == card.FLASH_ATTN
    monkeypatch.setenv(card.VARIABLE, "sdpa")
    assert card.kernel_name("flash_attention_2") == card.SDPA
