"""What was proven at the start is asked again before each checkpoint; a fault put in between stops the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import finetune
from halfbyte.errors import TrainError
from halfbyte.layers import attention, fuse, packed_attention
from halfbyte.quant import dequantise, formats
from halfbyte.runs import points
from halfbyte.runs.folder import RunFolder
from halfbyte.training.events import Listener
from tests import tiny, tiny_run

Patch = pytest.MonkeyPatch
SAVED = {"train__save_strategy": "steps", "train__save_steps": 2, "train__max_steps": 6}


class After(Listener):
    """Does something after a step."""

    def __init__(self, step: int, do: Callable[[], None]) -> None:
        self.at, self.do = step, do

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] == self.at:
            self.do()


def wrong_lora_scale(patch: Patch) -> None:
    real = fuse.lora_linear
    patch.setattr(fuse, "lora_linear", lambda x, layer, a, b, scale, p: real(x, layer, a, b, scale * 1.001, p))


def rows_see_each_other(patch: Patch) -> None:
    real = packed_attention._packed
    patch.setattr(
        packed_attention, "_packed", lambda m, q, k, v, pack, a: real(m, q, k, v, type(pack)((sum(pack.lengths),)), a)
    )


def attention_of_another_scale(patch: Patch) -> None:
    real = attention.attention

    def faulty(q: Any, k: Any, v: Any, n: Any, scale: float, *rest: Any, **more: Any) -> Any:
        return real(q, k, v, n, scale * 1.001, *rest, **more)

    patch.setattr(attention, "attention", faulty)


def wrong_scales(patch: Patch) -> None:
    real = dequantise.dequantised
    patch.setattr(dequantise, "dequantised", lambda module: real(module) * 1.01)


def gradients_end(patch: Patch) -> None:
    real = fuse.lora_linear

    def faulty(x: Any, layer: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.shape[1] != tiny.HIDDEN:  # down_proj
            a, b = a.detach(), b.detach()
        return real(x, layer, a, b, *rest)

    patch.setattr(fuse, "lora_linear", faulty)


FAULTS = {
    "scale of LoRA": (wrong_lora_scale, "gradients of 28 of 28 adapters"),
    "rows that see each other": (rows_see_each_other, "logits of packed rows"),
    "attention": (attention_of_another_scale, "gradients of"),
    "dequantising": (wrong_scales, "dequantised weights of shape"),
    "gradients that end": (gradients_end, "no gradient for"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of the run without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    finetune.train(tiny_run.recipe(folder, **SAVED, lora__target_modules="all-linear"))
    return (folder / "run" / "adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_middle_stops_the_run_before_its_checkpoint(
    fault: str, whole: bytes, tmp_path: Path, monkeypatch: Patch
) -> None:
    put_in, said = FAULTS[fault]
    loaded = tiny_run.recipe(tmp_path, **SAVED, lora__target_modules="all-linear")
    pattern = rf"since its start this process computes something else, seen at step 4: .*{said}"
    with pytest.raises(TrainError, match=pattern):
        finetune.train(loaded, listener=After(3, lambda: put_in(monkeypatch)))
    run = RunFolder(tmp_path / "run")
    assert [path.name for path in points.checkpoints(run.checkpoints)] == ["step-000002"]
    monkeypatch.undo()
    finetune.train(loaded, resume=True)
    assert (run.path / "adapter/adapter_model.safetensors").read_bytes() == whole


def test_a_flipped_bit_of_the_base_is_seen(tmp_path: Path, monkeypatch: Patch) -> None:
    models: list[Any] = []
    real = finetune.run_steps

    def run_steps(setup: Any, *rest: Any) -> Any:
        models.append(setup.model.assembled.model)
        return real(setup, *rest)

    def flip() -> None:
        layer = next(m for m in models[0].modules() if formats.is_quantised(m))
        layer.weight.data.view(torch.uint8).view(-1)[100] ^= 0x80

    monkeypatch.setattr(finetune, "run_steps", run_steps)
    with pytest.raises(TrainError, match="computes something else, seen at step 4: logits of packed rows by"):
        finetune.train(tiny_run.recipe(tmp_path, **SAVED, quant__placement="resident"), listener=After(3, flip))


@pytest.mark.parametrize(
    "more",
    [
        {"quant__compute_dtype": "bf16", "train__gradient_checkpointing": True},
        {"quant__type": "int8"},
        {"lora__modules_to_save": ["lm_head", "norm"], "quant__type": "none"},
        {"lora__trainable_token_indices": [5, 9], "lora__use_dora": True},
    ],
)
def test_asking_changes_nothing_and_a_healthy_run_says_the_same_to_the_bit(
    more: dict[str, Any], tmp_path: Path, monkeypatch: Patch
) -> None:
    from halfbyte.training.watch import Witness

    bits: list[bool] = []
    real = Witness.changes

    def changes(self: Witness) -> list[str]:
        now = self._compute()
        bits.append(all(torch.equal(now[name], was) for name, was in self.seen.items()))
        return real(self)

    monkeypatch.setattr(Witness, "changes", changes)
    saved = tiny_run.recipe(tmp_path, **SAVED, lora__lora_dropout=0.1, **more)
    finetune.train(saved)
    assert bits == [True] * 3
    unsaved = tiny_run.recipe(tmp_path, **{**SAVED, "train__save_strategy": "no"}, lora__lora_dropout=0.1, **more,
                              output=tmp_path / "unsaved")  # fmt: skip
    monkeypatch.setattr(Witness, "begin", lambda self: None)
    finetune.train(unsaved)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "unsaved" / name).read_bytes()
    assert json.loads((tmp_path / "run" / "report.json").read_text())["spikes"] == []
