"""A run under a memory limit of a control group: the plan reads it, places the base, and the run ends within it.

Slow: a base of 1.5 GB is written, and each limit is a training in a process of its own. Needs the right to make a group
below this process's own (root, or a delegated one); without it the tests are skipped, with a warning.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")]

LAYERS = 56  # of TinyLlama's width: with the embeddings 1.5 GB in 4 bits
MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Group:
    """A memory group of either version."""

    folder: Path
    limit_file: str
    peak_file: str
    oom_file: str

    @property
    def peak_bytes(self) -> int | None:
        """The most that was charged to it; None where the kernel does not keep it (v2 before Linux 5.19)."""
        path = self.folder / self.peak_file
        return int(path.read_text()) if path.is_file() else None

    @property
    def kills(self) -> int:
        found = re.search(r"^oom_kill (\d+)$", (self.folder / self.oom_file).read_text(), re.MULTILINE)
        return int(found[1]) if found else 0


def parents() -> Iterator[Group]:
    """This process's own memory group, of v1 and of v2, as far as they are there."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control")
            yield Group(MOUNT / "memory" / path.strip("/"), *names)
        elif controllers == "":
            folder = MOUNT / path.strip("/")
            active = folder / "cgroup.subtree_control"
            if active.is_file() and "memory" in active.read_text().split():
                yield Group(folder, "memory.max", "memory.peak", "memory.events")


@contextmanager
def group(limit: int) -> Iterator[Group]:
    """A group with this limit, gone afterwards. Skips, with a warning, where none can be made."""
    refused: list[str] = []
    for parent in parents():
        made = Group(parent.folder / f"halfbyte-test-{os.getpid()}", *list(parent.__dict__.values())[1:])
        try:
            made.folder.mkdir()
            (made.folder / made.limit_file).write_text(str(limit))
        except OSError as error:
            refused.append(f"{made.folder}: {error.strerror}")
            if made.folder.is_dir():
                made.folder.rmdir()
            continue
        try:
            yield made
        finally:
            made.folder.rmdir()
        return
    why = "no control group with a memory limit can be made here: " + ("; ".join(refused) or "no memory controller")
    warnings.warn(why, stacklevel=2)
    pytest.skip(why)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder of a base in 4 bits, none of it in the page cache; and its bytes."""
    from benchmarks import make_random, random_base

    with group(1 << 40):  # skip before anything is written
        pass
    folder = tmp_path_factory.mktemp("cgroup") / "base"
    size = random_base.write(folder, "tinyllama-1.1b", layers=LAYERS)
    make_random.tokenizer().save_pretrained(folder)
    return folder, size


def forget(folder: Path) -> None:
    """Take files out of the page cache, so that whoever reads them next is charged for them."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def trained(base: Path, folder: Path, limit: int) -> tuple[Group, dict[str, Any], int | None, list[float]]:
    """One step of two short rows in a group with this limit: the group, the plan, its peak, the losses."""
    folder.mkdir()
    rows = [{"prompt": "w1 w2 w3", "completion": " ".join(f"w{n}" for n in range(30))}] * 2
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": str(base),
        "lora": {"r": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 64},
        "train": {
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 1,
            "learning_rate": 1e-4, "save_strategy": "no",
        },
        "output": str(folder / "run"),
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    forget(base)
    with group(limit) as made:
        enter = 'echo $$ > "$1" && exec "$2" -m halfbyte train recipe.yaml'
        words = ("bash", "-c", enter, "bash", made.folder / "cgroup.procs", sys.executable)
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        peak, kills = made.peak_bytes, made.kills
    assert kills == 0
    plan = json.loads((folder / "run" / "plan.json").read_text())
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return made, plan, peak, [row["loss"] for row in steps if "loss" in row]


def test_the_plan_follows_the_limit_and_the_run_ends_within_it(base: tuple[Path, int], tmp_path: Path) -> None:
    folder, size = base
    limits = {"roomy": 3_200_000_000, "less": 1_700_000_000, "below the base": 1_350_000_000}
    assert limits["below the base"] < size
    seen: dict[str, tuple[str, list[float]]] = {}
    for name, limit in limits.items():
        _, plan, peak, losses = trained(folder, tmp_path / name.replace(" ", "-"), limit)
        assert plan["available_bytes"] <= limit
        assert peak is None or peak <= limit
        seen[name] = plan["placement"], losses
    assert seen["roomy"][0] == "mapped"
    assert seen["below the base"][0] == "streamed"
    for _, losses in seen.values():
        assert losses == pytest.approx(seen["roomy"][1], rel=1e-4)
