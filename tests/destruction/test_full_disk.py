"""A run on a small disk of its own (tmpfs) that fills up at each kind of write, or turns read-only."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halfbyte import finetune
from halfbyte.errors import DiskFull, RunError, TrainError
from halfbyte.recipe.file import load_recipe
from halfbyte.runs import folder, points
from halfbyte.runs.folder import DiskRetry, RunFolder
from halfbyte.training.events import Listener
from tests import tiny_run

NAME = "adapter/adapter_model.safetensors"
SIZE = "4m"


def mount(*words: str) -> bool:
    return subprocess.run([*words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    if not mount("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(path)):
        pytest.skip("only root may mount a disk")
    yield path
    assert mount("umount", "-l", str(path))


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "ballast").open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with contextlib.suppress(OSError):
        for i in range(64):  # a page that a file of its own would find
            (disk / f"ballast-{i}").write_bytes(b"x")


def free(disk: Path) -> None:
    for path in disk.glob("ballast*"):
        path.unlink()


class Fills(Listener):
    """Fills the disk after a step or at a note, and frees it after another step or at the first warning of a wait."""

    def __init__(self, disk: Path, at: int = -1, until: int = -1, *, note: str = "", frees: bool = True) -> None:
        self.disk, self.at, self.until, self.at_note, self.frees = disk, at, until, note, frees
        self.warnings, self.notes, self.saves = list[str](), list[str](), list[str]()

    def note(self, label: str, text: str) -> None:
        self.notes.append(f"{label}: {text}")
        if label == self.at_note:
            fill(self.disk)

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] == self.at:
            fill(self.disk)
        if row["step"] == self.until:
            free(self.disk)

    def saved(self, path: Path, reason: str) -> None:
        self.saves.append(path.name)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        if self.frees and "Waiting" in text:
            free(self.disk)


ASKED: dict[str, Any] = {
    "train__max_steps": 10,
    "train__save_strategy": "steps",
    "train__save_steps": 2,
    "train__eval_strategy": "steps",
    "train__eval_steps": 2,
    "train__load_best_model_at_end": True,
    "lora__lora_dropout": 0.1,
}


@pytest.fixture
def recipe(tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder, "RETRY_EVERY_S", 0.01)
    tiny_run.rows(tmp_path / "held.jsonl", 6, seed=5)
    tiny_run.recipe(tmp_path, **ASKED, data__eval=tmp_path / "held.jsonl", output=tmp_path / "whole")
    finetune.train(load_recipe(tmp_path / "recipe.yaml"))
    return tmp_path / "recipe.yaml"


def whole(folder: Path, disk: Path) -> None:
    assert (disk / "run" / NAME).read_bytes() == (folder / "whole" / NAME).read_bytes()
    keys = ("step", "loss", "eval_loss", "grad_norm")
    mine, theirs = (RunFolder(run).read_metrics() for run in (disk / "run", folder / "whole"))
    assert [[row.get(k) for k in keys] for row in mine] == [[row.get(k) for k in keys] for row in theirs]
    assert not list((disk / "run").rglob(".*"))


# rows, checkpoints and the best adapter in the middle; the first of them; those of the last evaluation; the end
@pytest.mark.parametrize(("at", "until"), [(3, 7), (1, 3), (9, -1), (10, -1)])
def test_a_disk_that_fills_up_ends_no_run(at: int, until: int, recipe: Path, disk: Path) -> None:
    heard = Fills(disk, at, until)
    outcome = finetune.train(load_recipe(recipe, [f"output={disk / 'run'}"]), listener=heard)
    assert outcome.step == 10 and outcome.exit_code == 0
    if until > 0:
        assert any("the run goes on, and its earlier checkpoints stay" in text for text in heard.warnings)
        assert any("disk: there is room again" in text for text in heard.notes)
        assert any(text.startswith("step ") for text in outcome.report["notices"])
    else:
        assert any("Waiting 10 minutes for room" in text for text in heard.warnings)
    whole(recipe.parent, disk)
    assert all(points.is_whole(path, hashes=True) for path in points.every(disk / "run" / "checkpoints"))


def test_one_that_stays_full_leaves_the_last_checkpoint_and_goes_on_later(
    recipe: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = DiskRetry.__init__
    monkeypatch.setattr(DiskRetry, "__init__", lambda self, *args, **more: wait(self, *args, **more | {"wait_s": 0.05}))
    loaded = load_recipe(recipe, [f"output={disk / 'run'}"])
    with pytest.raises(DiskFull, match=r"is full|no space left"):
        finetune.train(loaded, listener=Fills(disk, 7, frees=False))
    found = points.newest(disk / "run" / "checkpoints")
    assert found is not None and found.step == 6 and not (disk / "run" / "adapter").exists()
    free(disk)
    finetune.train(loaded, resume=True)
    whole(recipe.parent, disk)


def test_a_disk_that_is_full_before_the_first_step_is_refused(recipe: Path, disk: Path) -> None:
    loaded = load_recipe(recipe, [f"output={disk / 'run'}"])
    with pytest.raises(RunError, match="no space left"):
        finetune.train(loaded, listener=Fills(disk, note="rehearsed"))
    free(disk)
    assert list(disk.iterdir()) == []
    finetune.train(loaded)
    whole(recipe.parent, disk)


def test_a_folder_that_turns_read_only_is_said_and_what_is_there_stays(recipe: Path, disk: Path) -> None:
    folder = str(disk / "run" / "checkpoints")

    class TurnsReadOnly(Listener):
        def step(self, row: dict[str, Any]) -> None:
            if row["step"] == 5:
                assert mount("mount", "--bind", folder, folder) and mount("mount", "-o", "remount,bind,ro", folder)

    loaded = load_recipe(recipe, [f"output={disk / 'run'}"])
    try:
        with pytest.raises(TrainError, match="could not be written: Read-only file system"):
            finetune.train(loaded, listener=TurnsReadOnly())
    finally:
        assert mount("umount", "-l", folder)
    found = points.newest(disk / "run" / "checkpoints")
    assert found is not None and found.step == 4
    finetune.train(loaded, resume=True)
    whole(recipe.parent, disk)


def test_a_run_folder_is_one_process_alone_and_a_dead_ones_lock_is_taken(tmp_path: Path) -> None:
    loaded = tiny_run.recipe(tmp_path, train__save_strategy="steps", train__save_steps=2)
    finetune.train(loaded)
    run = RunFolder(tmp_path / "run")
    child = os.fork()
    if child == 0:
        with run.lock():
            (tmp_path / "locked").touch()
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert (tmp_path / "locked").exists() and run.path.joinpath("lock").read_text() == str(child)
    run.report.unlink()
    assert finetune.train(loaded, resume=True).step == 4
