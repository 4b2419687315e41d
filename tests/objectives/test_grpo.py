"""GRPO and RLOO: advantages, weights, loss and gradients are those of their formulas, written out here, and TRL's."""

from __future__ import annotations

import copy
import importlib.util
import math
import random
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte.data.encoding.examples import Example
from halfbyte.objectives import grpo
from halfbyte.objectives.grpo import Grpo, WrittenRow
from halfbyte.proofs.packing import prove_packing
from tests import plain_peft, tiny

CLOSE = {"grpo": 1e-5, "rloo": 1e-4}  # in fp32; RLOO's ratio has the errors of up to nine tokens
REWARDS = np.array([[1.0, 0.0, 0.5, 0.5], [2.0, 2.0, 2.0, 2.0], [0.0, math.nan, 1.0, 0.25]])


@pytest.mark.parametrize("scales", [True, False])
def test_advantages_are_those_of_each_group(scales: bool) -> None:
    got = grpo.advantages(REWARDS, "grpo", scales=scales)
    for group, row in zip(REWARDS, got, strict=True):
        known = group[~np.isnan(group)]
        spread = known.std(ddof=1) + 1e-4 if scales else 1.0
        wanted = [0.0 if math.isnan(r) else (r - known.mean()) / spread for r in group]
        assert row == pytest.approx(wanted, abs=1e-12)
    assert not got[1].any(), "a group without a difference moves nothing"
    if scales:  # normalised over the step, the first group would be another one
        step = (REWARDS - np.nanmean(REWARDS)) / (np.nanstd(REWARDS, ddof=1) + 1e-4)
        assert np.abs(got[0] - step[0]).max() > 0.3


def test_rloo_leaves_each_answer_out_of_its_baseline() -> None:
    got = grpo.advantages(REWARDS, "rloo")
    for group, row in zip(REWARDS, got, strict=True):
        for i, reward in enumerate(group):
            others = np.delete(group, i)
            wanted = 0.0 if math.isnan(reward) else reward - np.nanmean(others)
            assert row[i] == pytest.approx(wanted, abs=1e-12)


def test_weights_of_tokens() -> None:
    counts = [3, 0, 5, 2]
    ways = {"most_tokens": 10, "batch": 2}
    assert grpo.token_weights(counts, "dapo", **ways) == [0.1] * 4
    assert grpo.token_weights(counts, "grpo", **ways) == [1 / 12, 1 / 4, 1 / 20, 1 / 8]
    assert grpo.token_weights(counts, "dr_grpo", **ways) == [1 / 40] * 4
    assert grpo.token_weights(counts, "bnpo", **ways) == [1 / 6, 1 / 6, 1 / 14, 1 / 14]


def rows(model: Any, *, apart: float) -> list[WrittenRow]:
    """Answers to two prompts, three to each, drawn by other probabilities: `apart` from the model's own."""
    draw, noise = random.Random(3), np.random.default_rng(4)
    written = list[WrittenRow]()
    for prompt in (17, 20):
        asked = tuple(draw.randrange(250) for _ in range(prompt))
        for length, advantage in ((5, 1.5), (9, -0.5), (2, -1.0)):
            ids = tuple(draw.randrange(250) for _ in range(length))
            logps = log_probabilities(model, (*asked, *ids), prompt) + apart * noise.standard_normal(length)
            row = WrittenRow((*asked, *ids), (-100,) * prompt + ids, "", asked, "", logps=tuple(logps.tolist()))
            written.append(replace(row, advantage=advantage, weight=0.01 * len(written) + 0.02))
    return written


def log_probabilities(model: Any, ids: tuple[int, ...], prompt: int, temperature: float = 0.7) -> Any:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, prompt - 1 : -1].double()
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(ids[prompt:])[:, None])[:, 0].numpy()


