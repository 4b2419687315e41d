"""Losses of preferences are their papers' formulas, whatever a step is split into."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte import finetune
from halfbyte.data import collate
from halfbyte.data.encoding.examples import IGNORED
from halfbyte.errors import RecipeError
from halfbyte.objectives import preference
from halfbyte.proofs.packing import prove_packing
from halfbyte.recipe.method import FORMATS, LOSS_TYPES
from halfbyte.recipe.schema import Train
from halfbyte.runs.folder import RunFolder
from halfbyte.training.prepare import prepare
from tests import pairs, plain_peft, tiny, tiny_run
from tests.distributed import together

METHOD = [*((method, name) for method in FORMATS for name in LOSS_TYPES.get(method, (None,)))]
MORE: list[tuple[str, dict[str, Any]]] = [
    *((method, {"loss_type": name} if name else {}) for method, name in METHOD),
    ("dpo", {"label_smoothing": 0.2}), ("dpo", {"ld_alpha": 0.3}), ("dpo", {"rpo_alpha": 0.7}),
    ("ipo", {"rpo_alpha": 0.7, "ld_alpha": 0.0}), ("cpo", {"label_smoothing": 0.1}), ("simpo", {"cpo_alpha": 0.5}),
    ("kto", {"desirable_weight": 2.0, "undesirable_weight": 0.5}),
]  # fmt: skip


def objective_of(method: str, fields: dict[str, Any]) -> Any:
    smoothing = {"label_smoothing": 0.05} if fields.get("loss_type") in ("robust", "exo_pair") else {}
    return preference.of(Train(method=method, **{"beta": 0.3, **smoothing, **fields}))


def log_p(model: Any, example: Any) -> list[np.ndarray[Any, Any]]:
    """Of each text the log-probability of every token after the first, by the model's own forward."""
    every = []
    for text in example.texts:
        ids = torch.tensor([text.input_ids])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        every.append(torch.log_softmax(logits, -1)[torch.arange(len(ids[0]) - 1), ids[0, 1:]].numpy())
    return every


def by_hand(asks: Any, examples: list[Any], policy: list[Any], reference: list[Any]) -> float:
    """The loss of a step in numpy, from the papers' formulas and TRL's words on them."""
    beta, share, losses = asks.beta, asks.label_smoothing or 0.0, []
    own_sum, own_tokens, kls, ratios = 0.0, 0, [], []

    def logsig(z: float) -> float:
        return -math.log1p(math.exp(-z))

    def sig(z: float) -> float:
        return 1 / (1 + math.exp(-z))

    for example, mine, theirs in zip(examples, policy, reference, strict=True):
        answers = [np.array(text.labels[1:]) != IGNORED for text in example.texts]
        p, q = ([each[mask] for each, mask in zip(side, answers, strict=True)] for side in (mine, theirs))
        lengths = [len(each) for each in p]
        alpha, n = (1.0 if asks.ld_alpha is None else asks.ld_alpha), min(lengths)
        (c, r), (cr, rr) = ([x[:n].sum() + alpha * x[n:].sum() for x in side] for side in (p, q))
        if asks.method == "orpo":
            own_sum, own_tokens = own_sum - mine[0].sum(), own_tokens + len(mine[0])
        else:
            own_sum, own_tokens = own_sum - p[0].sum(), own_tokens + lengths[0]
        if asks.method in ("orpo", "cpo", "simpo"):
            cr = rr = 0.0
        a, b = c - cr, r - rr
        d, mean = a - b, a / lengths[0] - b / lengths[1]
        kls.append(b), ratios.append((a, example.desirable))
        z, name = beta * d, asks.loss_type or asks.method
        smooth = -(1 - share) * logsig(z) - share * logsig(-z)
        if name == "simpo":
            z = beta * mean - asks.simpo_gamma
            smooth = -(1 - share) * logsig(z) - share * logsig(-z)
        if name == "orpo":
            odds = [math.exp(x / n) / (1 - math.exp(x / n)) for x, n in ((c, lengths[0]), (r, lengths[1]))]
            losses.append(-beta * logsig(math.log(odds[0] / odds[1])))
        elif name in ("sigmoid", "simpo"):
            losses.append(smooth)
        elif asks.method != "kto":
            losses.append({
                "sigmoid_norm": -logsig(beta * mean),
                "hinge": max(0.0, 1 - z),
                "ipo": (mean - 1 / (2 * beta)) ** 2,
                "robust": (-(1 - share) * logsig(z) + share * logsig(-z)) / (1 - 2 * share),
                "exo_pair": 0.0 if not share else sig(z) * (logsig(z) - math.log(1 - share))
                + sig(-z) * (logsig(-z) - math.log(share)),
                "nca_pair": -logsig(beta * a) - 0.5 * logsig(-beta * a) - 0.5 * logsig(-beta * b),
                "bco_pair": -logsig(beta * a) - logsig(-beta * b),
                "sppo_hard": (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2,
                "apo_zero": 1 - sig(beta * a) + sig(beta * b),
                "apo_down": sig(beta * a) + 1 - sig(z),
                "discopop": -logsig(z) * (1 - sig(z / 0.05)) + math.exp(-z) * sig(z / 0.05),
            }[name])  # fmt: skip
    if asks.method == "kto":
        kl = max(0.0, float(np.mean(kls))) if asks.loss_type == "kto" else 0.0
        weight = {True: asks.desirable_weight, False: asks.undesirable_weight}
        losses = [weight[good] * (1 - sig(beta * (a - kl if good else kl - a))) for a, good in ratios]
    own = 1.0 if asks.method == "orpo" else asks.cpo_alpha or asks.rpo_alpha or 0.0
    return float(np.mean(losses)) + own * own_sum / own_tokens


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any, Any]:
    """A model that has learned something, the same for packs of rows, and its reference."""
    plain = plain_peft.adapt(tiny.model("llama"), "all-linear")
    ours, reference = copy.deepcopy(plain), copy.deepcopy(plain)
    for name, parameter in reference.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    prove_packing(ours)
    return plain, ours, reference


