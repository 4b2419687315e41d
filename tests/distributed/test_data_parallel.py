"""One run on several processes is the run of one: the same losses, evaluations and adapters, whatever it is made of."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halfbyte import finetune
from halfbyte.recipe.file import load_recipe
from halfbyte.runs.folder import RunFolder
from tests import tiny_run
from tests.distributed import together

CLOSE = 1e-5
BASE = {"train__max_steps": 6, "train__max_tokens_per_micro_batch": 40, "lora__lora_dropout": 0.2}
EVALUATED = {
    "data__eval": 4, "train__eval_strategy": "steps", "train__eval_steps": 2, "train__load_best_model_at_end": True,
    "train__loraplus_lr_ratio": 4.0,
}  # fmt: skip


def train(recipe: Path, resume: bool = False) -> int:
    return finetune.train(load_recipe(recipe), resume=resume).step


def trained(folder: Path, size: int, **values: Any) -> RunFolder:
    """A run of the same rows and model on so many processes."""
    out = folder / f"run{size}"
    loaded = tiny_run.recipe(folder, **(BASE | values), output=out)
    assert loaded.path is not None
    if size == 1:
        finetune.train(loaded)
    else:
        steps = together.run(size, train, loaded.path)
        assert len(set(steps)) == 1
    return RunFolder(out)


def same(one: RunFolder, other: RunFolder) -> None:
    """Losses, norms, evaluations, the steps that were reached and chosen, and every number of the adapter."""
    rows, others = one.read_metrics(), other.read_metrics()
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for name in ("loss", "grad_norm", "eval_loss", "learning_rate", "tokens", "labelled_tokens"):
        got, wanted = ([row[name] for row in each if name in row] for each in (others, rows))
        assert got == pytest.approx(wanted, rel=CLOSE), name
    chosen = [json.loads(run.report.read_text()) for run in (one, other)]
    for name in ("adapter_step", "steps", "stopped_early"):
        assert chosen[0].get(name) == chosen[1].get(name)
    a, b = (load_file(run.adapter / "adapter_model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=CLOSE)


def test_three_processes_are_one_with_dropout_evaluation_and_the_best_adapter(tmp_path: Path) -> None:
    one, three = trained(tmp_path, 1, **EVALUATED), trained(tmp_path, 3, **EVALUATED)
    same(one, three)
    assert not [p for p in three.path.iterdir() if p.name.startswith(".")]


def to_six(run: Path) -> int:
    return finetune.train(load_recipe(RunFolder(run).recipe, ["train.max_steps=6"]), resume=True).step


@pytest.mark.parametrize("streams", [False, True])
def test_sources_in_shares_and_streamed_rows_on_other_processes_are_those_of_one(tmp_path: Path, streams: bool) -> None:
    """Two processes to step 3, three from there: as one process in one go, held-out losses of each source too."""
    for seed, name in enumerate(("mine", "wide", "held")):
        tiny_run.rows(tmp_path / f"{name}.jsonl", 20, seed=seed)
    mixed = [{"path": f"{tmp_path}/mine.jsonl", "weight": 2}, {"path": f"{tmp_path}/wide.jsonl", "replay": 0.25}]
    named = [{"path": f"{tmp_path}/{name}.jsonl", "name": name} for name in ("mine", "held")]
    values: dict[str, Any] = {"data__train": mixed, "data__eval": named}
    if streams:
        values |= {"data__train": f"{tmp_path}/[mw]*.jsonl", "data__streaming": True, "data__overlong": "skip"}
    every = {**EVALUATED, **values, "train__save_strategy": "steps", "train__save_steps": 3}
    every |= {"train__eval_steps": 3, "train__lr_scheduler_type": "constant"}
    one = trained(tmp_path, 1, **every)
    part = tiny_run.recipe(tmp_path, **(BASE | every | {"train__max_steps": 3}), output=tmp_path / "part")
    together.run(2, train, part.path)
    assert together.run(3, to_six, tmp_path / "part") == [6, 6, 6]
    same(one, RunFolder(tmp_path / "part"))
    for name in ("mine", "held"):
        columns = [
            [row[f"eval_{name}_loss"] for row in run.read_metrics() if "eval_loss" in row]
            for run in (one, RunFolder(tmp_path / "part"))
        ]
        assert columns[0] == pytest.approx(columns[1], rel=CLOSE)


def by_command(run: Path) -> None:
    from halfbyte.cli import main

    main.app(["train", str(run), "--resume", "--set", "train.max_steps=6", "-q"])


def test_the_command_goes_on_with_a_run_on_other_processes(tmp_path: Path) -> None:
    """The folder of a run, which only the first process reads, is what is given."""
    every = {"train__save_strategy": "steps", "train__save_steps": 3, "train__lr_scheduler_type": "constant"}
    one = trained(tmp_path, 1, **every)
    part = tiny_run.recipe(tmp_path, **(BASE | every | {"train__max_steps": 3}), output=tmp_path / "part")
    finetune.train(part)
    together.run(2, by_command, tmp_path / "part")
    same(one, RunFolder(tmp_path / "part"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    "values",
    [
        {"lora__lora_dropout": 0.0},
        {},
        EVALUATED,
        {"train__optim": "adamw_8bit"},
        {**EVALUATED, "train__early_stopping_patience": 1, "train__early_stopping_threshold": 100.0},
        {"quant__placement": "streamed"},
        {"quant__type": "none"},
        {"train__per_device_train_batch_size": 1, "train__gradient_accumulation_steps": 1},
        {"lora__modules_to_save": ["lm_head"]},
    ],
    ids=["plain", "dropout", "evaluated", "8bit", "early", "streamed", "unquantised", "fewer rows than ranks", "head"],
)
def test_any_number_of_processes_is_one(size: int, values: dict[str, Any], tmp_path: Path) -> None:
    # Sums in another order differ by 1e-7 of what is summed. Where that cancels to a thousandth, it is 1e-4 of a
    # gradient, and so of AdamW's step, which is as long as the rate: at 5e-3, after twenty of them, `CLOSE`.
    longer = {"train__max_steps": 20, "train__learning_rate": 5e-3, **values}
    same(trained(tmp_path, 1, **longer), trained(tmp_path, size, **longer))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 3), (3, 1), (2, 4)])
def test_a_run_goes_on_with_another_number_of_processes(first: int, then: int, tmp_path: Path) -> None:
    values = {"train__save_strategy": "steps", "train__save_steps": 2, **EVALUATED}
    whole = trained(tmp_path, 1, **values)
    loaded = tiny_run.recipe(tmp_path, **(BASE | values), output=tmp_path / "run")
    assert loaded.path is not None
    together.run(first, stopped_at_three, loaded.path)
    assert len(RunFolder(tmp_path / "run").read_metrics()) < len(whole.read_metrics())
    together.run(then, train, loaded.path, True)
    same(whole, RunFolder(tmp_path / "run"))


def stopped_at_three(recipe: Path) -> int:
    """A SIGTERM that comes to the last process alone, in the middle of its third step."""
    from halfbyte.training.trainer import StepTrainer

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    real = StepTrainer._run_micro_batch

    def counted(self: StepTrainer, *args: Any) -> Any:
        if rank == size - 1 and self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    StepTrainer._run_micro_batch = counted  # type: ignore[method-assign, assignment]
    outcome = finetune.train(load_recipe(recipe))
    assert outcome.stopped_by == signal.SIGTERM
    assert outcome.step in (2, 3)
    return outcome.step


def test_dropout_is_of_the_row_so_any_split_of_a_step_trains_alike(tmp_path: Path) -> None:
    """In one process, whose micro-batches hold 16 tokens or a whole step."""
    losses = []
    for tokens in (16, 4096):
        loaded = tiny_run.recipe(
            tmp_path, **(BASE | {"train__max_tokens_per_micro_batch": tokens}), output=tmp_path / str(tokens)
        )
        finetune.train(loaded)
        rows = RunFolder(tmp_path / str(tokens)).read_metrics()
        losses.append([row["loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=CLOSE)
