"""A run's verdict is what an evaluation of its adapter and its base finds, on rows that are chosen for it."""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte import finetune
from halfbyte.runs.folder import RunFolder
from halfbyte.system import device
from halfbyte.training import fit
from halfbyte.training.comparison import BESIDE, BYTE_S, FORWARDS, KEPT, OPENING_S, verdict_s
from halfbyte.training.events import Listener
from tests import scored, tiny_run


class Notes(Listener):
    """What was told under the labels `base` and `source`; with `stop` a signal after the second step."""

    def __init__(self, stop: bool = False) -> None:
        self.base, self.source, self.stop = list[str](), list[str](), stop

    def note(self, label: str, text: str) -> None:
        if label in ("base", "source"):
            getattr(self, label).append(text)

    def step(self, row: dict[str, Any]) -> None:
        if self.stop and row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def held_out(tmp_path: Path, n: int = 9) -> dict[str, Any]:
    return {"data__eval": tiny_run.rows(tmp_path / "held.jsonl", n, seed=5)}


def evaluations(run: Path) -> list[int]:
    return [row["step"] for row in RunFolder(run).read_metrics() if "eval_loss" in row]


@pytest.mark.parametrize("case", ["last", "best", "sampled"])
def test_a_verdict_is_what_an_evaluation_finds(case: str, tmp_path: Path) -> None:
    """Of the last adapter, of the best of an overshooting run, and where nothing is evaluated while training."""
    asked = {
        "last": {},
        "best": {"train__eval_strategy": "steps", "train__eval_steps": 1, "train__max_steps": 12,
                 "train__learning_rate": 0.5, "train__lr_scheduler_type": "constant"},
        "sampled": {"train__eval_strategy": "no"},
    }[case]  # fmt: skip
    loaded = tiny_run.recipe(tmp_path, **held_out(tmp_path), **asked)
    verdict = finetune.train(loaded).report["verdict"]
    sheet = scored.evaluated(tmp_path / "run", with_base=True, sure=True)
    loss, beside = sheet.scores[0], sheet.beside_source
    assert beside is not None and loss.source is not None and sheet.scores[1].source is not None
    assert loss.source.value == beside.loss == pytest.approx(verdict["source"]["loss"], rel=1e-6)
    assert loss.source.interval is not None and sheet.to_json()["source"]["text"] == beside.text
    assert beside.won is not None and beside.won[0] == pytest.approx(verdict["source"]["won"][0], rel=1e-3, abs=1e-4)
    assert verdict["rows"] == "9 held-out rows"
    assert loss.adapter is not None and loss.base is not None and loss.difference is not None
    assert verdict["adapter"] == pytest.approx(loss.adapter.value, rel=1e-4)
    assert verdict["base"] == pytest.approx(loss.base.value, rel=1e-4)
    assert verdict["interval"] == pytest.approx(loss.difference.interval, rel=1e-2, abs=1e-3)
    if case == "best":
        assert evaluations(tmp_path / "run") == list(range(1, 13))
        assert json.loads((tmp_path / "run/adapter/halfbyte.json").read_text())["reached"]["steps"] < 12


@pytest.mark.parametrize(
    ("asked", "steps", "rows"),
    [
        ({"train__max_steps": 2}, [2], "9 held-out rows"),  # of an epoch of 4
        ({"train__max_steps": 6}, [4, 6], "9 held-out rows"),
        ({"train__max_steps": 3, "train__eval_strategy": "no"}, [], "9 held-out rows"),
        ({"train__max_steps": 2, "data__eval": "none"}, [], "8 training rows that it did not reach"),
        ({"train__max_steps": 4, "data__eval": "none"}, [], "16 training rows"),
    ],
)
def test_every_run_ends_with_a_verdict(asked: dict[str, Any], steps: list[int], rows: str, tmp_path: Path) -> None:
    loaded = tiny_run.recipe(tmp_path, **{**held_out(tmp_path), **asked})
    report = finetune.train(loaded).report
    assert evaluations(tmp_path / "run") == steps
    assert report["verdict"]["rows"] == rows and report["verdict"]["name"] != "not measured"
    assert (report["eval_loss"] is None) == (not steps)


def test_rows_that_a_run_does_not_reach_are_not_trained(tmp_path: Path) -> None:
    from halfbyte.training import prepare, schedule

    prepared = prepare.prepare(tiny_run.recipe(tmp_path, train__max_steps=2, data__eval="none").recipe)
    steps = schedule.plan_steps(prepared, 10_000, None)
    trained = {row for step in steps for rows in step.micro_batches for row in rows}
    assert set(steps.never_reached().tolist()) == set(range(16)) - trained and len(trained) == 8
    assert len(schedule.plan_steps(prepare.prepare(tiny_run.recipe(tmp_path).recipe), 100, None).never_reached()) == 0


