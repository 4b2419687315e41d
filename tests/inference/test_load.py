"""A finished run opened again: its scores are those of plain transformers and PEFT, with the adapter and without."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from halfbyte import finetune
from halfbyte.base.store.supply import Tell
from halfbyte.errors import AdapterError, DataError, RunError
from halfbyte.export.job import check_passport
from halfbyte.inference import load, target
from halfbyte.inference.load import Opened, open_run
from halfbyte.layers.kernels import cpu
from halfbyte.system import device, kernel_cache
from halfbyte.training.prepare import prepare
from tests import tiny_run
from tests.scored import loss, scored, texts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over gpt2 in fp32 that has trained the base's biases too; it holds no rows out."""
    folder = tmp_path_factory.mktemp("world")
    tiny_run.checkpoint(folder / "model", "gpt2")
    tiny_run.rows(folder / "eval.jsonl", 6, seed=5)
    finetune.train(tiny_run.recipe(folder, quant__type="none", lora__bias="all"))
    return folder


@pytest.fixture(scope="module")
def opened(world: Path) -> Opened:
    return open_run(world / "run")


def losses(model: Any, world: Path, count: int) -> float:
    """Mean loss of a labelled token over the first rows, one row at a time, by transformers' own loss."""
    recipe = tiny_run.recipe(world, quant__type="none", data__train=world / "eval.jsonl").recipe
    total, labelled = 0.0, 0
    for row in prepare(recipe).train.examples[:count]:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        n = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * n
        labelled += n
    return total / labelled


def test_an_adapter_or_a_base_alone_scores_as_in_its_run(world: Path, opened: Opened) -> None:
    plain, rows = ["quant.type=none", "quant.compute_dtype=fp32"], world / "eval.jsonl"
    wanted = scored(opened, data=rows, with_base=True)
    adapter = scored(open_run(world / "run/adapter", None, plain), data=rows, with_base=True)
    # the run's micro-batches are planned as in its training: the same sums in another order
    for side in ("base", "adapter"):
        assert loss(adapter, side) == pytest.approx(loss(wanted, side), rel=1e-6)
    base = scored(open_run(world / "model", None, plain), data=rows, with_base=True)
    assert list(base.sides) == ["base"] and loss(base, "base") == pytest.approx(loss(wanted, "base"), rel=1e-6)
    assert texts(base, "base") == texts(wanted, "base")


@pytest.mark.skipif(not cpu.enabled(), reason="no kernels here")
def test_kernels_that_this_machine_lacks_are_compiled_on_all_cores_and_it_is_said(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    wanted = ("fp32", *["decoding"] * ("avx2" in device.detect().isa))
    monkeypatch.setattr(load.ahead, "begin", lambda *of: lambda: asked.append(of))
    for there in ("", "interpreter.decoding_fp32-1.nbc entropy.a.nbc fp32._backward.nbc"):
        monkeypatch.setattr(kernel_cache, "_files", lambda *_: map(Path, there.split()))  # noqa: B023
        said: list[str] = []
        plan = open_run(world / "run", Tell(note=lambda _, text: said.append(text))).plan  # noqa: B023
        assert asked == [(wanted, device.detect().cores, "fp32")]
        assert any("compiling kernels, once on this machine: about 0:" in text for text in said) is not there
        assert not any(line.bytes for line in plan.lines if line.name == "compiler")  # it has ended


def test_an_adapter_that_names_no_base_is_told_how_to_say_it(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run/adapter", tmp_path / "lost")
    file = tmp_path / "lost/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match=r"names no base\.\n  fix: say which it is: --set model=MODEL"):
        target.find(tmp_path / "lost")
    found = target.find(tmp_path / "lost", [f"model={world / 'model'}"])
    assert (found.recipe.model, found.recipe.lora.bias, found.run) == (str(world / "model"), "all", None)


def test_a_classifier_that_a_script_saved_is_no_language_model(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run/adapter", tmp_path / "theirs")
    file = tmp_path / "theirs/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": "SEQ_CLS"}))
    with pytest.raises(AdapterError, match=r"has a head that a script has saved.*\n.*--set task=classify"):
        target.find(tmp_path / "theirs")


