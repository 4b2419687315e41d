"""The main job on cards that are not there (tests/fake_card.py): what a card computes is what the CPU computes, on one
card and over two; nothing waits for a card in a forward; what runs out of memory steps down; the plan is what is taken.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig

from halfbyte import finetune
from halfbyte.adapters import dropin
from halfbyte.adapters.unpad import Unpad
from halfbyte.base.modules import offload
from halfbyte.base.modules.places import Places
from halfbyte.inference import generate
from halfbyte.inference import load as opened
from halfbyte.layers import loss, packing
from halfbyte.models import structure, tensors
from halfbyte.objectives.causal_lm import CausalLM
from halfbyte.objectives.objective import mean_scores
from halfbyte.plan import Job, Rows, choose
from halfbyte.proofs.fusing import prove_fused
from halfbyte.proofs.packing import prove_packing
from halfbyte.recipe.schema import Recipe
from halfbyte.system import device
from halfbyte.system.cards import Card
from halfbyte.training.events import Listener
from halfbyte.writing.sampling import SamplingParams
from tests import fake_card, tiny, tiny_run

DROPIN = {"r": 4, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}


class Notes(Listener):
    """What a run says, and how often it made the host wait before each step was told."""

    def __init__(self, cards: fake_card.Cards | None = None) -> None:
        self.cards, self.notes, self.rows, self.waits = cards, list[tuple[str, str]](), list[Any](), list[list[str]]()

    def note(self, label: str, text: str) -> None:
        self.notes.append((label, text))

    def step(self, row: Any) -> None:
        self.rows.append(row)
        if self.cards is not None:
            self.waits.append(list(self.cards.syncs))
            self.cards.syncs.clear()

    def said(self, label: str) -> str:
        return "; ".join(text for name, text in self.notes if name == label)


@contextmanager
def machine(count: int = 1, *, free: int = fake_card.TOTAL_BYTES) -> Iterator[fake_card.Cards]:
    """Under it `device.detect` finds so many cards."""
    detected = device.detect()
    with fake_card.cards(count) as cards:
        cards.limit_bytes = free
        each = tuple(Card(f"card {n}", fake_card.TOTAL_BYTES, free, (9, 0), index=n) for n in range(count))
        here = replace(detected, kind=fake_card.KIND, cards=each)
        with mock.patch.object(device, "detect", return_value=here):
            yield cards


def losses(rows: list[Any]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def of_cpu(folder: Path, **overrides: Any) -> list[float]:
    told = Notes()
    finetune.train(tiny_run.recipe(folder, **overrides), listener=told)
    return losses(told.rows)


@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_a_run_on_a_card_learns_what_it_learns_on_the_cpu(tmp_path: Path, kind: str) -> None:
    """Load, proofs, train, save, resume, evaluate, generate; at most two waits a step."""
    options = {"quant__type": kind, "train__max_steps": 4, "train__save_strategy": "steps", "train__save_steps": 2}
    wanted = of_cpu(tmp_path / "cpu", **options)
    recipe = tiny_run.recipe(tmp_path / "card", **options)
    with machine() as cards:
        told = Notes(cards)
        out = finetune.train(recipe, listener=told)
        assert losses(told.rows) == pytest.approx(wanted, rel=1e-5)
        assert "cu_seq_lens: packed = alone" in told.said("packing")
        assert "gradients as PEFT's" in told.said("engine")
        assert max(len(told.waits[n]) for n in (1, 3)) <= 2, told.waits  # before the others a checkpoint is written
        assert 0 < out.report["peak_device_bytes"] < 10**8
        (tmp_path / "card/run/report.json").unlink()  # as if it had been stopped after its second step
        (tmp_path / "card/run/checkpoints/step-000004").rename(tmp_path / "gone")
        resumed = finetune.train(recipe, resume=True, listener=(again := Notes()))
        assert (resumed.step, losses(again.rows)) == (4, pytest.approx(wanted[2:], rel=1e-5))
        used = opened.open_run(tmp_path / "card" / "run")
        assert used.model.device.type == fake_card.KIND
        prompt = generate.chat_ids(used.tokenizer, [{"role": "user", "content": "red green"}])
        answer = generate.generate(used.model, used.tokenizer, [prompt], SamplingParams(4))
        scored = mean_scores(CausalLM(), used.model, [tiny.batch((5, 9), tiny_run.VOCAB)])
    there = opened.open_run(tmp_path / "cpu" / "run")
    wanted_text = generate.generate(there.model, there.tokenizer, [prompt], SamplingParams(4))
    assert answer == wanted_text
    assert scored["loss"] == pytest.approx(
        mean_scores(CausalLM(), there.model, [tiny.batch((5, 9), tiny_run.VOCAB)])["loss"], 1e-5
    )
    assert json.loads((tmp_path / "card/run/report.json").read_text())["machine"]["kind"] == fake_card.KIND


def adapted(lm: Any) -> Any:
    lm.requires_grad_(False)
    torch.manual_seed(0)
    return dropin.get_peft_model(lm, LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **DROPIN))


def on(lm: Any, places: list[str]) -> Any:
    """A model on one card, or dispatched over several as `from_pretrained(device_map=...)` leaves it."""
    if len(places) == 1:
        return lm.to(places[0])
    from accelerate import dispatch_model

    where = structure.split_map(lm, places)
    return dispatch_model(lm, where, main_device=places[0], skip_keys=lm._skip_keys_device_placement, force_hooks=True)


def gradients(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    packing.install(model, "cu_seq_lens")
    model.train()
    summed = loss.micro_batch_loss(model, batch)
    summed.backward()
    return {"loss": summed.detach().cpu()} | {
        n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_on_cards_are_the_cpus(count: int, tied: bool) -> None:
    """Also where layers and head lie on two cards, with no wait in a forward."""
    batch, changes = tiny.batch((5, 1, 9), 256), {"tie_word_embeddings": tied, "initializer_range": 0.05}
    wanted = gradients(adapted(tiny.model("llama", changes=changes)), batch)
    with fake_card.cards(count) as cards:
        lm = on(tiny.model("llama", changes=changes), [f"{fake_card.KIND}:{n}" for n in range(count)])
        model = adapted(lm)
        assert prove_packing(model).layout == "cu_seq_lens"
        assert prove_fused(model, packed=True).ok
        assert loss.head_of(model) is not None  # logits are never whole
        cards.reset()
        model.train()
        loss.micro_batch_loss(model, batch)
        assert cards.syncs == []
        got = gradients(model, batch)
        assert {p.device.index for p in lm.model.layers.parameters()} == set(range(count))
    assert got.keys() == wanted.keys()
    off = sum(float((got[name] - gradient).double().square().sum()) for name, gradient in wanted.items()) ** 0.5
    assert off <= 1e-6 * sum(float(g.double().square().sum()) for g in wanted.values()) ** 0.5


def padded() -> dict[str, torch.Tensor]:
    """A Trainer's batch: two rows padded on the right."""
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_a_script_with_device_map_auto_trains_on_cards(count: int, tied: bool) -> None:
    """The drop-in on padded rows, with and without the Trainer's number of labels: the loss is on the first card, where
    the Trainer wants it, and the host waits once."""
    changes, kwargs = {"tie_word_embeddings": tied}, {"num_items_in_batch": torch.tensor(18)}
    plain = adapted(tiny.model("llama", changes=changes)).train()
    wanted = [float(plain(**padded(), **extra).loss.detach()) for extra in (kwargs, {})]
    with fake_card.cards(count) as cards:
        lm = on(tiny.model("llama", changes=changes), [f"{fake_card.KIND}:{n}" for n in range(count)])
        model = adapted(lm).train()
        batch = {name: x.to(f"{fake_card.KIND}:0") for name, x in padded().items()}
        model(**batch, **kwargs)  # what is proven once
        hooks = Unpad.attached(structure.body(structure.causal_lm(model)))
        assert hooks is not None
        hooks.reads = False  # as a step with padding sees it
        got = []
        for extra in (kwargs, {}):
            cards.reset()
            loss_ = model(**batch, **extra).loss
            assert len(cards.syncs) <= 1, cards.syncs
            if extra or count == 1:  # torch's own code on logits of two fake cards adds gradients of both
                loss_.backward()
            assert loss_.device == batch["input_ids"].device
            got.append(float(loss_.detach()))
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert got == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("past_hooks", [False, True])
def test_a_quantised_module_on_a_card_takes_a_callers_tensors_and_gives_them_back(past_hooks: bool) -> None:
    """Also where its `forward` is called past torch's hooks, as PEFT before 0.21 calls the module that it adapts."""
    lm, batch = tiny.model("llama"), padded()
    wanted = lm(**batch)
    with fake_card.cards():
        card = f"{fake_card.KIND}:0"
        offload._send_inputs(lm.to(card), Places({}, ("model", "lm_head"), card))
        got = (lm.forward if past_hooks else lm)(**batch)
        assert got.loss.device == got.logits.device == torch.device("cpu")
    torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-5, atol=1e-5)


