"""Any plan of one recipe learns the same: split, placement, recomputation, budget, and steps down in the middle."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import finetune
from halfbyte.plan import memory, store_build
from halfbyte.system import device
from halfbyte.training import pace
from tests import tiny_run

STEPS = 4


@dataclass(frozen=True)
class Way:
    """One way to run the recipe. `free`: RAM that the machine is said to have, with libraries that take none;
    `short_from`: at that look and later ones between micro-batches, memory is short; `taken`: what the run must have
    done."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    free: int | None = None
    short_from: int | None = None
    taken: dict[str, Any] = field(default_factory=dict)
    downs: tuple[str, ...] = ()


def choices(placement: str, recompute: bool | str, tokens: int | str) -> dict[str, Any]:
    return {
        "quant__placement": placement,
        "train__gradient_checkpointing": recompute,
        "train__max_tokens_per_micro_batch": tokens,
    }


WAYS = (
    Way("one example a micro-batch", choices("resident", False, 1)),
    Way("two or three a micro-batch", choices("resident", False, 60)),
    Way("mapped", choices("mapped", False, 60)),
    Way("mapped, cheap again", choices("mapped", "selective", 60), taken={"recompute": "selective"}),
    Way("resident, all again", choices("resident", True, 1000), taken={"recompute": "full"}),
    Way("streamed", choices("streamed", False, 60), taken={"placement": "streamed"}),
    Way("streamed, cheap again, one a micro-batch", choices("streamed", "selective", 1)),
    Way("streamed, all again", choices("streamed", True, 1000)),
    Way("a machine with room", choices("auto", "auto", "auto"), 10**9, taken={"recompute": "none"}),
    Way("a small machine", choices("auto", "auto", "auto"), 1_150_000),
    Way("a smaller machine", choices("auto", "auto", "auto"), 850_000),
    Way("a machine that is short", choices("auto", "auto", "auto"), 500_000, taken={"recompute": "full"}),
    Way(
        "steps down in the middle of a step",
        choices("mapped", False, 60),
        short_from=4,
        downs=("recomputation none -> selective", "recomputation selective -> full", "micro-batches of 60 -> "),
    ),
    Way(
        "steps down, streamed",
        choices("streamed", "selective", 60),
        short_from=3,
        downs=("recomputation selective -> full", "micro-batches of 60 -> "),
    ),
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The folder with model and rows, and the losses of a whole step at once, resident, nothing done again."""
    root = tmp_path_factory.mktemp("invariance")
    return root, losses(root, choices("resident", False, 100_000), "reference")


def losses(root: Path, fields: dict[str, Any], name: str) -> list[float]:
    loaded = tiny_run.recipe(root, **fields, train__max_steps=STEPS, output=str(root / name.replace(" ", "-")))
    outcome = finetune.train(loaded)
    rows = [json.loads(line) for line in (outcome.run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_the_losses_do_not_depend_on_the_plan(
    reference: tuple[Path, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one test, since its end looks at all of them."""
    for way in WAYS:
        with monkeypatch.context() as patched:
            one_way(way, reference, patched)
    plans = [json.loads(path.read_text()) for path in reference[0].glob("*/plan.json")]
    kinds = {(p["placement"], p["recompute"], p["max_tokens_per_micro_batch"]) for p in plans}
    assert len(plans) == len(WAYS) + 1 and len(kinds) >= 10
    assert torch.get_default_dtype() == torch.float32


def one_way(way: Way, reference: tuple[Path, list[float]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe run this way has the losses of the reference, and did what it was made to do."""
    root, wanted = reference
    if way.free is not None:
        size = way.free + memory.HEAP_TOP_BYTES  # a reserve of each plan
        here = replace(device.detect(), ram_bytes=size, ram_available_bytes=size)
        monkeypatch.setattr(device, "detect", lambda: here)
        for name in ("LIBRARIES_PRIVATE_BYTES", "FIRST_MICRO_BATCH_BYTES", "TOKENIZER_BYTES_PER_ENTRY", "ROW_BYTES"):
            monkeypatch.setattr(memory, name, 0)
        monkeypatch.setattr(store_build, "LIBRARIES_PRIVATE_BYTES", 0)
    looks = 0

    def free() -> int:
        nonlocal looks
        looks += 1
        return 0 if way.short_from is not None and looks >= way.short_from else 10**12

    monkeypatch.setattr(pace, "ram_available", free)
    got = losses(root, way.fields, way.name)
    assert got == pytest.approx(wanted, rel=1e-4), way.name
    assert wanted[-1] < 0.9 * wanted[0], "the recipe learns, so that a lost gradient would show"
    run = root / way.name.replace(" ", "-")
    plan = json.loads((run / "plan.json").read_text())
    assert {name: plan[name] for name in way.taken} == way.taken, way.name
    notices = [n for n in json.loads((run / "report.json").read_text())["notices"] if n.startswith("memory: ")]
    assert len(notices) >= len(way.downs) and bool(notices) == bool(way.downs), (
        way.name
    )  # the last kind of step may repeat
    for said, wanted_down in zip(notices, way.downs, strict=False):
        assert said.removeprefix("memory: ").startswith(wanted_down)