def by_definition(model: Any, written: list[WrittenRow], method: str, epsilon: tuple[float, float]) -> Any:
    """The loss, answer by answer, in fp64 from the model's own logits, with its graph."""
    total = torch.zeros((), dtype=torch.float64)
    for row in written:
        start = len(row.prompt_ids)
        logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, start - 1 : -1].double()
        targets = torch.tensor(row.input_ids[start:])
        logps = torch.log_softmax(logits / 0.7, -1)[torch.arange(len(targets)), targets]
        logs = logps - torch.tensor(row.logps, dtype=torch.float64)
        ratios = [logs.sum().exp()] * len(targets) if method == "rloo" else list(logs.exp())
        for ratio in ratios:
            clipped = min(max(ratio.item(), 1 - epsilon[0]), 1 + epsilon[1])
            value = ratio * row.advantage
            bound = torch.tensor(clipped * row.advantage, dtype=torch.float64)
            if clipped == ratio.item():
                bound = value
            total = total - row.weight * (value if value.item() <= bound.item() else bound)
    return total


@pytest.mark.parametrize("method", ["grpo", "rloo"])
@pytest.mark.parametrize("apart", [0.0, 0.2])
@pytest.mark.parametrize("shares", [False, True])
def test_loss_and_gradients_are_those_of_the_formula(method: str, apart: float, shares: bool) -> None:
    model = plain_peft.adapt(tiny.model("llama"), "all-linear")
    plain = copy.deepcopy(model)
    prove_packing(model)
    written = rows(plain, apart=apart)
    objective = Grpo(0.0, method, 0.7, (0.2, 0.28))
    lay_out = objective.collate_tree if shares else objective.collate
    wanted = by_definition(plain, written, method, (0.2, 0.28))
    wanted.backward()
    gradients = plain_peft.gradients(plain)
    for parts in ([written], [written[:4], written[4:]], [[row] for row in written]):
        model.zero_grad()
        watched: dict[str, Any] = {}
        total = 0.0
        for part in parts:
            loss = objective.loss(model, {**lay_out(part), "watched": watched})
            loss.backward()
            total += loss.item()
        assert total == pytest.approx(float(wanted.detach()), rel=CLOSE[method])
        assert plain_peft.apart(plain_peft.gradients(model), gradients) < CLOSE[method]
    batch = {**lay_out(written), "watched": watched}
    objective.loss(model, batch)
    squares, count = watched["logp_error"]
    assert count == sum(len(row.logps) for row in written)
    assert math.sqrt(squares / count) == pytest.approx(apart, abs=0.06 * bool(apart) + 1e-5)
    assert (watched["clipped"][0] > 0) == (apart > 0)


def test_a_log_probability_of_another_token_is_seen() -> None:
    """Shifted by one, log-probabilities are far further apart than rounding explains."""
    model = plain_peft.adapt(tiny.model("llama"), "all-linear")
    prove_packing(model)
    right = rows(model, apart=0.0)
    errors = []
    for written in (right, [replace(row, logps=(*row.logps[1:], row.logps[0])) for row in right]):
        watched: dict[str, Any] = {}
        Grpo(0.0, "grpo", 0.7).loss(model, {**Grpo().collate(written), "watched": watched})
        errors.append(math.sqrt(watched["logp_error"][0] / watched["logp_error"][1]))
    assert errors[0] < 1e-5 and errors[1] > 1e-2


def test_other_rows_are_learned_as_in_supervised_fine_tuning() -> None:
    """What proofs and rehearsals compute: rows that nobody has written."""
    model = plain_peft.adapt(tiny.model("llama"), "all-linear")
    prove_packing(model)
    ids = tuple(range(3, 20))
    batch = Grpo().collate([Example(ids, (-100, -100, *ids[2:]), "", (), "")])
    Grpo().loss(model, batch).backward()
    got = plain_peft.gradients(model)
    model.zero_grad()
    labels = torch.tensor([[-100, -100, *ids[2:]]])
    (model(input_ids=torch.tensor([ids]), labels=labels, use_cache=False).loss * (len(ids) - 2)).backward()
    assert plain_peft.apart(got, plain_peft.gradients(model)) < 1e-5


