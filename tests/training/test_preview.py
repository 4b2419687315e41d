"""`halfbyte data check`: what it shows is what a run takes; refusals, single rows, JSON, and rows without a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte import finetune
from halfbyte.recipe.file import load_recipe
from halfbyte.system import device
from halfbyte.training import fit, forecast, prepare, preview
from tests import in_process, tiny_run
from tests.in_process import Cli, runner


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_run.recipe(Path("."), train__max_steps=None, train__num_train_epochs=2)
    return tmp_path


@pytest.fixture
def halfbyte(here: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    return runner(here, capsys)


def test_it_shows_gates_lengths_steps_and_marked_rows(halfbyte: Cli) -> None:
    ended = halfbyte("data", "check", "recipe.yaml")
    assert (ended.code, ended.err) == (0, "")
    for gate in ("labels", "end token", "length", "duplicates", "empty answers", "overlap", "unseen", "vocabulary"):
        assert f"ok       {gate}" in ended.out or f"warning  {gate}" in ended.out
    assert "8 steps of 4 rows" in ended.out
    first = json.loads(Path("train.jsonl").read_text().splitlines()[0])
    assert "row 1 (train.jsonl:1): " in ended.out and "row 2 (train.jsonl:2): " in ended.out
    marked = ended.out.partition("⟦")[2].partition("⟧")[0]
    assert marked == first["completion"] + "<|im_end|>", "the answer and its end are what is learned"


HEAVY = ("peft", "bitsandbytes", "datasets", "pandas", "transformers.trainer", "transformers.modeling_utils")


def test_rows_alone_need_neither_peft_nor_a_trainer(here: Path) -> None:
    assert in_process.imported(HEAVY, "data", "check", "recipe.yaml")[:2] == (0, [])


@pytest.mark.slow
def test_arguments_that_need_a_trainer_are_tried_on_it(here: Path) -> None:
    code, heavy, _ = in_process.imported(HEAVY, "data", "check", "recipe.yaml", "--set", "train.optim=sgd")
    assert code == 0 and "transformers.trainer" in heavy, "its arguments are tried on what takes them"


@pytest.mark.parametrize(
    "asked",
    [
        "train.max_steps=3000000", "lora.modules_to_save=[nothing_of_it]", "lora.target_modules=[k_prox]",
        "train.lr_scheduler_kwargs={power: x}", "lora.exclude_modules=[nothing]",
    ],
)  # fmt: skip
def test_it_refuses_what_a_dry_run_refuses(halfbyte: Cli, asked: str) -> None:
    schedule = ["--set", "train.lr_scheduler_type=polynomial"] if "scheduler" in asked else []
    checked = halfbyte("data", "check", "recipe.yaml", *schedule, "--set", asked)
    dry = halfbyte("train", "recipe.yaml", "--dry-run", *schedule, "--set", asked)
    assert checked.code == dry.code != 0 and checked.err == dry.err


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "bloom", "qwen3", "phi3"])
def test_its_plan_by_names_is_that_of_the_built_model(tmp_path: Path, model: str, targets: str) -> None:
    tiny_run.checkpoint(tmp_path / "model", model)
    loaded = tiny_run.recipe(tmp_path, lora__target_modules=targets)
    prepared, machine = prepare.look(loaded.recipe), device.detect()
    planned = forecast.plan_by_names(prepared, machine)
    assert planned is not None and planned[2].to_json() == fit.with_plan(prepared, machine).plan.to_json()


def test_its_figures_are_those_of_the_run(halfbyte: Cli) -> None:
    ended = halfbyte("data", "check", "recipe.yaml", "--json")
    found = json.loads(ended.out)
    report = finetune.train(load_recipe(Path("recipe.yaml"))).report
    assert found["run"]["tokens"] == report["tokens"] and found["run"]["steps"] == report["steps"]
    assert found["train"] == report["data"]["train"] and found["gates"] == report["data"]["gates"]
    assert sum(b["rows"] for b in found["histogram"]) == found["train"]["rows"] == 16
    assert [row["row"] for row in found["rows"]] == [1, 2]
    assert found["plan"]["time"]["steps"] == report["steps"] and found["within"] == []


def test_it_says_what_fits_into_a_time(halfbyte: Cli) -> None:
    asked = ["--set", "train.within=20m", "--set", "data.eval=4"]
    found = json.loads(halfbyte("data", "check", "recipe.yaml", "--json", *asked).out)
    assert found["within"][0].startswith("20:00 are about ")
    assert "within    20:00 are about " in halfbyte("data", "check", "recipe.yaml", *asked).out


def test_steps_have_no_more_rows_than_there_are(halfbyte: Cli) -> None:
    asked = ["--set", "train.per_device_train_batch_size=64"]
    found = json.loads(halfbyte("data", "check", "recipe.yaml", "--json", *asked).out)["run"]
    assert (found["steps"], found["rows_per_step"], found["micro_batches_per_step"]) == (2, 16, 1.0)
    assert "2 steps of 16 rows" in halfbyte("train", "recipe.yaml", "--dry-run", *asked).out


def test_rows_alone_need_a_model_and_a_row_can_be_chosen(halfbyte: Cli) -> None:
    without = halfbyte("data", "check", "train.jsonl")
    assert without.code == 2
    assert without.err == (
        "error: train.jsonl alone cannot be tokenised: no model is named.\n"
        "  fix: halfbyte data check train.jsonl --model MODEL\n"
    )
    ended = halfbyte("data", "check", "train.jsonl", "--model", "model", "--row", "16")
    assert ended.code == 0 and "row 16 (train.jsonl:16)" in ended.out and "row 1 (" not in ended.out
    beyond = halfbyte("data", "check", "train.jsonl", "--model", "model", "--row", "17")
    assert (beyond.code, beyond.err) == (
        2, "error: there is no row 17: 16 rows are trained on.\n  fix: --row 1 to --row 16\n",
    )  # fmt: skip


def test_with_a_recipe_another_model_can_be_named_and_limits_on_targets_are_checked(halfbyte: Cli, here: Path) -> None:
    tiny_run.checkpoint(here / "other", "gpt2")
    for named in ("model", "other"):
        (said,) = halfbyte("data", "check", "recipe.yaml", "--model", named).out.splitlines()[:1]
        assert said.startswith("model     ") and said.endswith(f"/{named}")
    ended = halfbyte("data", "check", "recipe.yaml", "--set", "lora.exclude_modules=[nowhere]")
    assert ended.code == 2 and "nowhere" in ended.err


def test_what_would_be_refused_is_shown_and_the_exit_code_is_2(halfbyte: Cli) -> None:
    ended = halfbyte("data", "check", "recipe.yaml", "--set", "data.max_length=5", "--set", "data.overlong=skip")
    assert ended.code == 2 and ended.err.startswith("error: no row is left")
    config = Path("model/config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 100}))
    ended = halfbyte("data", "check", "recipe.yaml")
    assert ended.code == 2 and "refused  vocabulary" in ended.out and "row 1 (" in ended.out


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["eval.metrics=[number]"], "not one of the 4 expected answers has a number after the mark '####'"),
        (["eval.metrics=[json_fields]"], "not one of the 4 expected answers is a JSON object"),
        (["eval.metrics=[choice]"], "the metric choice needs choices, and there are none: 4 rows expect 4 different"),
        (["eval.metrics=[choice]", "eval.choices=[good, bad]"], "is not among eval.choices (good, bad)"),
        (["train.lr_scheduler_type=polynomial", "train.lr_scheduler_kwargs={lr_end: 1}"], "cannot be made as asked"),
    ],
)
def test_what_train_refuses_of_the_rows_data_check_and_a_dry_run_refuse(
    halfbyte: Cli, sets: list[str], told: str
) -> None:
    words = [word for text in ["data.eval=4", *sets] for word in ("--set", text)]
    for command in (("data", "check"), ("train", "--dry-run"), ("train",)):
        ended = halfbyte(*command, "recipe.yaml", *words)
        assert ended.code == 2 and told in " ".join((ended.out + ended.err).split()), ended
    assert not Path(load_recipe(Path("recipe.yaml")).recipe.output).exists()


def test_what_the_rows_have_passes(halfbyte: Cli) -> None:
    asked = ("--set", "eval.metrics=[exact_match, normalized_match]")
    ended = halfbyte("data", "check", "recipe.yaml", "--set", "data.eval=4", *asked)
    assert "ok       metrics        4 held-out rows have what exact_match, normalized_match compares" in ended.out
    ended = halfbyte("data", "check", "recipe.yaml", "--set", "data.eval=none", *asked)
    assert ended.code == 0 and "warning  metrics        eval.metrics asks for exact_match, " in ended.out


def test_rows_that_are_too_long_hide_nothing(halfbyte: Cli) -> None:
    """The whole table, the histogram with the long rows in it, and rows to look at, beside what is refused."""
    long = json.dumps({"prompt": "red " * 100, "completion": "cup"})
    Path("train.jsonl").write_text(f"{Path('train.jsonl').read_text()}{long}\n")
    ended = halfbyte("data", "check", "recipe.yaml", "--row", "17")
    assert ended.code == 2 and ended.err == ""
    assert "refused  length         1 of 17 rows are over 128 tokens (train.jsonl:17: " in ended.out
    for gate in ("labels", "end token", "context", "duplicates", "empty answers", "overlap", "unseen", "vocabulary"):
        assert f"ok       {gate}" in ended.out or f"warning  {gate}" in ended.out
    found = json.loads(halfbyte("data", "check", "recipe.yaml", "--json").out)
    assert sum(part["rows"] for part in found["histogram"]) == 17 and found["histogram"][-1]["most"] > 128
    assert "row 17 (train.jsonl:17)" in ended.out and "steps of 4 rows" in ended.out
    refused = halfbyte("train", "recipe.yaml")
    assert refused.code == 2 and "error: 1 of 17 rows are longer than data.max_length 128" in refused.err


def test_the_histogram_holds_every_row_once() -> None:
    for lengths in ([5], [1, 2, 3], [97, 570, 96, 333], list(range(1, 5000, 7))):
        bins = preview.histogram(lengths)
        assert len(bins) <= preview.BINS
        for found in bins:
            assert found.rows == sum(found.least <= n <= found.most for n in lengths)
        assert sum(found.rows for found in bins) == len(lengths)
