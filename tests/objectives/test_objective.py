"""A second objective needs nothing but itself: it is planned, trained in any split, resumed and evaluated."""

from __future__ import annotations

import copy
import os
import random
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from halfbyte import finetune, objectives
from halfbyte.adapters import lora
from halfbyte.data.encoding.examples import Example
from halfbyte.errors import RunError
from halfbyte.objectives.causal_lm import CausalLM
from halfbyte.objectives.grpo import Grpo
from halfbyte.objectives.labels import Labels, Tags
from halfbyte.objectives.objective import Objective, micro_batch_loss
from halfbyte.objectives.preference import Preference, Unpaired
from halfbyte.objectives.vectors import TextVectors
from halfbyte.plan.job import ObjectiveCost
from halfbyte.proofs.packing import prove_packing
from halfbyte.recipe.schema import Loaded
from halfbyte.runs.folder import RunFolder
from halfbyte.system import device
from halfbyte.training import fit
from halfbyte.training.events import Listener
from halfbyte.training.prepare import prepare
from tests import plain_peft, tiny, tiny_run
from tests.objectives.weighted import Weighted


def rows_of(loaded: Loaded) -> list[dict[str, Any]]:
    return RunFolder(Path(loaded.recipe.output)).read_metrics()


def adapter_bytes(loaded: Loaded) -> bytes:
    return (RunFolder(Path(loaded.recipe.output)).adapter / "adapter_model.safetensors").read_bytes()


def weighted_sum(model: Any, row: Example) -> tuple[torch.Tensor, float]:
    """The loss of a row alone, by torch's own functions, and the sum of its weights."""
    ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels)
    each = F.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), labels[1:], reduction="none")
    weights = torch.where(labels[1:] == -100, 0.0, 0.5 + labels[1:] % 5)
    return (each * weights).sum(), float(weights.sum())


def plain_run(loaded: Loaded) -> list[tuple[float, float]]:
    """Loss and norm of the gradients of each step: a row at a time, PEFT's own forward, AdamW, clipping."""
    recipe = loaded.recipe
    train, examples = recipe.train, prepare(recipe).train.examples
    model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
    torch.manual_seed(train.seed)
    targets = list(lora.choose_targets(model, recipe.lora)[0].names)
    settings = {"r": recipe.lora.r, "lora_alpha": recipe.lora.lora_alpha, "lora_dropout": 0.0}
    model = get_peft_model(model, LoraConfig(**settings, target_modules=targets, task_type="CAUSAL_LM")).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=train.learning_rate, weight_decay=train.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, train.max_steps)
    order = list(range(len(examples)))
    random.Random(f"{train.seed}/0").shuffle(order)
    steps = []
    for start in range(0, train.max_steps * train.rows_per_step, train.rows_per_step):
        parts = [weighted_sum(model, examples[row]) for row in order[start : start + train.rows_per_step]]
        mean = sum(loss for loss, _ in parts) / sum(weight for _, weight in parts)
        mean.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        steps.append((float(mean.detach()), float(norm)))
    return steps


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_any_split_trains_as_plain_torch_does(name: str, tmp_path: Path) -> None:
    tiny_run.checkpoint(tmp_path / "model", name)
    micro_batches, expected = set(), plain_run(tiny_run.recipe(tmp_path, quant__type="none"))
    splits = ("auto", 60, 1) if name == "llama" else ("auto", 1)
    for tokens in splits:
        output = tmp_path / f"run{tokens}"
        more = {"quant__type": "none", "train__max_tokens_per_micro_batch": tokens, "output": output}
        loaded = tiny_run.recipe(tmp_path, **more)
        outcome = finetune.train(loaded, objective=Weighted())
        steps = rows_of(loaded)
        for row, (loss, norm) in zip(steps, expected, strict=True):
            assert row["loss"] == pytest.approx(loss, rel=1e-4)
            assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)
        micro_batches.add(steps[0]["micro_batches"])
        assert outcome.exit_code == 0
    assert len(micro_batches) == len(splits)
    other = tiny_run.recipe(tmp_path, quant__type="none", output=tmp_path / "other")
    finetune.train(other)
    assert abs(rows_of(other)[0]["loss"] - steps[0]["loss"]) > 1e-3, "the weights count"


def test_gradients_of_a_micro_batch_are_those_of_its_rows() -> None:
    model = plain_peft.adapt(tiny.model("llama"), "all-linear")
    plain = copy.deepcopy(model)
    prove_packing(model)
    draw = random.Random(0)
    texts = [tuple(draw.randrange(256) for _ in range(length)) for length in (7, 3, 19)]
    rows = [Example(ids, (-100, -100, *ids[2:]), "", (), "") for ids in texts]
    micro_batch_loss(Weighted(), model, Weighted().collate(rows)).backward()
    sum(weighted_sum(plain, row)[0] for row in rows).backward()  # type: ignore[union-attr]
    assert plain_peft.apart(plain_peft.gradients(model), plain_peft.gradients(plain)) < 1e-5


