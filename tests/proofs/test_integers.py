"""The proof that lets integer products in: it takes what is right, falls back from what is not, and changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import doctor, finetune
from halfbyte.adapters.assembly import assemble
from halfbyte.data import pack
from halfbyte.errors import AdapterError
from halfbyte.layers import loss
from halfbyte.layers.kernels.cpu.integer import products as kernel
from halfbyte.proofs import integers, setting
from halfbyte.proofs.fusing import sample_gradients
from halfbyte.system import device, libraries, pages
from halfbyte.system.device import may_use_integers
from halfbyte.training.events import Listener
from halfbyte.types import Batch, Model
from tests import tiny_run
from tests.adapters.test_assembly import opened
from tests.proofs.test_memory import Notes

pytestmark = pytest.mark.skipif(bool(kernel.why_not()), reason=kernel.why_not() or "-")
Patch = pytest.MonkeyPatch


TIMES_AS_FAST = kernel.times_as_fast


@pytest.fixture
def model(tmp_path: Path) -> Model:
    recipe = tiny_run.recipe(tmp_path, lora__target_modules=["q_proj", "v_proj"]).recipe
    return assemble(opened(recipe), recipe).model


@pytest.fixture(autouse=True)
def fast(monkeypatch: Patch) -> None:
    """A machine on which it pays, whatever this one is busy with."""
    monkeypatch.setattr(kernel, "times_as_fast", lambda dtype: 2.0)


def test_amx_multiplies_bf16_as_fast(monkeypatch: Patch) -> None:
    known = replace(device.detect(), isa=("avx2", "avx512_vnni", "avx512_bf16"))
    machine = replace(known, isa=(*known.isa, "amx_bf16", "amx_int8"))
    assert may_use_integers(known, "bf16") and may_use_integers(machine, "fp32")
    assert may_use_integers(replace(known, isa=("avx2", "avx_vnni")), "fp32")
    assert not may_use_integers(replace(known, isa=("avx2", "avx512_bf16")), "bf16")
    assert not may_use_integers(machine, "bf16") and may_use_integers(machine, "bf16", "int8")
    assert not may_use_integers(known, "bf16", "exact")
    monkeypatch.setattr(kernel, "detect", lambda: machine)
    assert TIMES_AS_FAST.__wrapped__(torch.bfloat16) == 1.0, "nothing is timed"


def some_rows() -> Batch:
    ids = torch.randint(3, 60, (40,), generator=torch.Generator().manual_seed(0))
    return setting.labelled([ids[:17], ids[17:]])


def asked_layers(model: Model) -> list[Any]:
    return [m.__dict__[kernel.NAME] for m in model.modules() if kernel.NAME in m.__dict__]


def test_right_products_are_taken_and_nothing_else_changes(model: Model) -> None:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    modes, state = [m.training for m in model.modules()], torch.random.get_rng_state()
    with torch.no_grad():
        exact = loss.micro_batch_loss(model, some_rows())
    found = integers.decide(model, "auto", some_rows())
    assert found.products == integers.BOTH and len(found.tried) == 1 and found.tried[0][1].ok
    assert 0 < found.tried[0][1].gradients < integers.GRADIENTS and "2.0 times as fast" in str(found)
    assert len(asked_layers(model)) == 2 * 7 and set(asked_layers(model)) == {integers.BOTH}
    assert torch.equal(torch.random.get_rng_state(), state) and [m.training for m in model.modules()] == modes
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    with torch.no_grad():  # an evaluation is exact
        assert torch.equal(loss.micro_batch_loss(model, some_rows()), exact)
    assert not torch.equal(loss.micro_batch_loss(model, some_rows()), exact)
    assert integers.decide(model, "exact", {}).products is None and not asked_layers(model)
    assert torch.equal(loss.micro_batch_loss(model, some_rows()), exact)


def test_the_gradient_alone_is_tried_where_the_forward_must_be_exact(model: Model) -> None:
    found = integers.decide(model, "gradient", some_rows())
    assert found.products == integers.BACKWARD and len(found.tried) == 1


@pytest.mark.parametrize(("others", "products"), [([2.0, 1.0], "forward and input gradient"), ([1.2], None)])
def test_processes_decide_by_the_slowest(model: Model, others: list[float], products: str | None) -> None:
    seen = list[float]()

    def least(value: float) -> float:
        seen.append(value)
        return min(value, others[len(seen) - 1])

    found = integers.decide(model, "auto", some_rows(), least=least)
    assert seen == [2.0, 1.0][: len(others)] and (str(found.products) if found.products else None) == products


def test_what_is_too_rough_for_another_process_is_for_this(model: Model) -> None:
    asked = iter([2.0, 0.0, 1.0])
    found = integers.decide(model, "auto", some_rows(), least=lambda value: min(value, next(asked)))
    assert found.products == integers.BACKWARD and [seen.ok for _, seen in found.tried] == [True, True]
    asked = iter([2.0, 0.0, 0.0])
    assert integers.decide(model, "auto", some_rows(), least=lambda value: min(value, next(asked))).products is None
    assert not asked_layers(model)


def test_a_process_without_integers_still_says_so_to_the_others(model: Model, monkeypatch: Patch) -> None:
    monkeypatch.setattr(kernel, "why_not", lambda: "no such instruction")
    told = list[float]()
    integers.decide(model, "auto", some_rows(), least=lambda value: told.append(value) or value)
    assert told == [0.0]


def scaled(patch: Patch, name: str, by: float) -> None:
    """The kernel's product of that name, `by` times as large."""
    real = getattr(kernel, name)

    def faulty(out: Any, *args: Any, add: bool = False, lora: Any = None) -> None:
        kept = out.clone()
        real(out, *args, add=add, lora=lora)
        out.copy_(kept + (out - kept) * by if add else out * by)

    patch.setattr(kernel, name, faulty)


