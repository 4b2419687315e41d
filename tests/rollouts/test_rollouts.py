"""A run that learns from rewards: it writes, rewards, learns, goes on to the same bytes, and says what is wrong."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte import finetune
from halfbyte.errors import RankLost, RecipeError, RewardError, RunError, TrainError
from halfbyte.inference import batch
from halfbyte.layers.decoding.tape import isa
from halfbyte.objectives import grpo
from halfbyte.proofs import integers
from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.schema import Loaded
from halfbyte.rollouts import rollouts
from halfbyte.runs.folder import RunFolder
from halfbyte.training import preflight
from halfbyte.training.events import Listener
from halfbyte.training.pace import Pace
from halfbyte.writing import sampling, writer
from halfbyte.writing.places import FastPathUnavailable
from tests import letters, tiny_run
from tests.distributed import together

pytestmark = pytest.mark.skipif(isa(torch.float32) is None, reason="no kernels for this processor")


LETTERS = f"{letters.__file__}:score"


def recipe(folder: Path, **more: Any) -> Loaded:
    """Two steps of two prompts, with four answers of up to eight tokens to each, rewarded for plain letters."""
    values = {
        "train__method": "grpo", "train__rewards": LETTERS, "train__num_generations": 4,
        "train__max_completion_length": 8, "train__per_device_train_batch_size": 4, "train__max_steps": 2,
        "train__mask_truncated_completions": False, "data__max_length": 64,
    }  # fmt: skip
    return tiny_run.recipe(folder, **{**values, **more})


def metrics(loaded: Loaded) -> list[dict[str, Any]]:
    return RunFolder(Path(loaded.recipe.output)).read_metrics()


def adapter(loaded: Loaded) -> bytes:
    return (RunFolder(Path(loaded.recipe.output)).adapter / "adapter_model.safetensors").read_bytes()


def test_a_run_says_what_it_wrote(tmp_path: Path) -> None:
    tiny_run.rows(tmp_path / "eval.jsonl", 5, seed=5)
    names = {"length": -1.0, LETTERS: 0.5}
    more = {"data__eval": tmp_path / "eval.jsonl", "train__eval_on_start": True, "train__rewards": names}
    loaded = recipe(tmp_path, **more)
    report = finetune.train(loaded).report
    steps, evals = ([row for row in metrics(loaded) if key in row] for key in ("loss", "eval_loss"))
    assert len(steps) == 2
    for row in steps:
        assert row["reward"] == pytest.approx(0.5 * row["reward_letters.py:score"] - row["reward_length"])
        assert 0 < row["answer_tokens"] <= 8 and row["written_tokens"] == 8 * row["answer_tokens"]
        assert row["labelled_tokens"] <= row["written_tokens"] < row["tokens"]
        assert row["logp_error"] < 0.01 and row["clipped"] == 0 and 0 < row["entropy"] < 6
        assert row["reward_low"] <= row["reward"] <= row["reward_high"] and row["writing_seconds"] > 0
    assert [row["step"] for row in evals] == [0, 2] and all("eval_reward" in row for row in evals)
    best = max(evals, key=lambda row: row["eval_reward"])
    assert report["reward"]["first"] == evals[0]["eval_reward"] and report["reward"]["best"] == best["eval_reward"]
    assert all(len(row["sample"]["answers"]) == 2 for row in steps)
    assert abs(steps[0]["kl"]) < 0.01, "the base itself begins"


def test_a_part_that_never_applies_is_null_and_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "never.py").write_text("def score(completions, **k):\n    return [None] * len(completions)\n")
    tiny_run.rows(tmp_path / "eval.jsonl", 3, seed=5)
    name = f"{tmp_path / 'never.py'}:score"
    more = {"data__eval": tmp_path / "eval.jsonl", "train__eval_on_start": True, "train__early_stopping_patience": 9}
    loaded = recipe(tmp_path, train__rewards=name, **more)
    finetune.train(loaded)
    every = [(prefix, row) for prefix in ("", "eval_") for row in metrics(loaded) if f"{prefix}loss" in row]
    assert len(every) == 4
    for prefix, row in every:
        assert row[f"{prefix}reward"] is None and row[f"{prefix}reward_never.py:score"] is None
        assert f"{prefix}reward_low" not in row and row.get("no_difference", 1.0) == 1.0
    assert caplog.text.count("applies to none of 3 answers, so it does not count") == 1


def test_answers_that_are_all_cut_off_are_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    finetune.train(loaded := recipe(tmp_path, train__mask_truncated_completions=True, train__max_completion_length=1))
    assert [(row["cut_off"], row["tokens"]) for row in metrics(loaded)] == [(1.0, 0)] * 2
    assert caplog.text.count("learns nothing: its answers are cut off at train.max_completion_length 1,") == 1


def test_answers_that_are_all_worth_the_same_are_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "same.py").write_text("def score(completions, **k):\n    return [0.5] * len(completions)\n")
    finetune.train(loaded := recipe(tmp_path, train__rewards=f"{tmp_path / 'same.py'}:score"))
    assert [(row["reward"], row["labelled_tokens"]) for row in metrics(loaded)] == [(0.5, 0)] * 2
    assert caplog.text.count("learns nothing: the answers to each prompt have the same reward;") == 1


def gain(folder: Path, method: str, rate: float) -> tuple[float, float]:
    """How much higher the reward is in the last four of 14 steps than in the first four; how far it went."""
    more = {"train__num_generations": 8, "train__per_device_train_batch_size": 16, "train__max_steps": 14}
    constant = {"train__lr_scheduler_type": "constant", "train__learning_rate": rate}
    loaded = recipe(folder, train__method=method, output=folder / f"run{rate}", **more, **constant)
    finetune.train(loaded)
    rewards = [row["reward"] for row in metrics(loaded)]
    return sum(rewards[-4:]) / 4 - sum(rewards[:4]) / 4, metrics(loaded)[-1]["kl"]


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_it_learns(method: str, tmp_path: Path) -> None:
    won, far = gain(tmp_path, method, 2e-2)
    assert won > 0.1 and far > 0.02


def test_it_learns_nothing_without_a_rate_and_the_contrary_of_the_contrary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above asks for does not come by itself: as the adapter is the reward stays, and with advantages
    that are turned around it falls."""
    still, near = gain(tmp_path, "grpo", 1e-9)
    assert abs(still) < 0.1 and abs(near) < 0.02
    real = grpo.advantages
    monkeypatch.setattr(grpo, "advantages", lambda *a, **k: -real(*a, **k))
    assert gain(tmp_path, "grpo", 2e-2)[0] < still