def test_blocks_of_few_texts_are_compared_too(tmp_path: Path) -> None:
    """More blocks than texts, so that a block's number is no text's."""
    text = json.dumps({"text": " ".join(random.Random(1).choices(["red", "cup", "old", "tree"], k=90))})
    (tmp_path / "texts.jsonl").write_text(f"{text}\n" * 3)
    rows = {"data__train": tmp_path / "texts.jsonl", "data__packing": "stream", "data__max_length": 16}
    verdict = finetune.train(tiny_run.recipe(tmp_path, **rows, train__max_steps=2)).report["verdict"]
    assert verdict["rows"].endswith("training rows that it did not reach") and verdict["interval"] is not None


def test_a_base_is_measured_once(tmp_path: Path) -> None:
    runs = []
    for name, rank, rows in (("a", 4, 9), ("b", 8, 9), ("c", 4, 12)):
        tell = Notes()
        asked = {**held_out(tmp_path, rows), "lora__r": rank, "output": tmp_path / name}
        report = finetune.train(tiny_run.recipe(tmp_path, **asked), listener=tell).report
        runs.append((tell.base[-1], report["verdict"]["base"]))
    assert "on 9 held-out rows, measured in" in runs[0][0]
    assert "on 9 held-out rows, kept with its store" in runs[1][0] and runs[1][1] == runs[0][1]
    assert "on 12 held-out rows, measured in" in runs[2][0], "others are not those that are kept"


