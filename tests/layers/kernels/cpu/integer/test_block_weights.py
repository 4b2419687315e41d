"""Weights from a GGUF file's blocks in 8-bit integers, against the gguf package's numbers and matrices in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfbyte.layers import lora_linear
from halfbyte.layers.kernels.cpu.integer import products as integer
from halfbyte.models.gguf.blocks import BLOCKS
from halfbyte.quant import gguf_blocks
from halfbyte.quant.number_format import BlockRows
from tests.layers.decoding.test_block_rows import layer_of
from tests.layers.kernels.cpu.integer.test_rounding import check, filled, whole
from tests.layers.kernels.cpu.integer.test_weights import made

if integer.why_not():
    pytest.skip(integer.why_not(), allow_module_level=True)
from halfbyte.layers.kernels.cpu.integer import block_weights, rounding


@pytest.mark.parametrize("kind", list(BLOCKS))
@pytest.mark.parametrize(("o", "d", "ordered"), [(5, 256, False), (33, 768, True), (16, 1536, False)])
def test_blocks_are_decoded_mixed_and_rounded(kind: str, o: int, d: int, ordered: bool) -> None:
    order = np.random.default_rng(o).permutation(o) if ordered else None
    layer, values = layer_of(kind, o, d, o + d, order=order)
    rows = gguf_blocks.GgufBlocks("gguf").block_rows(layer)
    assert rows is not None and integer.takes(rows, torch.bfloat16)
    weight = torch.from_numpy(values)
    check(*block_weights.rows(rows, share=0.25, out=made(o, d)), weight @ whole(d, far=True).T, 0.25)
    groups = block_weights.groups(rows, share=0.5, out=made(rounding.padded_width(o), d))
    check(*groups, whole(o, far=False) @ filled(weight.T).T, 0.5)


def test_a_training_takes_them_from_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = layer_of("Q4_0", 64, 128)
    weight = lora_linear.integer_weight(layer, torch.bfloat16)
    assert isinstance(weight, BlockRows) and weight.codes.data_ptr() == layer.weight.data_ptr()
    monkeypatch.setattr(gguf_blocks, "_distrusted", {"Q4_0"})
    assert not isinstance(lora_linear.integer_weight(layer, torch.bfloat16), BlockRows)  # in pieces