@pytest.mark.parametrize(("examples", "shares", "wanted"), [(None, False, [0, 1]), (4, False, [0, 1]),
                                                            (1, False, [0]), (4, True, [0, 1, 4])])  # fmt: skip
def test_the_divergence_is_of_as_many_answers_as_a_micro_batch_holds(
    examples: int | None, shares: bool, wanted: list[int]
) -> None:
    """Answers of 2, 12, and 22 tokens to a prompt of 20, of another one between them, in micro-batches of 61 tokens."""
    prompts, counts = [tuple(range(20))] * 2 + [tuple(range(50, 70))] * 2 + [tuple(range(20))], (2, 12, 1, 1, 22)
    rows = [
        grpo.WrittenRow((*p, *range(100 * n, 100 * n + c)), (-100,) * (20 + c), "", p, "")
        for n, (p, c) in enumerate(zip(prompts, counts, strict=True), 1)
    ]
    ids = [np.array(row.input_ids, np.uint32) for row in rows]
    pace = Pace(
        np.array([*map(len, ids)]), 61, examples, "none", ("none",), need=lambda *_: 0, apply=lambda _: None,
        tell=lambda _: None, ram_bytes=0, ids=ids.__getitem__ if shares else None,
    )  # fmt: skip
    assert rollouts.Rollouts._group(rows, pace) == wanted


class Stop(Listener):
    """A signal after the first step, or in the middle of the writing of the second one."""

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_resumed_run_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = recipe(tmp_path, output=tmp_path / "whole", train__max_steps=3)
    loaded = recipe(tmp_path, train__max_steps=3)
    finetune.train(whole)
    assert finetune.train(loaded, listener=Stop()).step == 1
    step, count = writer.Writer.next_logits, [0]

    def stopping(self: Any) -> Any:  # in the writing of a step
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(writer.Writer, "next_logits", stopping)
        assert finetune.train(loaded, resume=True).step == 1
    finetune.train(loaded, resume=True)
    assert adapter(loaded) == adapter(whole)
    names = ("loss", "reward", "entropy", "written_tokens")
    assert [[row[n] for n in names] for row in metrics(loaded)] == [[row[n] for n in names] for row in metrics(whole)]
    with_other = recipe(tmp_path, train__max_steps=4, train__rewards={"length": 1.0})
    with pytest.raises(Exception, match=r"train.rewards: .*in the run"):
        finetune.train(with_other, resume=True)


