"""A run of a model with recurrent layers is the same wherever its base lies, with or without recomputation, and on
several processes: as one of a Llama is. (`tests.destruction.kills` kills such runs.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from halfbyte.layers import loss
from halfbyte.runs.folder import RunFolder
from halfbyte.system import pages
from tests import small_models, tiny_run
from tests.distributed import together
from tests.distributed.test_data_parallel import same, train

# Adam divides by a gradient's size: an epsilon far above its rounding keeps what is zero but for that from moving.
LONG = {
    "train__max_steps": 6, "train__adam_epsilon": 1e-4, "lora__lora_dropout": 0.2,
    "train__max_tokens_per_micro_batch": 40,
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "recomputed": {"train__gradient_checkpointing": True},
    "streamed": {"quant__placement": "streamed"},
    "streamed and recomputed": {"quant__placement": "streamed", "train__gradient_checkpointing": True},
}
KINDS = [
    kind if kind == "qwen3_5_text" else pytest.param(kind, marks=pytest.mark.slow) for kind in small_models.HYBRIDS
]


def trained(folder: Path, name: str, size: int = 1, **values: Any) -> RunFolder:
    loaded = tiny_run.recipe(folder, **(LONG | values), output=folder / name)
    assert loaded.path is not None
    assert (together.run(size, train, loaded.path) if size > 1 else [train(loaded.path)]) == [6] * size
    return RunFolder(folder / name)


@pytest.fixture(scope="module", params=KINDS)
def plain(request: Any, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with its base in memory and nothing recomputed."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_run.hybrid(folder / "model", request.param)
    return trained(folder, "plain")


@pytest.mark.skipif(not pages.supported(), reason="needs Linux and /proc/self/pagemap")
@pytest.mark.parametrize("way", [pytest.param(w, marks=[pytest.mark.slow] * (" and " not in w)) for w in WAYS])
def test_it_is_the_same_to_the_bit_wherever_the_base_lies_and_with_recomputation(
    plain: RunFolder, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = trained(plain.path.parent, way, **WAYS[way])
    same(plain, other)
    if "recomputed" in way:  # its last layer makes all rows, not those that are read: its sums have other parts
        monkeypatch.setattr(loss, "_last_layer", lambda module: None)
        plain = trained(plain.path.parent, f"plain beside {way}")
    a, b = (load_file(run.adapter / "adapter_model.safetensors") for run in (plain, other))
    assert all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_are_one(plain: RunFolder, size: int) -> None:
    same(plain, trained(plain.path.parent, f"of {size}", size))