def dead_column(patch: Patch) -> None:
    real = kernel.forward

    def faulty(y: Any, *args: Any, add: bool = False, lora: Any = None) -> None:
        kept = y[:, 0].clone()
        real(y, *args, add=add, lora=lora)
        y[:, 0] = kept if add else 0

    patch.setattr(kernel, "forward", faulty)


def not_a_number(patch: Patch) -> None:
    scaled(patch, "forward", float("nan"))


def test_a_fault_forward_leaves_the_input_gradient(model: Model, monkeypatch: Patch) -> None:
    for fault in (lambda p: scaled(p, "forward", 1.4), dead_column, not_a_number):
        with monkeypatch.context() as patch:
            fault(patch)
            found = integers.decide(model, "auto", some_rows())
            assert found.products == integers.BACKWARD, str(found)
            assert [seen.ok for _, seen in found.tried] == [False, True]
            assert "not forward" in str(found) and set(asked_layers(model)) == {integers.BACKWARD}


def test_a_fault_in_the_input_gradient_leaves_nothing(model: Model, monkeypatch: Patch) -> None:
    for by in (1.5, 0.0, float("nan")):
        with monkeypatch.context() as patch:
            scaled(patch, "backward", by)
            found = integers.decide(model, "auto", some_rows())
            assert found.products is None and not asked_layers(model), str(found)
            assert str(found).startswith("exact: int8 is too rough for this model: gradients differ by ")


def test_where_it_cannot_be_had(model: Model, monkeypatch: Patch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "times_as_fast", lambda dtype: 1.2)
        assert "does not pay" in str(integers.decide(model, "auto", some_rows()))
        assert integers.decide(model, "int8", some_rows()).products == integers.BOTH
    monkeypatch.setattr(kernel, "why_not", lambda: "no such instruction")
    assert str(integers.decide(model, "auto", some_rows())) == "exact: int8 is not possible: no such instruction"
    with pytest.raises(AdapterError, match=r"quant\.compute int8 is not possible: no such instruction"):
        integers.decide(model, "int8", some_rows())
    assert not asked_layers(model)