def test_an_adapter_without_a_passport_says_which_number_format_is_taken(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run/adapter", tmp_path / "peft")
    (tmp_path / "peft/halfbyte.json").unlink()
    told: list[tuple[str, str]] = []
    tell = Tell(note=lambda label, text: told.append((label, text)))
    for overrides, words in (([], "it is used on nf4; --set quant.type=none"), (["quant.type=none"], None)):
        told.clear()
        assert open_run(tmp_path / "peft", tell, overrides).recipe.quant.type == ("none" if overrides else "nf4")
        opened = [text for label, text in told if label == "note"]
        told.clear()
        check_passport(target.find(tmp_path / "peft", overrides), tell)
        assert opened == [text for label, text in told] and len(opened) == (words is not None)
        assert words is None or words in opened[0]
    assert target.find(world / "run/adapter").assumed is None


@pytest.mark.parametrize("limit", [6, 2])
def test_its_scores_are_those_of_plain_peft(limit: int, world: Path, opened: Opened) -> None:
    made = scored(opened, data=world / "eval.jsonl", limit=limit, with_base=True)
    assert list(made.sides) == ["base", "adapter"]
    base = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32).eval()
    # fp32: the same sums in another order
    assert loss(made, "base") == pytest.approx(losses(base, world, limit), rel=1e-5)
    adapted = PeftModel.from_pretrained(base, str(world / "run" / "adapter")).eval()
    assert loss(made) == pytest.approx(losses(adapted, world, limit), rel=1e-5)
    assert abs(loss(made, "base") - loss(made)) > 0.01, "the adapter has learned something"
    assert made.rows == limit == len(made.questions)
    of_loss, of_perplexity = made.scores[:2]
    for side in ("base", "adapter"):
        assert getattr(of_perplexity, side).value == pytest.approx(math.exp(getattr(of_loss, side).value))


@pytest.mark.parametrize("packing", ["rows", "stream"])
def test_plain_text_has_a_loss_and_no_exact_match(world: Path, opened: Opened, packing: str) -> None:
    lines = [json.dumps({"text": f"red cup {n} round box"}) for n in range(5)]
    (world / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = opened.recipe.data.model_copy(update={"packing": packing})
    plain = replace(opened, recipe=opened.recipe.model_copy(update={"data": data}))
    made = scored(plain, data=world / "texts.jsonl")
    assert loss(made) > 0 and sum(made.sides["adapter"].tokens) > 5 and made.questions == ()
    assert [score.name for score in made.scores] == ["loss", "perplexity", "base_text_loss"]


def test_an_answer_goes_as_far_as_the_model_reads_and_no_row_further(world: Path, opened: Opened) -> None:
    assert scored(opened, data=world / "eval.jsonl", limit=1, max_new_tokens=10_000).rows == 1
    data = opened.recipe.data.model_copy(update={"max_length": 1000})
    longer = replace(opened, recipe=opened.recipe.model_copy(update={"data": data}))
    (world / "long.jsonl").write_text(json.dumps({"prompt": "red " * 300, "completion": "cup"}))
    with pytest.raises(DataError, match=r"long.jsonl:1 has \d+ tokens; the model reads 256"):
        scored(longer, data=world / "long.jsonl")


def test_progress_counts_the_rows_of_both_sides(whole_base_text: None, world: Path, opened: Opened) -> None:
    seen: list[tuple[str, int, int]] = []
    scored(
        opened, data=world / "eval.jsonl", with_base=True, max_new_tokens=1,
        progress=lambda *what: seen.append(what),
    )  # fmt: skip
    assert [one for one in seen if one[0] == "base: answers"][-1] == ("base: answers", 6, 6)
    assert [one for one in seen if one[0] == "adapter: answers"][-1] == ("adapter: answers", 6, 6)
    (*_, last) = [one for one in seen if one[0] == "base: base text"]
    assert last[1] == last[2] > 6
    assert not any(what.endswith("losses") for what, *_ in seen)  # the answers' forward reads whole rows
    lines = [json.dumps({"text": f"red cup {n}"}) for n in range(5)]
    (world / "plain.jsonl").write_text("\n".join(lines), encoding="utf-8")
    scored(opened, data=world / "plain.jsonl", progress=lambda *what: seen.append(what))
    assert ("adapter: losses", 5, 5) in seen


def test_a_run_without_held_out_rows_names_the_way_out(world: Path, opened: Opened) -> None:
    with pytest.raises(DataError, match=r"no held-out rows.*\n  fix: halfbyte eval .*run --data ROWS.jsonl"):
        scored(opened)


def test_a_run_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        open_run(tmp_path)


def test_a_base_that_came_in_four_bits_is_planned_as_the_one_that_it_was_made_of(tmp_path: Path) -> None:
    tiny_run.checkpoint(tmp_path / "model", "llama")
    whole = open_run(tmp_path / "model")
    assert whole.store is not None
    shutil.copytree(whole.store, tmp_path / "quantised")
    made = open_run(tmp_path / "quantised")
    assert whole.job.trainable == sum(p.numel() for n, p in whole.model.named_parameters() if "lora_" in n) > 0
    assert made.store is None
    assert (made.job.trainable, made.job.base_bytes) == (whole.job.trainable, whole.job.base_bytes)
    assert made.plan.generating_bytes == whole.plan.generating_bytes
