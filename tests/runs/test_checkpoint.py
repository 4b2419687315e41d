"""Checkpoints are whole or absent, and put everything back."""

from __future__ import annotations

import errno
import json
import random
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch

from halfbyte.errors import RunError
from halfbyte.runs import checkpoint, points
from halfbyte.system import files

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "bitsandbytes 8-bit": lambda p: bnb.optim.AdamW8bit(p, lr=0.1, min_8bit_size=0),
    "bitsandbytes 32-bit": lambda p: bnb.optim.AdamW(p, lr=0.1, optim_bits=32),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def parts(make: Any, seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = make(model.parameters())
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def advance(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> None:
    for _ in range(steps):
        loss = model(torch.randn(4, 3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def save(folder: Path, step: int, optimizer: Any, scheduler: Any, adapter: bytes = b"weights") -> Path:
    taken = checkpoint.snapshot(
        step,
        randomness=checkpoint.Randomness.now(),
        write_adapter=lambda p: (p / "adapter_model.safetensors").write_bytes(adapter) and None,
        trainer_state="{}",
        optimizer=optimizer,
        scheduler=scheduler,
        trained={},
    )
    return checkpoint.write(folder, taken)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_restored_run_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, optimizer, scheduler = parts(OPTIMIZERS[name])
    advance(model, optimizer, scheduler, 3)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    path = save(tmp_path, 3, optimizer, scheduler)
    advance(model, optimizer, scheduler, 3)

    other, optimizer2, scheduler2 = parts(OPTIMIZERS[name], seed=9)
    other.load_state_dict(weights)
    checkpoint.load_optimizer(path, optimizer2, scheduler2)
    checkpoint.load_rng(path)
    advance(other, optimizer2, scheduler2, 3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    assert scheduler.get_last_lr() == scheduler2.get_last_lr()


def test_every_random_source_is_put_back(tmp_path: Path) -> None:
    _, optimizer, scheduler = parts(OPTIMIZERS["sgd"])
    path = save(tmp_path, 1, optimizer, scheduler)
    wanted = (torch.rand(3), np.random.rand(3), random.random(), np.random.randn())
    torch.rand(5), np.random.rand(7), random.random()
    checkpoint.load_rng(path)
    got = (torch.rand(3), np.random.rand(3), random.random(), np.random.randn())
    assert torch.equal(wanted[0], got[0])
    assert wanted[1].tolist() == got[1].tolist()
    assert wanted[2:] == got[2:]


def test_nothing_is_pickled(tmp_path: Path) -> None:
    model, optimizer, scheduler = parts(OPTIMIZERS["adamw"])
    advance(model, optimizer, scheduler, 1)
    path = save(tmp_path, 1, optimizer, scheduler)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    for file in path.glob("*.json"):
        json.loads(file.read_text())


@pytest.mark.parametrize("damage", ["cut", "gone", "changed", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(damage: str, tmp_path: Path) -> None:
    model, optimizer, scheduler = parts(OPTIMIZERS["adamw"])
    advance(model, optimizer, scheduler, 1)
    good = save(tmp_path, 10, optimizer, scheduler)
    bad = save(tmp_path, 20, optimizer, scheduler)
    file = bad / checkpoint.OPTIMIZER_TENSORS
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "gone":
        file.unlink()
    elif damage == "changed":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        (bad / points.MANIFEST).unlink()
    assert points.newest(tmp_path).path == good


def test_no_whole_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    assert points.newest(tmp_path) is None
    (tmp_path / "step-000010").mkdir()
    with pytest.raises(RunError, match="found only damaged ones: step-000010"):
        points.newest(tmp_path)


def test_a_full_disk_leaves_the_older_checkpoint_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer, scheduler = parts(OPTIMIZERS["sgd"])
    good = save(tmp_path, 10, optimizer, scheduler)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path, 20, optimizer, scheduler)
    assert sorted(p.name for p in tmp_path.iterdir()) == [good.name]
    assert points.newest(tmp_path).path == good


def test_pruning_keeps_the_newest_and_clears_dead_writers(tmp_path: Path) -> None:
    _, optimizer, scheduler = parts(OPTIMIZERS["sgd"])
    for step in (10, 20, 30):
        save(tmp_path, step, optimizer, scheduler)
    (tmp_path / ".step-000040.999999999").mkdir()
    shutil.copytree(tmp_path / "step-000010", tmp_path / "best")
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-000020", "step-000030"]


def test_another_recipes_state_is_refused(tmp_path: Path) -> None:
    _, optimizer, scheduler = parts(OPTIMIZERS["adamw"])
    path = save(tmp_path, 1, optimizer, scheduler)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    other = OPTIMIZERS["adamw"](model.parameters())
    with pytest.raises(RunError, match="holds the optimiser state of 2 tensors, this recipe trains 4"):
        checkpoint.load_optimizer(path, other, torch.optim.lr_scheduler.LambdaLR(other, lambda s: 1.0))
