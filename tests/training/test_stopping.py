"""Early stopping counts evaluations as transformers does, also over several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfbyte import finetune
from halfbyte.runs.folder import RunFolder
from tests import tiny_run
from tests.training.test_trainer import Interrupt

OVERSHOOTS: dict[str, Any] = {
    "train__learning_rate": 0.5,
    "train__lr_scheduler_type": "constant",
    "train__max_steps": 20,
    "train__eval_strategy": "steps",
    "train__eval_steps": 1,
    "train__save_strategy": "steps",
    "train__save_steps": 2,
}


def losses(folder: Path) -> list[float]:
    return [row["eval_loss"] for row in RunFolder(folder).read_metrics() if "eval_loss" in row]


def stops_after(found: list[float], patience: int, threshold: float) -> int:
    """The evaluation at which a run stops, by the definition."""
    best, worse = found[0], 0
    for number, loss in enumerate(found[1:], start=2):
        worse = 0 if best - loss > threshold else worse + 1
        best = min(best, loss)
        if worse == patience:
            return number
    return len(found)


@pytest.mark.parametrize(("patience", "threshold"), [(2, 0.0), (3, 0.0), (2, 0.3)])
def test_a_run_stops_when_no_evaluation_is_better(patience: int, threshold: float, tmp_path: Path) -> None:
    values = {**OVERSHOOTS, "data__eval": tiny_run.rows(tmp_path / "eval.jsonl", 8, seed=5)}
    finetune.train(tiny_run.recipe(tmp_path, **values, output=tmp_path / "whole"))
    stop = stops_after(losses(tmp_path / "whole"), patience, threshold)
    assert patience < stop < 20, losses(tmp_path / "whole")
    stopping = {"train__early_stopping_patience": patience, "train__early_stopping_threshold": threshold}
    loaded = tiny_run.recipe(tmp_path, **values, **stopping)
    outcome = finetune.train(loaded)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")[:stop]
    assert (outcome.step, outcome.report["steps"]) == (stop, stop)
    assert outcome.report["notices"][-1] == f"stopped early at step {stop} of 20: no better evaluation in {patience}"
    assert finetune.train(loaded, resume=True).report == outcome.report, "it is complete"


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    values = {**OVERSHOOTS, "data__eval": tiny_run.rows(tmp_path / "eval.jsonl", 8, seed=5)}
    values["train__early_stopping_patience"] = 3
    finetune.train(tiny_run.recipe(tmp_path, **values, output=tmp_path / "whole"))
    stop = len(losses(tmp_path / "whole"))
    assert stop < 20
    loaded = tiny_run.recipe(tmp_path, **values)
    finetune.train(loaded, listener=Interrupt(stop - 1, "signal"))
    outcome = finetune.train(loaded, resume=True)
    assert outcome.step == stop
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
