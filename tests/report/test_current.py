"""Whether a run's page has to be made: each thing that it is made of, written after it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.report import current, page
from halfbyte.report.current import is_current
from halfbyte.runs.folder import RunFolder
from tests.report import made


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A finished run with its page, a second old; its code is older."""
    code = tmp_path / "halfbyte" / "report"
    (code / "web").mkdir(parents=True)
    (code / "web" / "run.html").touch()
    (code / "page.py").touch()
    monkeypatch.setattr(current, "MAKERS", tmp_path / "halfbyte")
    run = made.finished(tmp_path / "run", made.metrics(3), **made.verdict())
    (run.path / "eval").mkdir()
    (run.path / "eval" / "scores.json").write_text("{}")
    (run.path / "lock").touch()
    page.write(run.path)
    for path in tmp_path.rglob("*"):
        written(path, 1.0 if path == run.page else 2.0)
    return run


def written(path: Path, seconds_ago: float) -> None:
    at = time.time() - seconds_ago
    os.utime(path, (at, at))


def test_the_page_of_a_finished_run_is_current_until_something_changes(run: RunFolder) -> None:
    assert is_current(run)
    (run.path / "lock").touch()  # somebody has looked at who writes
    assert is_current(run)


@pytest.mark.parametrize(
    "name",
    ["recipe.yaml", "metrics.jsonl", "report.json", "eval/scores.json", "adapter/adapter_model.safetensors",
     "../halfbyte/report/page.py", "../halfbyte/report/web/run.html"],
)  # fmt: skip
def test_it_is_not_where_what_it_is_made_of_is_newer(name: str, run: RunFolder) -> None:
    written(run.path / name, 0.0)
    assert not is_current(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda run: run.page.unlink(),
        lambda run: run.report.unlink(),
        lambda run: (run.path / "eval" / "answers.jsonl").touch(),
        lambda run: (run.path / "tuning.json").touch(),
    ],
)
def test_nor_where_one_is_missing_or_new(change: Callable[[RunFolder], None], run: RunFolder) -> None:
    change(run)
    assert not is_current(run)


def test_nor_while_a_process_writes_the_run(run: RunFolder) -> None:
    with run.lock():
        assert not is_current(run)
    assert is_current(run)
