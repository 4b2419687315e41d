"""What of the logits a request may change, and what is left to draw from, against definitions written out in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from halfbyte.inference.generate import generate_ids, stop_ids
from halfbyte.writing.sampling import Sampler, SamplingParams, adjusted, narrowed
from tests import tiny, tiny_run

SIZE = 700
LOGITS = np.random.default_rng(5).normal(size=SIZE).astype(np.float32) * 2
WRITTEN = [3, 3, 3, 17, 650, 17, 0]


def penalised(logits: Any, written: list[int], frequency: float, presence: float, bias: dict[int, float]) -> Any:
    """As OpenAI's reference has it, token by token."""
    changed = logits.astype(np.float64)
    for token in range(len(logits)):
        times = written.count(token)
        changed[token] += -times * frequency - (times > 0) * presence + bias.get(token, 0.0)
    return changed


@pytest.mark.parametrize(
    ("frequency", "presence", "bias"),
    [(0.7, 0.0, {}), (0.0, -1.5, {}), (0.0, 0.0, {5: 100.0, 3: -2.5}), (-0.4, 1.1, {17: 3.25, 699: -100.0})],
)
def test_penalties_and_biases_are_those_of_their_definition(
    frequency: float, presence: float, bias: dict[int, float]
) -> None:
    params = SamplingParams(
        frequency_penalty=frequency, presence_penalty=presence, logit_bias=tuple(sorted(bias.items()))
    )
    logits = torch.from_numpy(LOGITS.copy())
    found = adjusted(logits, WRITTEN, params).numpy()
    wanted = penalised(LOGITS, WRITTEN, frequency, presence, bias)
    # fp32: each of four operations rounds a number of at most 128 by 2^-24 of it
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4 * 128 * 2**-24)
    np.testing.assert_array_equal(logits.numpy(), LOGITS)
    assert Sampler(params).choose(logits, [1], WRITTEN) == int(wanted.argmax())
    assert not Sampler(params).greedy and Sampler(SamplingParams()).greedy


def left(top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """Tokens that may be drawn, with their probabilities."""
    weights = np.exp(LOGITS.astype(np.float64) / 0.8)
    order = sorted(range(SIZE), key=lambda token: -weights[token])[: top_k or SIZE]
    total, nucleus, whole = 0.0, [], sum(weights[token] for token in order)
    for token in order:
        nucleus.append(token)
        total += weights[token] / whole
        if total >= top_p:
            break
    kept = [token for token in nucleus if weights[token] >= min_p * weights[order[0]]]
    whole = sum(weights[token] for token in kept)
    return {token: weights[token] / whole for token in kept}


@pytest.mark.parametrize("top_k", [0, 1, 7, 600, 5000])
@pytest.mark.parametrize("top_p", [0.4, 0.95, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.6, 1.0])
def test_what_is_left_to_draw_from_is_that_of_its_definition(top_k: int, top_p: float, min_p: float) -> None:
    params = SamplingParams(temperature=0.8, top_p=top_p, top_k=top_k, min_p=min_p)
    found = narrowed(torch.softmax(torch.from_numpy(LOGITS).double() / 0.8, -1), params)
    found = (found / found.sum()).numpy()
    wanted = left(top_k, top_p, min_p)
    assert set(np.flatnonzero(found).tolist()) == set(wanted)
    assert all(found[token] == pytest.approx(share, rel=1e-12) for token, share in wanted.items())


def test_a_fault_in_what_is_left_would_be_seen() -> None:
    """One token more than top_k."""
    params = SamplingParams(temperature=0.8, top_k=8)
    found = narrowed(torch.softmax(torch.from_numpy(LOGITS).double() / 0.8, -1), params)
    assert set(np.flatnonzero(found.numpy()).tolist()) != set(left(7, 1.0, 0.0))


@pytest.mark.parametrize("configured", [None, 1.7])
def test_a_repetition_penalty_is_the_requests_or_else_the_models(configured: float | None) -> None:
    model, tokenizer = tiny.model("llama", vocab_size=tiny_run.VOCAB), tiny_run.tokenizer()
    model.generation_config.repetition_penalty = configured
    prompt = list(tokenizer("red green blue cup")["input_ids"])

    def wanted(penalty: float) -> list[int]:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 30 and (len(tokens) == len(prompt) or tokens[-1] not in ends):
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0, -1].numpy().copy()
            for token in set(tokens):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            tokens.append(int(logits.argmax()))
        return tokens[len(prompt) :]

    ends = stop_ids(model, tokenizer)
    answers = {}
    for penalty in (None, 1.0, 5.0):
        (answers[penalty],) = generate_ids(model, tokenizer, [prompt], SamplingParams(30, repetition_penalty=penalty))
        assert answers[penalty] == wanted(penalty or configured or 1.0)
    assert answers[1.0] != answers[5.0]


def test_what_is_not_asked_for_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*args: object, **more: object) -> None:
        raise AssertionError

    for name in ("adjusted", "top_p_of"):
        monkeypatch.setattr(f"halfbyte.writing.sampling.{name}", called)
    for name in ("topk", "bincount"):
        monkeypatch.setattr(torch, name, called)
    logits = torch.from_numpy(LOGITS)
    assert Sampler(SamplingParams()).choose(logits, [1], WRITTEN) == int(LOGITS.argmax())
    Sampler(SamplingParams(temperature=0.8, seed=1)).choose(logits, [1], WRITTEN)
    with pytest.raises(AssertionError):
        Sampler(SamplingParams(presence_penalty=1.0)).choose(logits, [1], WRITTEN)
