"""Early stopping counts evaluations as transformers does, also over several processes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from halfbyte import finetune
from halfbyte.errors import TrainError
from halfbyte.recipe.schema import Loaded
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with model and rows, and with the run (`whole/`) that nothing stops."""
    folder = tmp_path_factory.mktemp("stopping")
    tiny_run.rows(folder / "eval.jsonl", 8, seed=5)
    finetune.train(recipe(folder, "whole"))
    return folder


def recipe(folder: Path, output: str, **stopping: Any) -> Loaded:
    return tiny_run.recipe(folder, **OVERSHOOTS, **stopping, data__eval=folder / "eval.jsonl", output=folder / output)


@pytest.mark.parametrize(("patience", "threshold"), [(2, 0.0), (3, 0.0), (2, 0.3)])
def test_a_run_stops_when_no_evaluation_is_better(patience: int, threshold: float, whole: Path) -> None:
    """Where it counts up to three, a run that is stopped in between goes on counting."""
    stop = stops_after(losses(whole / "whole"), patience, threshold)
    assert patience < stop < 20, losses(whole / "whole")
    stopping = {"train__early_stopping_patience": patience, "train__early_stopping_threshold": threshold}
    name = f"{patience}-{threshold}"
    loaded = recipe(whole, name, **stopping)
    outcome = finetune.train(loaded)
    assert losses(outcome.run) == losses(whole / "whole")[:stop]
    assert (outcome.step, outcome.report["steps"]) == (stop, stop)
    assert outcome.report["notices"][-1] == f"stopped early at step {stop} of 20: no better evaluation in {patience}"
    assert finetune.train(loaded, resume=True).report == outcome.report, "it is complete"
    if patience == 3:
        loaded = recipe(whole, f"{name}-resumed", **stopping)
        finetune.train(loaded, listener=Interrupt(stop - 1, "signal"))
        resumed = finetune.train(loaded, resume=True)
        assert resumed.step == stop
        assert adapter(resumed.run) == adapter(outcome.run)


def adapter(run: Path) -> bytes:
    return (run / "adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(("at", "how"), [(1, "crash"), (5, "signal")])
def test_the_evaluation_before_the_first_step_counts_once(at: int, how: str, whole: Path) -> None:
    """Also of a run that begins anew, as it was ended before its first checkpoint."""
    values = {"train__eval_on_start": True, "train__eval_steps": 4, "train__max_steps": 8, "train__report_to": "none"}
    loaded = tiny_run.recipe(
        whole, **(OVERSHOOTS | values), data__eval=whole / "eval.jsonl", output=whole / f"start-{how}"
    )
    with suppress(TrainError):
        finetune.train(loaded, listener=Interrupt(at, how))
    run = finetune.train(loaded, resume=True).run
    assert [row["step"] for row in RunFolder(run).read_metrics() if "eval_loss" in row] == [0, 4, 8]