def test_a_base_on_the_cpu_takes_a_trainers_batch_on_a_card() -> None:
    """transformers' Trainer brings its batches to the machine's card, whether or not the base is there; the loss is
    where the batch is, in training (with and without the number of labels) and in evaluation."""
    model, kwargs = adapted(tiny.model("llama")).train(), {"num_items_in_batch": torch.tensor(18)}
    wanted = [float(model(**padded(), **extra).loss.detach()) for extra in (kwargs, {})]
    with fake_card.cards():
        batch = {name: x.to(f"{fake_card.KIND}:0") for name, x in padded().items()}
        losses = [model(**batch, **extra).loss for extra in (kwargs, {})]
        for loss_ in losses:
            loss_.backward()
        losses.append(model.eval()(**batch).loss)
        assert {loss_.device.type for loss_ in losses} == {fake_card.KIND}
        assert [float(loss_.detach()) for loss_ in losses] == pytest.approx([*wanted, wanted[1]], rel=1e-5)


def test_with_two_visible_cards_a_16_bit_base_is_not_replicated(tmp_path: Path) -> None:
    """The Trainer wraps what is not quantised in DataParallel, whose replicas know nothing of a pack."""
    recipe = tiny_run.recipe(tmp_path, quant__type="none")
    with machine(2), mock.patch.object(torch.cuda, "device_count", return_value=2):
        assert finetune.train(recipe, listener=Notes()).step == 4