# ------------------------------------------------------------------------ TRL
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_it_is_the_loss_of_trl(loss_type: str) -> None:
    from trl import GRPOTrainer

    model = plain_peft.adapt(tiny.model("llama"), "all-linear")
    plain = copy.deepcopy(model)
    prove_packing(model)
    written = rows(plain, apart=0.2)
    counts = [len(row.logps) for row in written]
    weights = grpo.token_weights(counts, loss_type, most_tokens=12, batch=len(written))
    written = [replace(row, weight=w) for row, w in zip(written, weights, strict=True)]
    fake = trl_trainer(plain, loss_type=loss_type, max_completion_length=12, epsilon_high=0.28)
    wanted = GRPOTrainer._compute_loss(fake, plain, trl_inputs(written))
    wanted.backward()
    loss = Grpo(0.0, "grpo", 0.7, (0.2, 0.28)).loss(model, Grpo().collate_tree(written))
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert plain_peft.apart(plain_peft.gradients(model), plain_peft.gradients(plain)) < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_it_is_the_loss_of_trls_rloo() -> None:
    from trl import RLOOTrainer

    model = plain_peft.adapt(tiny.model("llama"), "all-linear")
    plain = copy.deepcopy(model)
    prove_packing(model)
    written = rows(plain, apart=0.05)
    weights = grpo.token_weights([len(row.logps) for row in written], "grpo", most_tokens=12, batch=1)
    written = [replace(row, weight=w) for row, w in zip(written, weights, strict=True)]
    fake = trl_trainer(plain, epsilon_high=0.2)
    inputs = trl_inputs(written)
    inputs["old_logps"] = (inputs.pop("old_per_token_logps") * inputs["completion_mask"]).sum(1)
    wanted = RLOOTrainer._compute_loss(fake, plain, inputs)
    wanted.backward()
    loss = Grpo(0.0, "rloo", 0.7, (0.2, 0.2)).loss(model, Grpo().collate(written))
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert plain_peft.apart(plain_peft.gradients(model), plain_peft.gradients(plain)) < 1e-4


def trl_inputs(written: list[WrittenRow]) -> dict[str, Any]:
    """The same answers as TRL has them: prompts padded on the left, answers on the right."""
    prompt, answer = max(len(r.prompt_ids) for r in written), max(len(r.logps) for r in written)
    inputs: dict[str, Any] = {name: [] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask",
                                                    "old_per_token_logps", "advantages")}  # fmt: skip
    for row in written:
        ids, before, after = row.input_ids[len(row.prompt_ids) :], prompt - len(row.prompt_ids), answer - len(row.logps)
        inputs["prompt_ids"].append([0] * before + list(row.prompt_ids))
        inputs["prompt_mask"].append([0] * before + [1] * len(row.prompt_ids))
        inputs["completion_ids"].append([*ids, *[0] * after])
        inputs["completion_mask"].append([1] * len(ids) + [0] * after)
        inputs["old_per_token_logps"].append([*row.logps, *[0.0] * after])
        inputs["advantages"].append(row.advantage)
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    return {**tensors, "num_items_in_batch": tensors["completion_mask"].sum()}


def trl_trainer(model: Any, **settings: Any) -> Any:
    """What TRL's loss asks its trainer for."""
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x,
        unwrap_model=lambda m: m, is_main_process=True,
    )  # fmt: skip
    args = SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False)
    fake = SimpleNamespace(
        model=model.train(), accelerator=accelerator, args=args, temperature=0.7, beta=0.0, epsilon_low=0.2,
        importance_sampling_level="token", top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)), tools=None,
        model_kwarg_keys={"logits_to_keep"}, is_fsdp_enabled=False, **settings,
    )  # fmt: skip

    def logps(model: Any, ids: Any, mask: Any, keep: int, **_: Any) -> Any:
        places = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        every = torch.log_softmax(logits[:, -keep - 1 : -1] / 0.7, -1)
        return every.gather(2, ids[:, -keep:, None])[..., 0], -(every.exp() * every).sum(-1).detach(), None

    fake._get_per_token_logps_and_entropies = logps
    return fake
