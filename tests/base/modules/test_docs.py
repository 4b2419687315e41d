"""The page about any module: its code runs as it stands, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

PAGE = Path(__file__).parents[3] / "docs" / "any_module.md"


@pytest.mark.filterwarnings("ignore:.*stay as they are, being no plain linear layers")
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    definition, main = blocks[0].split('with torch.device("meta")', 1)
    exec(definition, names)
    torch.manual_seed(0)
    original = names["Tagger"]()
    original.embedding.weight.data *= 0.1
    (tmp_path / "weights").mkdir()
    state = {name: t for name, t in original.state_dict().items() if name != "output.weight"}
    save_file(state, tmp_path / "weights" / "model.safetensors")
    exec('with torch.device("meta")' + main, names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert [p.name for p in (tmp_path / "offload").iterdir()] == ["encoder.layers.1.safetensors"]
    assert 0 < names["loss"].item() < 20
    exec(blocks[1], names)
    held = names["model"]
    assert held.encoder.layers[0].linear1.weight.quant_state.quant_type == "nf4"
    assert held.output.weight is held.embedding.weight and held.output.weight.dtype == torch.bfloat16