def test_a_run_whose_card_is_full_steps_down(whole_base_text: None, tmp_path: Path) -> None:
    """An allocation fails in the middle of a step; the step is made again, smaller, and learns the same."""
    options = {"quant__type": "nf4", "train__max_steps": 3, "train__gradient_checkpointing": "auto"}
    wanted = of_cpu(tmp_path / "cpu", **options)
    recipe = tiny_run.recipe(tmp_path / "card", **options)
    with machine() as cards:
        told = Notes()

        def begin(*_: object) -> None:
            cards.reset()
            cards.limit_bytes = sum(cards.held.values()) + 700_000  # a micro-batch of all rows takes more

        told.begin = begin  # type: ignore[method-assign]
        out = finetune.train(recipe, listener=told)
    assert losses(told.rows) == pytest.approx(wanted, rel=1e-5)
    assert any("an allocation failed: CUDA out of memory" in text for text in out.report["notices"])
    # a part of the base text is longer than every row
    assert out.report["base_text"] == {"text": "not read: memory ran out"}


def test_selective_recomputation_is_no_way_down_on_a_card() -> None:
    """It changes nothing there: what it makes again was made by kernels for CPUs."""
    here = device.Device(fake_card.KIND, (), 2, 2**34, 2**34, (Card("card", 2**33, 2**33, (9, 0)),))
    job = plan_job(here)
    assert choose.recompute_policies(job) == ("none", "full")
    assert choose.step_down_policies(job, "none") == ("none", "full")
    asked = plan_job(here, train={"gradient_checkpointing": "selective"})
    plan = choose.best_plan(asked, here)
    assert (plan.recompute, "would save nothing" in plan.reasons["recompute"]) == ("full", True)