class Stop(Listener):
    """A signal after the second step."""

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_resumed_run_ends_in_the_same_bytes_and_knows_its_objective(tmp_path: Path) -> None:
    more = {"lora__lora_dropout": 0.1, "train__max_tokens_per_micro_batch": 60}
    loaded = tiny_run.recipe(tmp_path, **more)
    assert finetune.train(loaded, objective=Weighted(), listener=Stop()).step == 2
    with pytest.raises(RunError, match="with the objective weighted, and now causal_lm is asked for"):
        finetune.train(loaded, resume=True)
    with pytest.raises(RunError, match=r"has changed since step 2 .*: it was 16 other rows"):
        finetune.train(loaded, resume=True, objective=Weighted(shift=1))
    finetune.train(loaded, resume=True, objective=Weighted())
    whole = tiny_run.recipe(tmp_path, **more, output=tmp_path / "whole")
    finetune.train(whole, objective=Weighted())
    assert adapter_bytes(loaded) == adapter_bytes(whole)
    assert [row["loss"] for row in rows_of(loaded)] == [row["loss"] for row in rows_of(whole)]


def test_an_evaluation_has_its_scores(tmp_path: Path) -> None:
    tiny_run.rows(tmp_path / "eval.jsonl", 9, seed=5)
    more = {"quant__type": "none", "data__eval": tmp_path / "eval.jsonl", "train__eval_on_start": True}
    loaded = tiny_run.recipe(tmp_path, **more)
    report = finetune.train(loaded, objective=Weighted()).report
    evaluations = [row for row in rows_of(loaded) if "eval_loss" in row]
    held_out = prepare(loaded.recipe).evaluation
    assert held_out is not None
    model = AutoModelForCausalLM.from_pretrained(loaded.recipe.model, dtype=torch.float32)
    with torch.no_grad():
        parts = [weighted_sum(model, row) for row in held_out.examples]
    weight = sum(weight for _, weight in parts)
    assert evaluations[0]["eval_loss"] == pytest.approx(float(sum(loss for loss, _ in parts)) / weight, rel=1e-5)
    assert evaluations[0]["eval_weight"] == weight and "eval_perplexity" not in evaluations[0]
    assert report["eval_loss"] == min(row["eval_loss"] for row in evaluations)


def test_its_cost_is_planned(tmp_path: Path) -> None:
    recipe, machine = tiny_run.recipe(tmp_path).recipe, replace(device.detect(), cards=())

    def plan(cost: ObjectiveCost) -> Any:
        class Costly(Weighted):
            pass

        Costly.cost = cost
        return fit.plan_run(recipe, machine, objective=Costly()).plan

    some, more = (plan(ObjectiveCost(whole_logits=count)).line("logits") for count in (10_000, 20_000))
    labelled = (more - some) / (10_000 * 4 * tiny_run.VOCAB)
    rows = prepare(recipe).train
    assert labelled == int(labelled) and 4 <= labelled <= sum(sorted(rows.lengths)[-4:])
    alone, twice = (plan(ObjectiveCost(forwards=count)).time for count in (0, 1))
    assert twice.parts["attention"] / alone.parts["attention"] == pytest.approx(18 / 14)
    assert 1.3 < twice.parts["matrix products"] / alone.parts["matrix products"] < 1.51


def test_the_first_objective_and_the_toy_are_objectives() -> None:
    both: list[Objective] = [CausalLM(), Weighted()]
    assert [objective.name for objective in both] == ["causal_lm", "weighted"]


def test_what_an_objective_may_say_has_defaults_in_one_place() -> None:
    """All objectives are subclasses of the seam, which says nothing by default; nobody asks one for a member that it
    may not have, but for the tree of beginnings and the head of labels."""
    toy = Weighted()
    assert (toy.watches, toy.step_names, toy.coupled, toy.together, toy.of_base) == ((), (), False, False, "")
    for cls in (CausalLM, Grpo, Preference, Unpaired, Labels, Tags, TextVectors):
        assert Objective in cls.__mro__ and {"row_vectors", "all_sums", "step_of", "step_sums"} <= set(dir(cls))
    asks = re.compile(r"(?:get|has)attr\([\w.]*objective, (\w+|\"\w+\")")
    sources = Path(objectives.__file__).parents[1].rglob("*.py")
    asked = {(path.stem, name) for path in sources for name in asks.findall(path.read_text(encoding="utf-8"))}
    assert asked == {("prepare", "COLLATE_TREE"), ("heads", '"width"'), ("heads", '"kind"')}
