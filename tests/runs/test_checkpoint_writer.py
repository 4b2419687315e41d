"""Checkpoints are written by a thread: what is read does not move, the next waits, and a full disk ends nothing."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from halfbyte.errors import TrainError
from halfbyte.runs import checkpoint, points
from halfbyte.runs.checkpoint import CheckpointWriter
from halfbyte.system import files


class Told:
    def __init__(self) -> None:
        self.saved, self.full = list[str](), list[str]()

    def writing(self, folder: Path, keep: int | None = None) -> CheckpointWriter:
        return CheckpointWriter(
            folder, keep, lambda path, why: self.saved.append(f"{path.name} {why}"), self.full.append
        )


class Slow:
    """An adapter whose writing waits until it is let go."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.go, self.begun = weight, threading.Event(), threading.Event()

    def __call__(self, folder: Path) -> None:
        self.begun.set()
        assert self.go.wait(30)
        checkpoint.save_file({"w": self.weight}, folder / "adapter_model.safetensors")


def taken(step: int, write: Any) -> checkpoint.Snapshot:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    return checkpoint.snapshot(
        step,
        randomness=checkpoint.Randomness.now(),
        write_adapter=write,
        trainer_state="{}",
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        trained={},
    )


def quick(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w")


def test_a_run_goes_on_while_it_is_written_and_waits_before_weights_move(tmp_path: Path) -> None:
    weight, told = torch.ones(4), Told()
    writing, slow = told.writing(tmp_path), Slow(weight)
    writing.start(taken(1, slow), "")
    assert slow.begun.wait(30) and points.every(tmp_path) == []
    writing.look()
    assert told.saved == [], "it is not waited for"
    moved = threading.Thread(target=lambda: (writing.wait_until_read(), weight.zero_()))
    moved.start()
    moved.join(0.05)
    assert moved.is_alive() and bool(weight.all())
    slow.go.set()
    moved.join()
    writing.finish()
    assert told.saved == ["step-000001 "]
    assert bool(load_file(tmp_path / "step-000001" / "adapter_model.safetensors")["w"].all())


def test_the_next_one_begins_when_the_last_is_whole(tmp_path: Path) -> None:
    told, slow = Told(), Slow(torch.ones(4))
    writing = told.writing(tmp_path)
    writing.start(taken(1, slow), "a")
    threading.Timer(0.05, slow.go.set).start()
    writing.start(taken(2, quick), "b")
    assert told.saved == ["step-000001 a"] and points.is_whole(tmp_path / "step-000001", hashes=True)
    writing.finish()
    assert told.saved == ["step-000001 a", "step-000002 b"]


def test_an_older_one_goes_after_the_new_one_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    writing = told.writing(tmp_path, keep=1)
    writing.start(taken(1, quick), "")
    writing.finish()
    monkeypatch.setattr(files, "forget", lambda path: path.write_bytes(b"?") if path.name == "weights" else None)
    writing.start(taken(2, quick), "")
    with pytest.raises(TrainError, match=r"step-000002 is not what was written: weights has another sha256"):
        writing.finish()
    assert points.is_whole(tmp_path / "step-000001", hashes=True), "the older one stays"
    found = points.newest(tmp_path)
    assert found is not None and found.step == 1 and "step-000002" in found.passed_over[0]


WORDS = "Error while serializing: I/O error: No space left on device (os error 28)"  # seen on a full tmpfs


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), SafetensorError(WORDS)])
def test_a_full_disk_is_told_and_ends_nothing(error: Exception, tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        (folder / "weights").write_bytes(b"half of it")
        raise error

    told = Told()
    writing = told.writing(tmp_path)
    writing.start(taken(1, quick), "")
    writing.start(taken(2, full), "")
    writing.wait_until_read()
    writing.finish()
    assert told.saved == ["step-000001 "]
    assert len(told.full) == 1 and "a checkpoint could not be written: the disk of" in told.full[0]
    writing.start(taken(3, quick), "")
    writing.finish()
    assert [p.name for p in tmp_path.iterdir()] != [] and len(points.every(tmp_path)) == 2
    assert not list(tmp_path.glob(".step-*"))


def test_another_error_is_raised_where_the_run_is_with_its_command(tmp_path: Path) -> None:
    (tmp_path / "my run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "my run" / "recipe.yaml").touch()

    def refuses(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    writing = Told().writing(tmp_path / "my run" / "checkpoints")
    writing.start(taken(1, refuses), "")
    with pytest.raises(TrainError, match="a checkpoint could not be written: Permission denied") as caught:
        writing.finish()
    assert caught.value.fix is not None and caught.value.fix.endswith(f"halfbyte train '{tmp_path}/my run' --resume")
    writing.finish()
