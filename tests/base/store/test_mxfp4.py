"""Experts that a checkpoint has in MXFP4, against numbers written down from the standard's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from halfbyte.errors import BaseModelError
from halfbyte.inference import quality
from halfbyte.models import describe, tensors
from tests import small_models
from tests.base.store.helpers import differing, opened

# Microscaling Formats 1.0, table 5: E2M1 by its code
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def checkpoints(folder: Path) -> tuple[Path, Path]:
    """gpt-oss with experts in MXFP4, and with the same experts in bf16."""
    model = small_models.build("gpt_oss").bfloat16()
    plain = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    packed: dict[str, torch.Tensor] = {}
    generator = np.random.default_rng(0)
    for name, tensor in list(plain.items()):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name] = tensor
            continue
        count, inputs, outputs = tensor.shape
        blocks = generator.integers(0, 256, (count, outputs, inputs // 32, 16), dtype=np.uint8)
        scales = generator.integers(120, 127, (count, outputs, inputs // 32), dtype=np.uint8)
        codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(count, outputs, inputs // 32, 32)
        values = E2M1[codes] * 2.0 ** (scales.astype(np.float64)[..., None] - 127)
        plain[name] = torch.from_numpy(values.reshape(count, outputs, inputs).swapaxes(1, 2).copy()).bfloat16()
        packed |= {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}
    for where, content, method in (("mx", packed, "mxfp4"), ("plain", plain, None)):
        model.config.save_pretrained(folder / where)
        save_file(content, folder / where / "model.safetensors", {"format": "pt"})
        if method is not None:
            path = folder / where / "config.json"
            path.write_text(
                json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": method}})
            )
    return folder / "mx", folder / "plain"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_mxfp4_gives_the_store_of_the_weights_that_it_stands_for(kind: str, tmp_path: Path) -> None:
    mx, plain = checkpoints(tmp_path)
    ours, wanted = (opened(each, type=kind, compute_dtype="bf16") for each in (mx, plain))
    assert ours.origin.startswith("store ") and differing(ours.model, wanted.model) == []
    assert ours.expected_bytes == wanted.expected_bytes == ours.resident_bytes


def test_what_is_lost_of_mxfp4_is_what_is_lost_of_the_weights_that_it_stands_for(tmp_path: Path) -> None:
    found = []
    for folder in checkpoints(tmp_path):
        base = opened(folder, compute_dtype="bf16")
        assert base.store_spec is not None and base.store is not None
        found.append(quality.errors_of(base.store_spec, base.store))
    assert found[0] == found[1]
    assert any(".experts." in name and error.relative > 0.01 for name, error in found[0].items())


def test_a_plan_reads_the_shapes_of_mxfp4_off_its_blocks(tmp_path: Path) -> None:
    mx, plain = checkpoints(tmp_path)
    ours, wanted = ({s.name: (s.shape, s.role) for s in tensors.read_checkpoint(each)} for each in (mx, plain))
    assert ours == wanted
    assert describe.describe(str(mx)).parameters == describe.describe(str(plain)).parameters


def test_blocks_without_scales_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    mx, _ = checkpoints(tmp_path)
    content: dict[str, Any] = load_file(mx / "model.safetensors")
    del content["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(content, mx / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"layers\.1\.mlp\.experts\.down_proj_blocks .* is MXFP4, and there is no"):
        opened(mx)


def test_without_a_store_mxfp4_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="has its experts in MXFP4"):
        opened(checkpoints(tmp_path)[0], use_store=False)