@pytest.mark.parametrize("lay_out", ["collate", "collate_tree"])
@pytest.mark.parametrize(("method", "fields"), MORE, ids=[f"{m}-{'-'.join(map(str, f.values()))}" for m, f in MORE])
def test_a_step_is_the_formula(method: str, fields: dict[str, Any], lay_out: str, models: tuple[Any, Any, Any]) -> None:
    plain, ours, reference = models
    objective, rows = objective_of(method, fields), pairs.examples(verdicts=method == "kto")
    policy, theirs = ([log_p(model, row) for row in rows] for model in (plain, reference))
    n = [[sum(x != IGNORED for x in text.labels) for text in row.texts] for row in rows]
    alpha = 1.0 if objective.asks.ld_alpha is None else objective.asks.ld_alpha
    known = [
        replace(row, reference=tuple(
            float(x[-a:][: min(both)].sum() + alpha * x[-a:][min(both) :].sum())
            for x, a in zip(each, both, strict=True)
        ))
        for row, each, both in zip(rows, theirs, n, strict=True)
    ]  # fmt: skip
    wanted = by_hand(objective.asks, rows, policy, theirs)
    gradients = []
    splits = [[[0, 1, 2, 3, 4]], [[0, 2, 4], [1, 3]], [[0], [1], [2], [3], [4]]]
    for split in splits if lay_out == "collate_tree" else splits[1:2]:
        batches = collate.Batches(known, [tuple(part) for part in split], getattr(objective, lay_out))
        with torch.no_grad():
            step = objective.step_sums(ours, batches) if objective.step_names else {}
        ours.zero_grad()
        losses = [objective.loss(ours, {**batch, "step": step} if step else batch) for batch in batches]
        assert sum(map(objective.weight, batches)) == len(rows)
        total = torch.stack(losses).sum() / len(rows)
        assert float(total.detach()) == pytest.approx(wanted, rel=1e-5)
        total.backward()
        gradients.append(plain_peft.gradients(ours))
    assert all(plain_peft.apart(each, gradients[0]) < 1e-5 for each in gradients[1:])


def recipe(folder: Path, method: str, **values: Any) -> Any:
    folder.mkdir(exist_ok=True)
    if not (folder / "train.jsonl").exists():
        pairs.rows(folder / "train.jsonl", verdicts=method == "kto")
    return tiny_run.recipe(folder, **{"train__method": method, **values})


def steps_of(loaded: Any) -> list[dict[str, Any]]:
    return [row for row in RunFolder(Path(loaded.recipe.output)).read_metrics() if "loss" in row]


@pytest.mark.parametrize(
    ("method", "loss"), [("dpo", math.log(2)), ("ipo", 25.0), ("kto", 0.5)], ids=["dpo", "ipo", "kto"]
)
def test_a_run_begins_where_its_reference_is(method: str, loss: float, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, method)
    finetune.train(loaded)
    first, *_, last = steps_of(loaded)
    assert first["loss"] == pytest.approx(loss, rel=1e-4)
    assert first["chosen_reward"] == pytest.approx(0, abs=1e-4)
    assert first["kl" if method == "kto" else "margin"] == pytest.approx(0, abs=1e-4)
    assert last["loss"] < first["loss"] - 1e-3
    assert 2 < first["answer_tokens"] < 30