def plain_loss(model: Path, rows: Path) -> float:
    """Of the completions' tokens, by plain transformers, a row at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    from halfbyte.data.encoding import encode
    from halfbyte.recipe.data import Data

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    summed, count = 0.0, 0
    for example in encode.encode(rows, tiny_run.tokenizer(), Data(train=str(rows)), cores=1).examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
        with torch.no_grad():
            logits = lm(input_ids=ids).logits[0, :-1].double()
        summed += float(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
        count += int((labels[1:] != -100).sum())
    return summed / count


def test_the_source_model_is_measured_once_beside_its_base(tmp_path: Path) -> None:
    """Its loss is that of the checkpoint by plain transformers, not that of the base in few bits."""
    verdicts = []
    for name in ("a", "b"):
        tell = Notes()
        loaded = tiny_run.recipe(tmp_path, **held_out(tmp_path), output=tmp_path / name)
        verdicts.append(finetune.train(loaded, listener=tell).report["verdict"])
        assert "so quantising costs" in tell.source[-1]
    plain = plain_loss(Path(loaded.recipe.model), tmp_path / "held.jsonl")
    seen = verdicts[0]["source"]
    assert seen["loss"] == pytest.approx(plain, rel=1e-5) and abs(seen["loss"] - verdicts[0]["base"]) > 1e-4
    assert seen["cost"][0] == pytest.approx(verdicts[0]["base"] - seen["loss"], rel=1e-6)
    assert seen["won"][0] == pytest.approx(verdicts[0]["adapter"] - seen["loss"], rel=1e-6)
    assert verdicts[1]["source"] == seen and "the source model has" in verdicts[0]["text"]


def test_a_base_in_16_bits_is_its_source(tmp_path: Path) -> None:
    tell = Notes()
    loaded = tiny_run.recipe(tmp_path, **held_out(tmp_path), quant__type="none")
    verdict = finetune.train(loaded, listener=tell).report["verdict"]
    assert verdict["source"]["loss"] == verdict["base"] and verdict["source"]["cost"] == [0.0, [0.0, 0.0]]
    assert tell.source == [] and "source" not in verdict["text"]
    assert len([text for text in tell.base if str(tmp_path / "model") in text]) == 1, "where it lies is told once"


def test_a_source_that_is_too_large_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.training.source.SOURCE_SHARE", 0.0)
    tell = Notes()
    verdict = finetune.train(tiny_run.recipe(tmp_path, **held_out(tmp_path)), listener=tell).report["verdict"]
    assert verdict["source"] is None and "to open it takes 0.00 GB, and" in tell.source[-1]


def test_blocks_are_read_by_the_source_text_by_text(tmp_path: Path) -> None:
    from halfbyte.data.encoding.examples import Example
    from halfbyte.objectives.causal_lm import CausalLM
    from halfbyte.system import device
    from halfbyte.training import prepare, source

    prepared = prepare.prepare(tiny_run.recipe(tmp_path, **held_out(tmp_path)).recipe)
    one, other = list(prepared.train.examples)[:2]
    ids, labels = one.input_ids + other.input_ids, one.labels + other.labels
    block = Example(ids, labels, "block", (), "", (0, len(one.input_ids)))
    sums = source.sums(
        prepared.recipe, prepared.checkpoint, CausalLM(), [block, one, other], machine=device.detect(),
        most_bytes=1 << 40, layout="cu_seq_lens",
    )  # fmt: skip
    assert not isinstance(sums, str) and sums[0].tolist() == pytest.approx((sums[1] + sums[2]).tolist())


def test_the_source_reads_texts_together_as_the_base_does_and_loses_the_same(tmp_path: Path) -> None:
    from halfbyte.objectives.causal_lm import CausalLM
    from halfbyte.system import device
    from halfbyte.training import prepare, source

    seen: list[int] = []

    class Texts(CausalLM):
        def text_sums(self, model: Any, batch: Any) -> Any:
            seen.append(len(batch["cu_seq_lens_q"]) - 1)
            return super().text_sums(model, batch)

    loaded = tiny_run.recipe(tmp_path, quant__compute_dtype="fp32", **held_out(tmp_path))
    prepared = prepare.prepare(loaded.recipe)
    rows = list(prepared.evaluation.examples)  # type: ignore[union-attr]

    def sums(layout: Any) -> Any:
        return source.sums(
            prepared.recipe, prepared.checkpoint, Texts(), rows, machine=device.detect(), most_bytes=1 << 40,
            layout=layout,
        )  # fmt: skip

    together = sums("cu_seq_lens")
    assert len(seen) < len(rows) == sum(seen)
    seen.clear()
    alone = sums("single")
    assert seen == [1] * len(rows) and np.array_equal(together[:, 1], alone[:, 1])
    np.testing.assert_allclose(together[:, 0], alone[:, 0], rtol=1e-5)  # sums of fp32 in another order
    plain = plain_loss(Path(loaded.recipe.model), tmp_path / "held.jsonl")
    assert together[:, 0].sum() / together[:, 1].sum() == pytest.approx(plain, rel=1e-5)


def test_what_is_kept_of_a_base_can_be_lost_or_damaged(tmp_path: Path) -> None:
    def run(name: str) -> str:
        tell = Notes()
        finetune.train(tiny_run.recipe(tmp_path, train__max_steps=1, output=tmp_path / name), listener=tell)
        kept.extend(Path(text.split()[1]) / KEPT for text in tell.base if text.startswith("store "))
        return tell.base[-1]

    kept: list[Path] = []
    assert "measured in" in run("a")
    kept[0].write_text("{")
    assert "measured in" in run("b")
    assert "kept with its store" in run("c")


def test_a_resumed_run_has_the_verdict_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    loaded = tiny_run.recipe(tmp_path, **held_out(tmp_path))
    stopped = finetune.train(loaded, listener=Notes(stop=True))
    assert stopped.step == 2 and stopped.report == {}
    resumed = finetune.train(loaded, resume=True).report["verdict"]
    whole = finetune.train(tiny_run.recipe(tmp_path, **held_out(tmp_path), output=tmp_path / "w")).report["verdict"]
    assert resumed == whole


def test_a_worse_adapter_ends_with_an_exit_code(tmp_path: Path) -> None:
    wild = {"train__learning_rate": 5.0, "train__max_steps": 3, "lora__modules_to_save": ["lm_head"]}
    outcome = finetune.train(tiny_run.recipe(tmp_path, **held_out(tmp_path, 40), **wild))
    assert outcome.report["verdict"]["useless"] and outcome.exit_code == 1
    tame = finetune.train(tiny_run.recipe(tmp_path, output=tmp_path / "tame", train__learning_rate=1e-3))
    assert not tame.report["verdict"]["useless"] and tame.exit_code == 0


def test_a_verdict_is_in_the_plans_seconds(tmp_path: Path) -> None:
    """By hand: tokens of the verdict, each at the plan's seconds of a token's forward."""
    from dataclasses import replace

    from halfbyte.system import device
    from halfbyte.training import fit

    def plan(done: int = 0, **more: Any) -> Any:
        loaded = tiny_run.recipe(tmp_path, **more, quant__type="none")  # the base is its source
        return fit.plan_run(loaded.recipe, replace(device.detect(), cards=()), done=done)

    whole = plan(**held_out(tmp_path), train__max_steps=8)
    rows, held = (sum(part.lengths) for part in (whole.prepared.train, whole.prepared.evaluation))
    # two epochs: an evaluation ends each anyway, so the verdict's are those of the base
    assert whole.plan.time.around["verdict"] == pytest.approx(held * whole.plan.time.forward_s)
    alone = plan(data__eval="none", train__max_steps=8)  # base and adapter on all 16 rows
    tokens = 2 * sum(alone.prepared.train.lengths)
    assert alone.plan.time.around["verdict"] == pytest.approx(tokens * alone.plan.time.forward_s)
    again = plan(4, data__eval="none", train__max_steps=8).plan.time  # those of the base are kept
    assert again.around["verdict"] == pytest.approx(tokens / 2 * again.forward_s)
    assert 0.2 < alone.plan.time.forward_s * rows / (4 * alone.plan.time.step_s) < 0.5, "of a step's seconds a token"


@pytest.mark.parametrize(
    ("ends", "more", "evaluated"),
    [(False, {}, []), (True, {}, [3]), (False, {"train__eval_strategy": "steps", "train__eval_steps": 1}, [1, 2, 3])],
)
def test_a_short_run_evaluates_at_its_end_where_that_takes_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool, more: dict[str, Any], evaluated: list[int]
) -> None:
    """Less than an epoch: transformers 5.24 would evaluate after the last step, whatever it takes."""
    monkeypatch.setattr("halfbyte.training.comparison.ends_with_evaluation", lambda *_: ends)
    outcome = finetune.train(tiny_run.recipe(tmp_path, **held_out(tmp_path), train__max_steps=3, **more))
    rows = RunFolder(tmp_path / "run").read_metrics()
    assert [row["step"] for row in rows if "eval_loss" in row] == evaluated
    assert outcome.report["verdict"]["rows"]


def test_a_hard_row_in_the_last_step_is_no_verdict(tmp_path: Path) -> None:
    """Steps of one row each, the easiest first and the hardest last: that the loss rose is so of the rows alone."""

    def losses(rate: float, folder: Path) -> list[float]:
        asked = {
            **held_out(tmp_path, 24), "train__max_steps": 16, "train__per_device_train_batch_size": 1,
            "train__gradient_accumulation_steps": 1, "train__learning_rate": rate, "output": folder,
            "train__lr_scheduler_type": "constant",
        }  # fmt: skip
        outcome = finetune.train(tiny_run.recipe(tmp_path, **asked))
        outcomes.append((outcome.report["verdict"]["name"], outcome.exit_code))
        return [row["loss"] for row in RunFolder(folder).read_metrics() if "loss" in row]

    outcomes: list[tuple[str, int]] = []
    words = ["red", "green", "blue", "round", "square", "small", "large", "old", "new", "cup", "box", "tree", "road"]
    lines = [json.dumps({"prompt": a, "completion": b}) for a, b in zip(words, words[3:] + words[:3], strict=True)]
    lines += [json.dumps({"prompt": word, "completion": "zq#9"}) for word in words[:3]]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    by_step = losses(1e-7, tmp_path / "still")  # nothing is learned: the base's loss of each row, in their order
    order = list(range(16))
    random.Random(f"{tiny_run.recipe(tmp_path).recipe.train.order_seed}/0").shuffle(order)
    harder = [order[step] for step in sorted(range(16), key=by_step.__getitem__)]
    (tmp_path / "train.jsonl").write_text("".join(lines[harder[order.index(n)]] + "\n" for n in range(16)))
    rose = losses(2e-3, tmp_path / "run")
    assert rose[-1] > 1.2 * rose[0], rose
    assert outcomes[1] == ("better", 0)


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_a_plan_counts_the_source_where_a_run_measures_it(quant: str, tmp_path: Path) -> None:
    """Its opening and its forward; nothing where the base is the source, where memory is short, or after a resume."""
    loaded = tiny_run.recipe(tmp_path, quant__type=quant, train__eval_strategy="no", **held_out(tmp_path))
    machine = device.detect()
    run = fit.plan_run(loaded.recipe, machine, Listener())
    lines = tuple(line for line in run.plan.lines if line.name in BESIDE)
    small = replace(run.plan, lines=lines, building=(), loading_bytes=0, evaluating_bytes=0)
    later = replace(run.plan, time=replace(run.plan.time, done=1))
    with_source, without, resumed = (verdict_s(run.prepared, plan, machine) for plan in (run.plan, small, later))
    rows = run.plan.time.forward_s * int(run.prepared.evaluation.lengths.sum())
    assert without == pytest.approx(2 * rows) and resumed == pytest.approx(rows)
    weights = 2 * 4 * run.plan.parameters
    asked = OPENING_S + BYTE_S * weights + FORWARDS * rows if quant == "nf4" else 0.0
    assert with_source - without == pytest.approx(asked, rel=1e-3)