def test_any_split_trains_the_same(tmp_path: Path) -> None:
    rows = []
    for tokens in ("auto", 1):
        loaded = recipe(tmp_path, output=tmp_path / f"run{tokens}", train__max_tokens_per_micro_batch=tokens)
        finetune.train(loaded)
        rows.append(metrics(loaded))
    for row, other in zip(*rows, strict=True):
        assert row["reward"] == other["reward"] and row["micro_batches"] != other["micro_batches"]
        # as many answers are written side by side as a micro-batch has memory for: their log-probabilities are rounded
        # otherwise, and so is a token's ratio
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=4 * other["logp_error"]), name


def train(path: Path, resume: bool = False) -> int:
    return finetune.train(load_recipe(path), resume=resume).step


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_writes_and_trains_the_same(size: int, tmp_path: Path) -> None:
    """Also where groups are in several of them, and a function is called in the first one alone."""
    tiny_run.rows(tmp_path / "eval.jsonl", 5, seed=5)
    more = {"data__eval": tmp_path / "eval.jsonl", "train__rewards": {"length": -1.0, LETTERS: 0.5}}
    one = recipe(tmp_path, output=tmp_path / "one", train__num_generations=8, **more)
    several = recipe(tmp_path, output=tmp_path / "several", train__num_generations=8, **more)
    finetune.train(one)
    together.run(size, train, several.path)
    rows, wanted = metrics(several), metrics(one)
    assert len(rows) == len(wanted) > 2
    for row, other in zip(rows, wanted, strict=True):
        assert row.get("sample") == other.get("sample")
        assert row.keys() == other.keys()
        for name in {"reward", "reward_length", "written_tokens", "no_difference", "eval_reward"} & row.keys():
            assert row[name] == other[name], name
        # a tape of other places rounds otherwise, and a ratio is off by the error of its log-probabilities
        for name in {"loss", "grad_norm", "entropy"} & row.keys():
            assert row[name] == pytest.approx(other[name], rel=min(1e-2, 4 * other["logp_error"]), abs=1e-6), name


def test_a_streamed_base_writes_what_it_trains(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, quant__placement="streamed")
    finetune.train(loaded)
    assert '"placement": "streamed"' in (Path(loaded.recipe.output) / "plan.json").read_text()
    assert all(row["logp_error"] < 0.01 and row["written_tokens"] > 8 for row in metrics(loaded))


def test_early_stopping_goes_by_the_reward(tmp_path: Path) -> None:
    tiny_run.rows(tmp_path / "eval.jsonl", 3, seed=5)
    evaluates = {"train__eval_strategy": "steps", "train__eval_steps": 1}
    more = {"data__eval": tmp_path / "eval.jsonl", "train__max_steps": 6, "train__learning_rate": 1e-9}
    loaded = recipe(tmp_path, train__early_stopping_patience=2, **evaluates, **more)
    finetune.train(loaded)
    assert [row["step"] for row in metrics(loaded) if "eval_reward" in row] == [1, 2, 3]


def test_integer_products_are_for_the_gradient_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    decide = integers.decide

    def seen(model: Any, how: str, *rest: Any) -> Any:
        asked.append(how)
        return decide(model, how, *rest)

    monkeypatch.setattr(integers, "decide", seen)
    finetune.train(recipe(tmp_path, quant__compute="auto"))
    assert asked == ["gradient"]


@pytest.mark.parametrize(
    ("code", "message"),
    [("return [1.0]", "returned 1 values for 8 answers"), ("raise ValueError('odd')", "raised ValueError: odd")],
)
def test_a_reward_that_fails_loses_nothing(code: str, message: str, tmp_path: Path) -> None:
    lines = ["calls = []", "def score(completions, **kwargs):", "    calls.append(1)", "    if len(calls) > 1:"]
    lines += [f"        {code}", "    return [len(c) for c in completions]"]
    (tmp_path / "mine.py").write_text("\n".join(lines), encoding="utf-8")
    loaded = recipe(tmp_path, train__rewards=f"{tmp_path / 'mine.py'}:score")
    with pytest.raises(RewardError, match=message):
        finetune.train(loaded)
    (tmp_path / "mine.py").write_text("def score(completions):\n    return [len(c) for c in completions]\n")
    assert finetune.train(loaded, resume=True).step == 2
    assert [row["step"] for row in metrics(loaded)] == [1, 2]


