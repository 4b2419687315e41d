"""A run stops where it would learn nothing, or from what is not finite, and says of which rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import TrainerCallback

from halfbyte import finetune
from halfbyte.errors import TrainError
from halfbyte.layers import loss
from halfbyte.objectives import objective
from halfbyte.proofs.packing import prove_packing
from halfbyte.runs.folder import RunFolder
from halfbyte.training import pace, watch
from halfbyte.training.trainer import StepTrainer
from tests import plain_peft, tiny, tiny_run

Patch = pytest.MonkeyPatch


def at_micro_batch(patch: Patch, number: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The loss of one micro-batch of the run, changed."""
    real, seen = objective.micro_batch_loss, [0]

    def faulty(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen[0] += 1
        summed = real(*args, **kwargs)
        return change(summed) if seen[0] == number else summed

    patch.setattr(objective, "micro_batch_loss", faulty)


def small(folder: Path, **more: Any) -> Any:
    return tiny_run.recipe(folder, train__max_tokens_per_micro_batch=32, **more)


def test_a_loss_that_is_not_finite_names_the_rows_of_its_micro_batch(tmp_path: Path, monkeypatch: Patch) -> None:
    at_micro_batch(monkeypatch, 6, lambda summed: summed * torch.nan)
    with pytest.raises(TrainError, match=r"the loss is nan at step 2 \(rows ") as raised:
        finetune.train(small(tmp_path))
    path = tmp_path / "run" / watch.BATCH
    assert f"The batch is in {path}" in str(raised.value)
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        about, names = file.metadata(), file.keys()
        ids = file.get_tensor("0.input_ids")
    rows = json.loads(about["rows"])
    assert about["step"] == "2" and 1 <= len(rows) < 4, "not those of the whole step"
    assert f"rows {', '.join(rows)})" in str(raised.value)
    assert {n.partition(".")[2] for n in names} >= {"input_ids", "position_ids", "cu_seq_lens_q", "keep", "targets"}
    texts = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    said = tiny_run.tokenizer().decode(ids[0])
    for where in rows:
        assert texts[int(where.rpartition(":")[2]) - 1]["completion"] in said


class Explode(torch.autograd.Function):
    """Forward nothing, backward infinities."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * torch.inf


def test_a_gradient_that_is_not_finite_under_a_healthy_loss(tmp_path: Path, monkeypatch: Patch) -> None:
    at_micro_batch(monkeypatch, 2, Explode.apply)
    with pytest.raises(
        TrainError, match=r"the gradients' norm is (nan|inf), of \d+ tensors, .*lora_.* at step 1 \(rows"
    ):
        finetune.train(small(tmp_path))
    assert (tmp_path / "run" / watch.BATCH).is_file()
    assert not RunFolder(tmp_path / "run").read_metrics(), "the step was not made"


def test_without_the_check_the_run_would_go_on(tmp_path: Path, monkeypatch: Patch) -> None:
    """The Trainer steps over NaN gradients into NaN weights without a word."""
    at_micro_batch(monkeypatch, 2, Explode.apply)
    monkeypatch.setattr(watch, "check", lambda *_, **__: None)
    monkeypatch.setattr(math, "isfinite", lambda _: True)
    outcome = finetune.train(small(tmp_path))
    assert outcome.step == 4 and all(
        row["loss"] != row["loss"] for row in RunFolder(tmp_path / "run").read_metrics()[1:]
    )


def test_a_batch_that_cannot_be_saved_ends_the_run_with_the_same_words(tmp_path: Path, monkeypatch: Patch) -> None:
    at_micro_batch(monkeypatch, 1, lambda summed: summed * torch.inf)
    monkeypatch.setattr(watch, "save", lambda *_: None)
    with pytest.raises(TrainError, match=r"loss is inf at step 1 \(rows [^)]*\)\.\n  fix: nothing has been"):
        finetune.train(small(tmp_path))


def test_an_adapter_of_zero_gradients_stops_the_first_step(tmp_path: Path, monkeypatch: Patch) -> None:
    real = pace.Pace.largest

    def cut(self: pace.Pace, rows: Any) -> int:
        for name, p in self.model.named_parameters():  # type: ignore[attr-defined]
            if "layers.1.self_attn.q_proj" in name and p.grad is not None:
                p.grad.zero_()
        return real(self, rows)

    first = StepTrainer.training_step

    def step(self: StepTrainer, *args: Any, **kwargs: Any) -> Any:
        self.pace.model = self.model  # type: ignore[attr-defined]
        monkeypatch.setattr(pace.Pace, "largest", cut)
        return first(self, *args, **kwargs)

    monkeypatch.setattr(StepTrainer, "training_step", step)
    with pytest.raises(TrainError, match=r"1 trained tensors or layers got no gradient.*layers\.1\.self_attn\.q_proj"):
        finetune.train(tiny_run.recipe(tmp_path))


def test_rows_of_two_tokens_may_give_no_gradient() -> None:
    model = plain_peft.adapt(tiny.model("llama"), "all-linear")
    prove_packing(model)
    model.train()
    loss.micro_batch_loss(model, tiny.batch([5, 2], 256)).backward()
    watch.check_first(model, longest=5)
    for name, p in model.named_parameters():
        if p.grad is not None and "layers.1.self_attn.q_proj" in name:
            p.grad.zero_()
    watch.check_first(model, longest=2)
    with pytest.raises(TrainError, match=r"1 trained .* layers\.1\.self_attn\.q_proj|layers\.1\.self_attn\.q_proj"):
        watch.check_first(model, longest=3)


class Undo(TrainerCallback):
    """Puts some adapters back after each step of the optimiser."""

    def __init__(self, model: Any, part: str) -> None:
        self.saved = [(p, p.detach().clone()) for n, p in model.named_parameters() if p.requires_grad and part in n]

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for p, before in self.saved:
            p.data.copy_(before)


@pytest.mark.parametrize(("part", "moved", "code"), [("lora", 0, 1), ("layers.0.mlp", 11, 0), ("nothing", 14, 0)])
def test_an_adapter_that_training_does_not_move_is_told(
    part: str, moved: int, code: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    real = StepTrainer.train

    def train(self: StepTrainer, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(Undo(self.model, part))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(StepTrainer, "train", train)
    outcome = finetune.train(tiny_run.recipe(tmp_path, lora__target_modules="all-linear"))
    assert outcome.report["adapters"] == {"layers": 14, "moved": moved}
    assert outcome.exit_code == code
    told = [n for n in outcome.report["notices"] if "still what they were at the start" in n]
    assert len(told) == (moved < 14)
