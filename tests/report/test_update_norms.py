"""Norms of an adapter's updates, against the product of its matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from halfbyte.report import record
from halfbyte.system import pages, usage
from tests.report import made

PREFIX = "base_model.model.model.layers"


def adapter(folder: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.skipif(not pages.supported(), reason="pages cannot be let go here")
def test_pages_of_an_adapter_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's page is made in the process that trained: the adapter's file came on top of the plan's upper figure."""
    shape, seen = (64, 16384), list[int]()
    names = (f"{PREFIX}.{n}.self_attn.q_proj.lora_{which}.weight" for n in range(16) for which in "AB")
    tensors = {name: torch.zeros(shape if ".lora_A." in name else shape[::-1]) for name in names}
    folder = adapter(tmp_path / "adapter", {"r": 64, "lora_alpha": 64}, tensors)

    def norm(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        _ = float(a.sum() + b.sum())
        seen.append(usage.now().file)
        return 1.0

    monkeypatch.setattr(record, "product_norm", norm)
    assert record.read_norms(folder) is not None
    assert len(seen) == 16 and max(seen) - seen[0] < 3 * 4 * math.prod(shape), "134 MB of a file are read"


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"r": 3, "lora_alpha": 6}, (2.0, 2.0)),
        ({"r": 3, "lora_alpha": 6, "use_rslora": True}, (6 / math.sqrt(3), 6 / math.sqrt(3))),
        ({"r": 3, "lora_alpha": 6, "alpha_pattern": {"v_proj": 30}}, (2.0, 10.0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_norm_is_that_of_the_whole_update(
    tmp_path: Path, config: dict[str, object], scales: tuple[float, float], dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in (0, 1, 10):
        for kind in ("q_proj", "v_proj"):
            name = f"{PREFIX}.{layer}.self_attn.{kind}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(3, 17, generator=draw).to(dtype)
            tensors[f"{name}.lora_B.weight"] = torch.randn(5, 3, generator=draw).to(dtype)
    found = record.read_norms(adapter(tmp_path / "a", config, tensors))
    assert found is not None and (found.layers, found.kinds) == (("0", "1", "10"), ("q_proj", "v_proj"))
    for i, layer in enumerate(found.layers):
        for j, kind in enumerate(found.kinds):
            name = f"{PREFIX}.{layer}.self_attn.{kind}"
            update = scales[j] * tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()
            assert found.norms[i][j] == pytest.approx(float(update.norm()), rel=1e-9)


def test_what_is_no_lora_is_named_and_a_layer_without_a_kind_is_empty(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}.0.mlp.up_proj.lora_A.weight": torch.ones(2, 4),
        f"{PREFIX}.0.mlp.up_proj.lora_B.weight": torch.ones(4, 2),
        f"{PREFIX}.1.mlp.down_proj.lora_A.weight": torch.ones(2, 4),
        f"{PREFIX}.1.mlp.down_proj.lora_B.weight": torch.zeros(4, 2),
        "base_model.model.lm_head.weight": torch.ones(7, 4),
    }
    found = record.read_norms(adapter(tmp_path / "a", {"r": 2, "lora_alpha": 2}, tensors))
    assert found is not None
    assert math.isnan(found.norms[0][found.kinds.index("down_proj")])
    assert found.norms[1][found.kinds.index("down_proj")] == 0
    assert found.others == (("lm_head.weight", "7 x 4"),)
    assert found.largest == ("0", "up_proj", pytest.approx(8.0))  # BA is 4 x 4 of twos


def test_without_an_adapter_there_is_nothing(tmp_path: Path) -> None:
    assert record.read_norms(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"weights", b"\x02" + bytes(7) + b"{}", b"\xff" * 40])
def test_of_torn_weights_a_page_shows_no_norms(content: bytes, tmp_path: Path) -> None:
    run = made.finished(tmp_path / "run", made.metrics(2))
    (run.adapter / "adapter_model.safetensors").write_bytes(content)
    norms = record.read(run.path).update_norms
    assert norms is None or norms.largest is None