def test_int8_is_taken_as_asked_and_what_was_seen_is_said(model: Model, monkeypatch: Patch) -> None:
    scaled(monkeypatch, "forward", 1.4)
    found = integers.decide(model, "int8", some_rows())
    assert found.products == integers.BOTH and not found.tried[0][1].ok and "asked" in str(found)


@pytest.mark.skipif(not pages.supported(), reason="needs Linux and /proc/self/pagemap")
def test_the_same_bits_wherever_the_base_lies(model: Model) -> None:
    exact = sample_gradients(model, packed=True)
    assert integers.decide(model, "int8", some_rows()).products == integers.BOTH
    eight = sample_gradients(model, packed=True)
    assert any(not torch.equal(eight[name], exact[name]) for name in exact)
    found = doctor._same_wherever(model, packed=True)
    assert found.ok and "equal to the bit" in found.seen, found


def test_rows_for_the_proof() -> None:
    step = pack.Step(0, ((3, 0), (1, 2)), 1, 1, 1.0, 1)
    assert integers.rows_for_proof(step, [300, 200, 900, 100], packed=True) == [3, 1]
    assert integers.rows_for_proof(step, [300, 200, 900, 100], packed=False) == [3]
    assert integers.rows_for_proof(step, [5000] * 4, packed=True) == [3]


@pytest.mark.parametrize("asked", ["exact", "auto", "int8"])
def test_a_run_says_and_reports_what_it_took(tmp_path: Path, asked: str, monkeypatch: Patch) -> None:
    lines: list[tuple[str, str]] = []

    class Told(Listener):
        def note(self, label: str, text: str) -> None:
            lines.append((label, text))

    loaded = tiny_run.recipe(tmp_path, quant__compute=asked, train__max_steps=2)
    finetune.train(loaded, listener=Told())
    run = Path(loaded.recipe.output)
    report, started = (json.loads((run / f"{n}.json").read_text()) for n in ("report", "started"))
    taken = report["compute"]["products"]
    said = [text for label, text in lines if label == "compute"]
    proofs = [p for p in started["proofs"] if p["name"] == "compute"]
    if asked == "exact":
        assert (taken, said, proofs) == ("exact", [], [])
        return
    assert taken in ("forward and input gradient", "input gradient") and len(said) == len(proofs) == 1
    assert said[0] == proofs[0]["said"] and report["compute"]["tried"]
    exact = tmp_path / "exact"
    exact.mkdir()
    other = tiny_run.recipe(exact, quant__compute="exact", train__max_steps=2)
    finetune.train(other)
    losses = [
        [json.loads(line)["loss"] for line in (Path(x.recipe.output) / "metrics.jsonl").read_text().splitlines()]
        for x in (loaded, other)
    ]
    assert losses[0] != losses[1]  # a field without an effect is none
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_second_run_believes_what_was_proven_of_its_rows_alone(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))

    def compute(name: str, **asked: Any) -> tuple[Any, Any]:
        listener = Notes()
        made = tiny_run.recipe(tmp_path, output=str(tmp_path / name), quant__compute="auto", **asked)
        return listener, finetune.train(made, listener=listener, proofs="remembered").report

    _, first = compute("a")
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "times_as_fast", lambda dtype: pytest.fail("nothing is timed or proven again"))
        told, second = compute("b")
    assert "(proven before)" in told.lines["compute"] and second["loss"] == first["loss"]
    assert second["compute"]["tried"] == first["compute"]["tried"]
    scaled(monkeypatch, "backward", 1.5)
    told, other = compute("c", train__seed=7)  # other rows, another adapter
    assert other["compute"]["products"] == "exact" and "too rough" in told.lines["compute"]
    told, other = compute("d", train__seed=7)
    assert "proven before" not in told.lines["compute"], "what failed is tried again"
    real = libraries.version
    monkeypatch.setattr(libraries, "version", lambda name: "99.1" if name == "peft" else real(name))
    told, other = compute("e")
    assert other["compute"]["products"] == "exact" and "too rough" in told.lines["compute"]