def test_a_function_that_is_not_there_is_named_at_once(tmp_path: Path) -> None:
    codes = {
        "half": ("def score(completions)\n    pass\n", r"half.py:1 is not Python: expected ':'"),
        "five": ("def f(): ...\nscore = 5\n", r"five.py:2 score is not a function"),
        "inner": ("def f():\n    def score(**k): ...\n", r"inner.py has no function score"),
        "spoken": ("# score\nx = 'score'\n", r"spoken.py has no function score"),
        "lost": (None, r"there is no file .*lost.py"),
    }
    right = [
        "from a import score", "from a import *", "score = f(3)", "if x:\n    score = lambda **k: []",
        "class score: ...", "score = None\ndef later():\n    global score\n    score = later\n",
        "raise SystemExit\ndef score(): ...",
    ]  # fmt: skip
    codes |= {f"right{n}": (code, "") for n, code in enumerate(right)}
    for name, (code, said) in codes.items():
        if code is not None:
            (tmp_path / f"{name}.py").write_text(code)
        loaded = recipe(tmp_path, train__rewards=f"{tmp_path / name}.py:score")
        with pytest.raises(RecipeError, match=f"train.rewards: .*{said}") if said else contextlib.nullcontext():
            preflight.check(loaded.recipe)


def test_what_a_metric_goes_by_may_not_change_in_a_run(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, train__save_steps=1, train__save_strategy="steps")
    assert finetune.train(loaded, listener=Stop()).step == 1
    with pytest.raises(RunError, match=r"eval.mark: '?####'? in the run, "):
        finetune.train(recipe(tmp_path, eval__mark="Answer:"), resume=True)


def test_the_models_own_forward_writes_what_a_tape_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise FastPathUnavailable("no tape")

    monkeypatch.setattr(batch, "Writer", unavailable)
    loaded = recipe(tmp_path)
    finetune.train(loaded)
    assert all(row["logp_error"] < 1e-5 and row["written_tokens"] > 0 for row in metrics(loaded))


# -------------------------------------------------------------------- faults
def kept_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's tape writes all answers."""
    kept = list[writer.Writer]()

    def made(*args: Any, **kwargs: Any) -> writer.Writer:
        if not kept:
            kept.append(writer.Writer(*args, **kwargs))
        return kept[0]

    monkeypatch.setattr(batch, "Writer", made)


def shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is said to have the log-probability of the one before."""
    choose = sampling.Sampler.choose

    def wrong(self: Any, *args: Any) -> int:
        token = choose(self, *args)
        if len(self.drawn) > 1:
            last, before = self.drawn[-1], self.drawn[-2]
            self.shift = getattr(self, "shift", before[0])
            self.drawn[-1], self.shift = (self.shift, *last[1:]), last[0]
        return token

    monkeypatch.setattr(sampling.Sampler, "choose", wrong)


def train_stale(path: Path) -> str:
    """In the second process the first step's tape writes all answers. Returns what ended the run."""
    if os.environ["RANK"] == "1":
        kept_writer(pytest.MonkeyPatch())  # the process ends with the run
    try:
        finetune.train(load_recipe(path))
    except (TrainError, RankLost) as error:  # the other process may have said it first
        return str(error)
    return ""


def test_one_process_that_writes_with_an_older_adapter_ends_the_run(tmp_path: Path) -> None:
    more = {"train__learning_rate": 3e-2, "train__temperature": 0.1}
    together.run(2, train, recipe(tmp_path, output=tmp_path / "right", **more).path)
    ended = together.run(2, train_stale, recipe(tmp_path, **more).path)
    assert all("log-probabilities of the answers were" in text and "apart" in text for text in ended), ended


@pytest.mark.parametrize("fault", [kept_writer, shifted])
def test_answers_of_another_adapter_or_other_tokens_end_the_run(
    fault: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    loaded = recipe(tmp_path, train__learning_rate=3e-2, train__temperature=0.1)
    with pytest.raises(TrainError, match=r"log-probabilities of the answers were .* apart"):
        finetune.train(loaded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train__rewards": None}, "train.method grpo needs train.rewards"),
        ({"train__rewards": "jsn_fields"}, "must name exact_match, .*, length, format, or a function"),
        ({"train__rewards": {"length": "high"}}, "must give length a number"),
        ({"train__num_generations": 3}, "is 8 answers a step, no multiple of train.num_generations 3"),
        ({"lora__lora_dropout": 0.1}, "lora.lora_dropout 0.1: train.method grpo draws answers without dropout"),
        ({"quant__compute": "int8"}, "quant.compute int8: train.method grpo writes by exact products"),
        ({"quant__placement": "sharded"}, "quant.placement sharded: train.method grpo writes in each process with the"),
        ({"train__within": "1h"}, "train.within 1h is for train.method sft"),
        ({"train__beta": 0.1}, "train.beta is not read with train.method grpo"),
        ({"train__num_iterations": 2}, "num_iterations is not needed: each step writes its own answers"),
        ({"train__loss_type": "sapo"}, "train.loss_type must be one of"),
        ({"train__method": "sft"}, "train.rewards is not read with train.method sft"),
        ({"train__rewards": "regex"}, "train.rewards has regex, which needs eval.pattern"),
    ],
)
def test_what_a_recipe_cannot_ask(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, **change)
