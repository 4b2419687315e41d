"""The head in 8 bits against fp64, its bound against the worst vector, and its proof against faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from halfbyte.layers.decoding import head
from halfbyte.layers.decoding.operands import Int8Head
from halfbyte.layers.decoding.tape import Tape, isa

pytestmark = pytest.mark.skipif(isa(torch.float32) is None, reason="no kernels for this processor")
DTYPES = [d for d in (torch.bfloat16, torch.float32) if isa(d)]


def weights(o: int, d: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(o)
    w = torch.randn(o, d) * torch.logspace(-3, 1, o)[torch.randperm(o)][:, None]
    w[5] = 0.0
    w[7, 3] = 300.0  # one number that takes the whole range
    w[11] = w[12]  # two that are the same: the first wins
    return w.to(dtype)


def largest(w: Tensor, eight: Int8Head, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (M, O) with the head in 8 bits, and by the whole head."""
    tape = Tape(w.dtype, len(x))
    to = tape.vectors(x.shape[1])
    integers = tape.int16_vectors(to, x.shape[1])
    out, whole = tape.buffer(len(x), len(w)), tape.buffer(len(x), len(w))
    tape.norm(x, to, None, integers=integers)
    tape.then()
    tape.dense(w, to.plain, whole)
    tape.largest(w, eight, to.plain, integers, out)
    tape.run()
    return out.clone(), whole.clone()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 7, 16])
def test_the_largest_logit_is_that_of_the_whole_head_to_the_bit(m: int, dtype: torch.dtype) -> None:
    w = weights(1000, 192, dtype)
    eight = head.rounded(w)
    x = torch.randn(m, 192)
    x[0] = w[12].float() / w[12].float().norm() * 5  # where two rows are the same
    out, whole = largest(w, eight, x)
    assert torch.equal(out.argmax(1), whole.argmax(1))
    assert torch.equal(out.amax(1), whole.amax(1))
    exact = x.double() @ w.double().T
    assert ((out - exact).abs() <= eight.bounds * x.double().norm(dim=1)[:, None]).all()
    assert (out != whole).any()  # so the rough ones were used


def test_many_near_the_top() -> None:
    """Rows that differ by less than 8 bits tell apart: each may be the largest, and each is multiplied whole."""
    torch.manual_seed(0)
    one = torch.randn(64)
    w = one + 1e-4 * torch.randn(300, 64)
    for seed in range(20):
        x = one[None] + 0.1 * torch.randn((1, 64), generator=torch.Generator().manual_seed(seed))
        out, whole = largest(w, head.rounded(w), x)
        assert torch.equal(out, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bound_holds_for_the_vector_that_is_worst_for_its_row(dtype: torch.dtype) -> None:
    w = weights(200, 128, dtype)
    eight = head.rounded(w)
    held = eight.rows.double().numpy() * eight.scales.double().numpy()[:, None]
    off = w.double().numpy() - held
    worst = np.linalg.norm(off, axis=1)  # reached by x along the difference
    bounds = eight.bounds.double().numpy()
    assert (worst <= bounds).all()
    size = np.linalg.norm(w.double().numpy(), axis=1)
    also = 128**0.5 / 2**15  # x is in whole numbers up to 2^14 of its largest
    assert (bounds >= worst + 0.99 * also * size).all()
    assert (bounds <= 1.001 * worst + (1e-5 + 1.01 * also) * size).all()  # and it is no larger than it need be


def test_what_is_not_finite_is_seen() -> None:
    w = weights(100, 64, torch.float32)
    x = torch.full((1, 64), float("nan"))
    out, whole = largest(w, head.rounded(w), x)
    assert torch.isnan(out).all() and torch.isnan(whole).all()


FAULTS = {
    "scale": (lambda e: replace(e, scales=e.scales * 1.01), "off"),
    "rows": (lambda e: replace(e, rows=e.rows.roll(1, 0)), "off"),
    "order": (lambda e: replace(e, rows=e.rows.roll(8, 1)), "off"),
    "sign": (lambda e: replace(e, rows=e.rows.neg()), "off"),
    "one row": (lambda e: replace(e, scales=e.scales.index_fill(0, torch.tensor([77]), 0.0)), "off"),
    "bounds": (lambda e: replace(e, bounds=e.bounds * 0.01), "off|largest"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_proof_sees_a_fault_and_the_whole_head_is_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    made = nn.Linear(64, 500, bias=False)
    assert head.of(made, torch.float32) is not None
    assert head.of(made, torch.float32) is head.of(made, torch.float32)
    change, said = FAULTS[fault]
    rounded = head.rounded
    monkeypatch.setattr(head, "rounded", lambda w: change(rounded(w)))
    told: list[Any] = []
    monkeypatch.setattr(head._log, "warning", lambda text, *args: told.append(text % args))
    with torch.no_grad():
        made.weight.mul_(1.0)  # another weight: made anew
    assert head.of(made, torch.float32) is None
    assert len(told) == 1 and any(word in told[0] for word in said.split("|"))


def test_the_proof_sees_a_largest_one_that_was_not_multiplied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(1000, 192, torch.float32)
    eight = head.rounded(w)
    assert head.fault_of(w, eight) is None
    run = Tape.run
    monkeypatch.setattr(Tape, "run", lambda tape: run(tape, 0, len(tape) - 1))  # without the last operation
    assert "largest" in str(head.fault_of(w, eight))


def test_other_heads_are_left_as_they_are() -> None:
    assert head.of(nn.Linear(96, 32, bias=False), torch.float32) is None  # not whole 64
    assert head.of(nn.Linear(64, 32), torch.float32) is None  # a bias
    assert head.of(nn.Linear(64, 32, bias=False), torch.bfloat16) is None
    assert head.of(nn.Embedding(64, 32), torch.float32) is None
