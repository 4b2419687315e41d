"""Labels with weights: the loss is the weighted mean over a step, by numpy, in any split, shared beginnings too."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte import finetune
from halfbyte.data import collate
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.inference import load as opened_run
from halfbyte.inference.evaluate import evaluate
from halfbyte.objectives.causal_lm import CausalLM
from halfbyte.objectives.objective import evaluate as sums_of
from halfbyte.objectives.objective import micro_batch_loss, scores_of
from halfbyte.proofs.packing import prove_packing
from halfbyte.runs.folder import RunFolder
from halfbyte.scoring.sheet import EvalOptions
from tests import plain_peft, tiny, tiny_run

CLOSE = 1e-5


def weighed_rows() -> list[Example]:
    """Three begin alike; one has no weights of its own."""
    draw = random.Random(0)
    begin = [draw.randrange(5, 256) for _ in range(40)]
    texts = [(*begin, *(draw.randrange(5, 256) for _ in range(n))) for n in (9, 3, 14)]
    texts += [tuple(draw.randrange(5, 256) for _ in range(n)) for n in (6, 23)]
    rows = []
    for number, ids in enumerate(texts):
        labels = tuple(IGNORED if i == 0 or draw.random() < 0.2 else token for i, token in enumerate(ids))
        weights = tuple(draw.choice((0.25, 0.5, 1.0, 3.0)) for _ in ids) if number != 3 else ()
        rows.append(Example(ids, labels, f"r:{number}", (), "", weights=weights))
    return rows


def by_numpy(model: Any, row: Example) -> tuple[float, float]:
    """Weighted sum of a row's losses, and of its weights, in float64 from the model's own logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0].double().numpy()
    total = count = 0.0
    for at in range(1, len(row.labels)):
        if row.labels[at] != IGNORED:
            weight = row.weights[at] if row.weights else 1.0
            before = logits[at - 1]
            top = before.max()
            total += weight * (top + np.log(np.exp(before - top).sum()) - before[row.labels[at]])
            count += weight
    return total, count


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_any_split_has_the_loss_and_the_gradients_of_the_weighted_mean(smoothing: float) -> None:
    model = plain_peft.adapt(tiny.model("llama"), "all-linear")
    prove_packing(model)
    rows, objective = weighed_rows(), CausalLM(smoothing)
    total, count = (sum(each) for each in zip(*(by_numpy(model, row) for row in rows), strict=True))
    assert count != sum(label != IGNORED for row in rows for label in row.labels)
    gradients = []
    for cuts in ((), (1,), (2, 3), (1, 2, 3, 4)):
        for lay_out in (objective.collate, objective.collate_tree):
            model.zero_grad()
            parts = [rows[a:b] for a, b in itertools.pairwise((0, *cuts, len(rows)))]
            batches = [lay_out(part) for part in parts]
            assert sum(objective.weight(batch) for batch in batches) == pytest.approx(count)
            loss = sum(micro_batch_loss(objective, model, batch) for batch in batches) / count
            assert isinstance(loss, torch.Tensor)
            loss.backward()
            gradients.append(plain_peft.gradients(model))
            if not smoothing:
                assert loss.item() == pytest.approx(total / count, rel=CLOSE)
    assert all(plain_peft.apart(each, gradients[0]) < CLOSE for each in gradients[1:])


def test_an_evaluation_is_weighed_too_text_by_text() -> None:
    model = tiny.model("llama").eval()
    prove_packing(model)
    rows, objective = weighed_rows(), CausalLM()
    wanted = np.array([by_numpy(model, row) for row in rows])
    for lay_out in (collate.collate, collate.collate_tree):
        found = sums_of(objective, model, [lay_out(rows[:3]), lay_out(rows[3:])])
        np.testing.assert_allclose(found[:, :2], wanted, rtol=CLOSE)
        scores = scores_of(objective, found)
        assert scores["loss"] == pytest.approx(wanted[:, 0].sum() / wanted[:, 1].sum(), rel=CLOSE)
        assert type(scores["labelled_tokens"]) is int and abs(scores["labelled_tokens"] - wanted[:, 1].sum()) <= 0.5


def test_a_run_weighs_them_in_training_and_in_evaluation(tmp_path: Path) -> None:
    """The first step's loss and the base's held-out one, by numpy; `eval` says the same; and without weights others."""
    held_out = tiny_run.rows(tmp_path / "test.jsonl", 8, seed=3)
    values: dict[str, Any] = {"quant__type": "none", "data__eval": str(held_out), "train__eval_on_start": True}
    values |= {"train__learning_rate": 1e-12, "train__max_steps": 1}
    plain = tiny_run.recipe(tmp_path, **values)
    finetune.train(plain)
    loaded = tiny_run.recipe(tmp_path, **values, data__weights={"red|blue": 3, "cup": 0}, output=tmp_path / "weighed")
    finetune.train(loaded)
    rows = RunFolder(tmp_path / "weighed").read_metrics()
    opened = opened_run.open_run(tmp_path / "weighed")
    from halfbyte.training.prepare import prepare

    prepared = prepare(loaded.recipe)
    assert prepared.evaluation is not None
    with opened.using(base=True):
        model = opened.model
        sums = np.array([by_numpy(model, row) for row in prepared.evaluation.examples]).sum(0)
        order = list(range(16))
        random.Random("42/0").shuffle(order)
        first = np.array([by_numpy(model, prepared.train.examples[n]) for n in order[:4]]).sum(0)
    assert next(r["eval_loss"] for r in rows if "eval_loss" in r) == pytest.approx(sums[0] / sums[1], rel=1e-4)
    step = next(r for r in rows if "loss" in r)
    assert step["loss"] == pytest.approx(first[0] / first[1], rel=1e-4)
    scored = evaluate(opened, EvalOptions.of(loaded.recipe.eval)).scores[0].adapter
    assert scored is not None and scored.value == pytest.approx(sums[0] / sums[1], rel=1e-4)
    before = next(r for r in RunFolder(Path(plain.recipe.output)).read_metrics() if "loss" in r)
    assert abs(before["loss"] - step["loss"]) > 1e-3
    assert json.loads((tmp_path / "weighed" / "report.json").read_text())["data"]["gates"][0]["gate"] == "labels"
