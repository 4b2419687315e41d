"""What became of a run, told from its folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from halfbyte.runs import listing
from halfbyte.runs.folder import RunFolder
from tests.report import made


def saved(run: RunFolder, step: int) -> None:
    (run.checkpoints / f"step-{step:06d}").mkdir()


@pytest.mark.parametrize(
    ("change", "name", "why"),
    [
        (lambda run: saved(run, 20), "stopped", "with a checkpoint at step 20"),
        (lambda run: saved(run, 10), "crashed", "killed after the checkpoint at step 10"),
        (lambda run: None, "crashed", "killed after no checkpoint"),
        (lambda run: (run.path / "crash.txt").write_text("boom"), "crashed", "see crash.txt"),
        (lambda run: run.metrics.unlink(), "not begun", "it ended before its first step"),
        (
            lambda run: (run.metrics.unlink(), (run.path / "tuning.json").write_text("{}")),
            "stopped",
            "while settings were searched; finished probes are kept",
        ),
    ],
)
def test_a_run_that_has_not_finished(tmp_path: Path, change, name: str, why: str) -> None:  # type: ignore[no-untyped-def]
    run = made.run(tmp_path / "run", made.metrics(20), steps=50)
    change(run)
    state = listing.state(run)
    assert (state.name, state.why) == (name, why)
    assert state.steps == 50 and state.step == (20 if run.metrics.exists() else 0)


@pytest.mark.parametrize(
    ("report", "name", "why"),
    [
        ({}, "finished", ""),
        ({"stopped_early": True}, "finished", "stopped early: no better evaluation"),
        ({"diverged": True}, "finished", ""),  # of a version that compared single steps
        (made.verdict("better", "better: 1 beside 2"), "finished", "better: 1 beside 2"),
        (made.verdict("no difference", "none"), "finished", "none"),
        (made.verdict("worse", "worse: 3 beside 2"), "worse", "worse: 3 beside 2"),
        (
            made.verdict("diverged", "far") | {"stopped_early": True},
            "diverged",
            "stopped early: no better evaluation; far",
        ),
        (made.verdict("worse", "of another adapter", "5f0c"), "finished", ""),
    ],
)
def test_a_run_that_has_ended(tmp_path: Path, report: dict[str, Any], name: str, why: str) -> None:
    state = listing.state(made.finished(tmp_path / "run", made.metrics(20), **report))
    assert (state.name, state.step, state.why) == (name, 20, why)


def test_what_ended_a_run_before_its_last_step_is_said(tmp_path: Path) -> None:
    def short(name: str, **report: Any) -> tuple[str, str]:
        run = made.finished(tmp_path / name, made.metrics(7), steps=7, **report)
        run.plan.write_text(json.dumps({"steps": 7 if name == "whole" else 40}))
        return (state := listing.state(run)).short, state.why

    within = {"within": {"within_s": 9.0, "spent_s": 9.0}}
    assert short("patience", stopped_early=True) == ("finished, stopped early", "stopped early: no better evaluation")
    assert short("time", **within) == ("finished, time over", "train.within was over")
    assert short("whole", **within) == ("finished", "")


def test_a_finished_run_whose_metrics_are_lost_has_the_steps_of_its_report(tmp_path: Path) -> None:
    run = made.finished(tmp_path / "run", made.metrics(20), steps=20)
    run.metrics.unlink()
    assert (listing.state(run).step, listing.state(run).name) == (20, "finished")


def test_a_run_that_is_written_now_is_running_but_to_its_own_process(tmp_path: Path) -> None:
    run = made.finished(tmp_path / "run", made.metrics(20))
    with run.lock():
        assert listing.state(run).writer == str(os.getpid())
        assert listing.state(run).name == "running"
        assert listing.state(run, ours=True).name == "finished"
    assert listing.state(run).name == "finished"


def test_looking_does_not_keep_a_run_from_being_locked(tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.metrics(2))
    with run.lock():
        pass
    assert run.writer() is None
    with run.lock():
        assert run.writer() is not None


def test_every_run_below_a_folder_the_newest_first(tmp_path: Path) -> None:
    for number, name in enumerate(("old", "sweep/new")):
        run = made.run(tmp_path / name, made.metrics(5, evals=1))
        for file in (run.metrics, run.recipe):
            os.utime(file, (1e9 + number, 1e9 + number))
    (tmp_path / "no run").mkdir()
    (tmp_path / "no run" / "recipe.yaml").write_text("model: x\n")
    found = listing.runs_in(tmp_path)
    assert [e.run.name for e in found] == ["new", "old"]
    assert found[0].model == "tiny-model" and found[0].eval_loss is not None and found[0].loss is not None
    json.dumps([e.to_json() for e in found])


def test_the_last_rows_are_read_from_the_end_of_a_long_file(tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.metrics(5000, evals=2))
    with run.metrics.open("ab") as stream:
        stream.write(b'{"step": 5001, "loss"')
    step, evaluated = listing.last_rows(run.metrics)
    assert step["step"] == 5000 and evaluated["step"] == 5000
    assert listing.last_rows(tmp_path / "none") == ({}, {})