def plan_job(here: device.Device, **fields: Any) -> Job:
    specs = [tensors.spec_of(n, tuple(p.shape), "F32", {}) for n, p in tiny.model("llama").named_parameters()]
    config = tiny.model("llama").config.to_dict()
    values = {"model": "m", "data": {"train": "t"}, "output": "o", **fields}
    return Job.of(Recipe(**values), specs, tensors.facts_of(config, specs), Rows((200,) * 64), here)


def test_kernels_that_add_in_any_order_do_not_fail_the_proof() -> None:
    """A flash backward adds in the order in which its threads end: the same gradients twice differ by rounding."""
    with fake_card.cards():
        model = adapted(tiny.model("llama").to(f"{fake_card.KIND}:0"))
        prove_packing(model)
        exact_backward, noise = fake_card._Sdpa.backward, torch.Generator().manual_seed(0)

        def unordered(ctx: Any, *grads: Any) -> Any:
            gradients = exact_backward(ctx, *grads)
            jitter = [torch.randn(x.shape, generator=noise) * 1e-7 for x in gradients[:3]]
            return *(fake_card.Card(x.real_ * (1 + j), x.device) for x, j in zip(gradients, jitter, strict=False)), None

        with mock.patch.object(fake_card._Sdpa, "backward", staticmethod(unordered)):
            proof = prove_fused(model, packed=True)
    assert proof.ok, proof.reason


def test_a_card_makes_more_logits_at_once_than_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks for a CPU's cache made a card read a large head again for every few rows."""
    monkeypatch.setattr(loss, "CHUNK32", 16 * 500)  # 16 rows
    lines, weight, targets = torch.randn(64, 8), torch.randn(500, 8), torch.zeros(64, dtype=torch.int64)
    with fake_card.cards() as cards:
        where = f"{fake_card.KIND}:0"
        given = lines.to(where).requires_grad_()
        summed = float(loss.head_loss(given, targets.to(where), loss.Head(weight.to(where), None)).detach())
        assert sum("log_softmax" in name for name in cards.calls) == 1  # of one chunk
    wanted = torch.nn.functional.cross_entropy(lines @ weight.T, targets, reduction="sum")
    assert summed == pytest.approx(float(wanted), rel=1e-5)


def test_fp16_on_a_card_scales_its_loss_and_resumes_with_the_scale(tmp_path: Path) -> None:
    """Turing has no bf16: fp16, a scaled loss, and the scale in the checkpoint."""
    options = {"quant__type": "nf4", "quant__compute_dtype": "fp16", "train__max_steps": 4}
    recipe = tiny_run.recipe(tmp_path, **options, train__save_strategy="steps", train__save_steps=2)
    # accelerate's own is for CUDA, and off without it
    gradient_scaler = functools.partial(torch.amp.GradScaler, fake_card.KIND)
    scaler = mock.patch("accelerate.accelerator.get_grad_scaler", side_effect=lambda *_, **__: gradient_scaler())
    with machine(), scaler:
        whole = Notes()
        finetune.train(recipe, listener=whole)
        kept = json.loads((tmp_path / "run/checkpoints/step-000002/optimizer.json").read_text())
        assert kept["scaler"]["scale"] > 1
        (tmp_path / "run/report.json").unlink()
        (tmp_path / "run/checkpoints/step-000004").rename(tmp_path / "gone")
        again = Notes()
        finetune.train(recipe, resume=True, listener=again)
    assert losses(again.rows) == losses(whole.rows)[2:]
