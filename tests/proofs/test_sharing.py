"""Each fault that sharing beginnings can have is put into ours, and the proof at start must see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from halfbyte.data import collate
from halfbyte.layers import fuse
from halfbyte.layers.kernels.cpu.attention import tasks
from halfbyte.proofs import fusing, sharing
from halfbyte.proofs.fusing import prove_fused
from halfbyte.proofs.packing import prove_packing
from halfbyte.proofs.sharing import prove_sharing
from tests import plain_peft, tiny
from tests.layers.test_shared_prefixes import rows

Patch = pytest.MonkeyPatch
DTYPES = [torch.float32, torch.bfloat16]


def around_collate(patch: Patch, change: Callable[[Any], dict[str, Any]]) -> None:
    """The tree's batch, with some of it changed."""
    real = collate.collate_tree

    def faulty(examples: Any) -> Any:
        batch = real(examples)
        return {**batch, **change(batch)}

    patch.setattr(sharing.collate, "collate_tree", faulty)


def sees_its_sibling(patch: Patch) -> None:
    def deeper(batch: Any) -> dict[str, Any]:
        levels = batch["levels"].clone()
        levels[-1] += 1
        return {"levels": levels}

    around_collate(patch, deeper)


def position_off_by_one(patch: Patch) -> None:
    def moved(batch: Any) -> dict[str, Any]:
        positions, last = batch["position_ids"].clone(), int(batch["cu_seq_lens_q"][-2])
        positions[0, last:] += 1
        return {"position_ids": positions}

    around_collate(patch, moved)


def label_counts_once(patch: Patch) -> None:
    around_collate(patch, lambda batch: {"counts": torch.ones_like(batch["counts"])})


def misses_a_rest(patch: Patch) -> None:
    """Gradients of keys and values without those from the last rest."""
    real = tasks.Attention.backward

    def faulty(self: Any, q: Any, k: Any, v: Any, out: Any, dout: Any, lse: Any, tree: Any, *more: Any) -> Any:
        dq, dk, dv = real(self, q, k, v, out, dout, lse, tree, *more)
        visits = sorted(visit for visit in tree.visits.tolist() if visit[4])
        if not any(level for _, _, level, _, _ in visits):
            return dq, dk, dv
        without, last = dout.clone(), visits[-2]  # the last segment is what fills the batch up
        without[last[0] : last[0] + last[1]] = 0
        _, other_dk, other_dv = real(self, q, k, v, out, without, lse, tree, *more)
        above = visits[0][1]
        dk[:above], dv[:above] = other_dk[:above], other_dv[:above]
        return dq, dk, dv

    patch.setattr(tasks.Attention, "backward", faulty)


def misses_a_piece(patch: Patch) -> None:
    """Gradients of a root's keys and values from the piece alone that computes its queries."""
    real = tasks.Segments.of

    patch.setattr(tasks.Segments, "of", lambda *given: replace(real(*given), repeats=()))


FAULTS = {
    f.__name__: f for f in (sees_its_sibling, position_off_by_one, label_counts_once, misses_a_rest, misses_a_piece)
}


def proven(name: str, dtype: torch.dtype, **changes: Any) -> Any:
    model = plain_peft.adapt(tiny.model(name, dtype=dtype, changes=changes), "all-linear")
    assert prove_packing(model, 60).layout == "cu_seq_lens" and prove_fused(model, packed=True, longest=60).ok
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_tree_is_seen(fault: str, dtype: torch.dtype, monkeypatch: Patch) -> None:
    model, some = proven("llama", dtype), rows(vocabulary=256)[:3]
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    proof = prove_sharing(model, some)
    assert proof.ok and proof.difference < 1e-4, proof
    FAULTS[fault](monkeypatch)
    proof = prove_sharing(model, some)
    assert not proof.ok and "differ by" in proof.reason, proof
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    model.requires_grad_(False)
    of_texts = fault in ("sees_its_sibling", "position_off_by_one")  # an evaluation has no sums and no gradients
    assert prove_sharing(model, some).ok is not of_texts


def test_windows_and_long_beginnings() -> None:
    model = proven("gemma3", torch.float32)
    assert prove_sharing(model, rows(vocabulary=256)).ok
    cut = sharing.cut(rows(), 64)
    assert max(len(row.input_ids) for row in cut) <= 60
    long = [sharing.replace(row, input_ids=(*range(2000), *row.input_ids)) for row in rows()[:2]]
    assert all(len(row.input_ids) < 400 for row in sharing.cut(long, 300))


def test_a_model_that_takes_rows_says_so() -> None:
    model = plain_peft.adapt(tiny.model("falcon", changes={"alibi": True}), "all-linear")
    assert prove_packing(model).layout == "rows"
    proof = prove_sharing(model, rows(vocabulary=256)[:3])
    assert not proof.ok and "lengths" in proof.reason
    assert not sharing.shares(model, rows(vocabulary=256))


def test_rows_outside_of_a_run() -> None:
    model, some = proven("llama", torch.float32), rows(vocabulary=256)
    assert sharing.shares(model, some) and not sharing.shares(model, [some[0], some[7]])


def test_a_failure_on_the_way_in_is_said_like_any_other(monkeypatch: Patch) -> None:
    model = plain_peft.adapt(tiny.model("llama"), "all-linear")
    prove_packing(model)
    for holder, name in ((sharing.structure, "shallow"), (sharing, "random_b")):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, failing)
            proof = prove_sharing(model, rows(model.config.vocab_size))
        assert not proof.ok and proof.reason == "beginnings are not shared: MemoryError: no room"
    monkeypatch.setattr(fusing, "random_b", failing)
    proof = prove_fused(model, packed=True)
    assert not proof.ok and proof.reason == "PEFT's own forward: MemoryError: no room"
    assert not any(isinstance(module, fuse._Fast) for module in model.modules())


@contextmanager
def failing(model: Any) -> Iterator[None]:
    raise MemoryError("no room")
    yield