def test_in_bf16_too_the_first_step_is_at_ln_2(tmp_path: Path) -> None:
    """The reference is read in the micro-batches of the step, so both round alike."""
    loaded = recipe(tmp_path, "dpo", quant__compute_dtype="bf16", train__max_tokens_per_micro_batch=160)
    finetune.train(loaded)
    assert steps_of(loaded)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_plan_counts_what_orpo_labels(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, "orpo")
    prepared = prepare(loaded.recipe)
    counts = prepared.objective.labels(prepared.train)
    for example, count in zip(prepared.train.examples, counts, strict=True):
        assert 0 <= count - len(prepared.objective.collate([example])["targets"]) <= 1


SPLITS: list[tuple[str, dict[str, Any]]] = [
    ("dpo", {}), ("kto", {}), ("orpo", {}), ("cpo", {"train__loss_type": "hinge"}), ("simpo", {}),
    ("ipo", {"quant__placement": "streamed"}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "more"), SPLITS, ids=[m for m, _ in SPLITS])
def test_any_split_trains_the_same(method: str, more: dict[str, Any], tmp_path: Path) -> None:
    runs: dict[Any, Any] = {}
    for tokens in ("auto", 100, 1) if method == "dpo" else ("auto", 1):
        values = {"train__max_tokens_per_micro_batch": tokens, "output": tmp_path / f"run{tokens}"}
        loaded = recipe(tmp_path, method, quant__type="none", train__max_steps=2, **more, **values)
        finetune.train(loaded)
        runs[tokens] = steps_of(loaded)
    assert len({rows[0]["micro_batches"] for rows in runs.values()}) == len(runs)
    for rows in runs.values():
        for row, wanted in zip(rows, runs["auto"], strict=True):
            for name in ("loss", "grad_norm", "accuracy", "chosen_reward"):
                # a reward is the difference of sums of logarithms of some hundred nats
                least = 1e-6 if name == "chosen_reward" else 0.0
                assert row[name] == pytest.approx(wanted[name], rel=1e-6, abs=least), name


def train(path: Path, resume: bool = False) -> int:
    from halfbyte.recipe.file import load_recipe

    return finetune.train(load_recipe(path), resume=resume).step


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("method", [m for m, _ in SPLITS])
def test_any_number_of_processes_trains_the_same(method: str, size: int, tmp_path: Path) -> None:
    values = {"data__eval": 3, "train__eval_strategy": "steps", "train__eval_steps": 2}
    one = recipe(tmp_path, method, output=tmp_path / "one", **values)
    finetune.train(one)
    several = recipe(tmp_path, method, output=tmp_path / "several", **values)
    together.run(size, train, several.path)
    rows, wanted = (RunFolder(Path(x.recipe.output)).read_metrics() for x in (several, one))
    for row, other in zip(rows, wanted, strict=True):
        # From the third step on the optimiser has twice divided gradients that differ by roundings by their own size;
        # without a reference beta x 2^-24 x some hundred nats of log p are among these, of SimPO 2 x.
        allowed = {"cpo": 5e-6, "simpo": 1e-5}.get(method, 1e-6) if row["step"] > 2 else 1e-6
        for name in ("loss", "grad_norm", "accuracy", "chosen_reward", "eval_loss", "eval_accuracy"):
            assert (name in row) == (name in other)
            assert row.get(name, 0.0) == pytest.approx(other.get(name, 0.0), rel=allowed, abs=allowed), name


def test_each_method_reads_its_own_fields_alone(tmp_path: Path) -> None:
    pairs.rows(tmp_path / "train.jsonl")
    with pytest.raises(RecipeError) as refused:
        tiny_run.recipe(tmp_path, train__method="dpo", train__simpo_gamma=1.0, train__label_smoothing_factor=0.1,
                        train__learning_rate="auto", data__mask="all", train__within="1h")  # fmt: skip
    text = str(refused.value)
    for part in ("simpo_gamma is not read with train.method dpo; simpo read it", "train.label_smoothing_factor 0.1 is",
                 "train.learning_rate auto is a law of sft", "data.mask all", "train.within 1h"):  # fmt: skip
        assert part in text
    with pytest.raises(RecipeError, match=r"train\.beta is not read with train.method sft; dpo, ipo, kto, orpo"):
        tiny_run.recipe(tmp_path, train__beta=0.1)
    with pytest.raises(RecipeError, match=r"aot.*it sorts the texts of a whole batch"):
        tiny_run.recipe(tmp_path, train__method="dpo", train__loss_type="aot")
    with pytest.raises(RecipeError, match=r"data\.format preference, and data\.format is alpaca"):
        tiny_run.recipe(tmp_path, train__method="dpo", data__format="alpaca")
    with pytest.raises(RecipeError, match=r"int8: train.method dpo reads its reference by exact products"):
        tiny_run.recipe(tmp_path, train__method="dpo", quant__compute="int8")
    with pytest.raises(RecipeError, match="one of sft, dpo"):
        tiny_run.recipe(tmp_path, train__method="ppo")
