"""The best adapter of a run: kept whole, found again by the next process, also after a kill between two renames."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.errors import RunError, TrainError
from halfbyte.recipe.schema import Recipe
from halfbyte.runs import points
from halfbyte.runs.checkpoint import Best
from halfbyte.runs.folder import RunFolder


def recipe(metric: str | None = None) -> Recipe:
    train = {} if metric is None else {"metric_for_best_model": metric}
    return Recipe.model_validate({"model": "m", "data": {"train": "t"}, "train": train})


def writes(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "weights").write_text(text)

    return write


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    return run


def test_the_next_process_goes_on_from_it(run: RunFolder) -> None:
    best = Best.of(recipe(), run)
    assert (best.metric, best.value, best.step) == ("eval_loss", None, None) and best.is_better(1e9)
    best.keep({"value": 0.5, "step": 3, "compared": [[3.5, 2.0]]}, writes("first"))
    best.keep({"value": 0.25, "step": 7, "compared": [[7.5, 2.0]]}, writes("second"))
    again = Best.of(recipe(), run)
    assert again == best and (again.value, again.step, again.compared) == (0.25, 7, [[7.5, 2.0]])
    assert (again.folder / "weights").read_text() == "second"
    assert again.is_better(0.2) and not again.is_better(0.25) and not again.is_better(float("nan"))
    assert [p.name for p in run.checkpoints.iterdir()] == ["best"]


@pytest.mark.parametrize("harm", ["shorter", "changed", "gone"])
def test_a_damaged_one_is_refused_with_what_to_do(run: RunFolder, harm: str) -> None:
    Best.of(recipe(), run).keep({"value": 0.5, "step": 3}, writes("what has won"))
    points.check_best(run.checkpoints)
    weights = run.checkpoints / "best" / "weights"
    weights.write_text({"shorter": "what has", "changed": "what was won"}.get(harm, ""))
    if harm == "gone":
        weights.unlink()
    with pytest.raises(RunError, match=r"best adapter so far, .*/best, is damaged: weights ") as caught:
        points.check_best(run.checkpoints)
    assert caught.value.fix is not None and caught.value.fix.startswith(f"rm -r {run.checkpoints / 'best'}: ")


def test_one_of_an_older_version_whose_score_is_cut_short_is_none(run: RunFolder) -> None:
    (run.checkpoints / "best").mkdir(parents=True)
    (run.checkpoints / "best" / "best.json").write_text('{"metric": "eval_lo')
    points.check_best(run.checkpoints)  # it has no hashes
    assert Best.of(recipe(), run).value is None


def test_of_another_metric_it_starts_anew(run: RunFolder) -> None:
    Best.of(recipe(), run).keep({"value": 0.5, "step": 3, "compared": [[3.5, 2.0]]}, writes("x"))
    other = Best.of(recipe("perplexity"), run)
    assert (other.metric, other.value, other.step) == ("eval_perplexity", None, None)


def test_it_is_found_again_after_a_kill_between_two_renames(run: RunFolder) -> None:
    older = run.checkpoints / ".best.old"
    older.mkdir()
    (older / "best.json").write_text(json.dumps({"metric": "eval_loss", "value": 0.5, "step": 3}))
    best = Best.of(recipe(), run)
    assert (best.value, best.step) == (0.5, 3)
    assert (best.folder / "best.json").is_file() and not older.exists()


def test_a_disk_that_refuses_leaves_the_one_before(run: RunFolder) -> None:
    best = Best.of(recipe(), run)
    best.keep({"value": 0.5, "step": 3, "compared": [[3.5, 2.0]]}, writes("first"))

    def refuses(folder: Path) -> None:
        (folder / "weights").write_text("half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(TrainError, match=r"best adapter .* could not be written: the disk of .* is full"):
        best.keep({"value": 0.25, "step": 7, "compared": [[7.5, 2.0]]}, refuses)
    assert (best.value, best.step) == (0.5, 3) and Best.of(recipe(), run) == best
    assert (best.folder / "weights").read_text() == "first"


def test_a_loss_that_is_no_number_is_never_the_best(run: RunFolder) -> None:
    best = Best("eval_loss", run.checkpoints / "best")
    assert not best.is_better(float("nan")) and not best.is_better(float("inf"))
    assert best.is_better(25.3)
