"""Each type of number that the gguf package dequantises, on a tiny Llama: in pieces as in one, and the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM

from halfbyte.models.gguf import convert, reader
from halfbyte.models.gguf.header import READABLE, read_header
from tests.models.gguf import files
from tests.models.gguf.test_architectures import logits, sizes_of

SIZES = {
    "vocab_size": 288, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
# Where a block keeps its float16 scales; whatever the other bytes are, they are valid.
SCALES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,),
    "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "IQ1_M": (), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "NVFP4": (),
}  # fmt: skip


def random_blocks(shape: tuple[int, ...], kind: Type) -> np.ndarray[Any, Any]:
    """Blocks of a type for which the gguf package has no quantiser."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // elements, nbytes), np.uint8)
    for at in SCALES[kind.name]:
        blocks[:, at : at + 2] = rng.uniform(0.001, 0.01, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    if kind.name == "IQ1_M":  # its scale lies in the top nibbles of four words: 0x2xxx is about 0.01
        for word, nibble in zip((48, 50, 52, 54), (0x0, 0x3, 0x1, 0x2), strict=True):
            blocks[:, word + 1] = (blocks[:, word + 1] & 0x0F) | (nibble << 4)
    if kind.name == "NVFP4":
        blocks[:, :4] = rng.integers(0x20, 0x38, (len(blocks), 4))
    return blocks.reshape(*shape[:-1], shape[-1] // elements * nbytes)


def test_every_type_that_the_gguf_package_reads_is_known() -> None:
    for kind in Type:
        _, nbytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except NotImplementedError:
            assert kind.name not in READABLE
        else:
            assert kind.name in READABLE


@pytest.mark.parametrize("name", sorted(READABLE))
def test_a_type_is_read_as_the_gguf_package_reads_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = Type[name]
    monkeypatch.setattr(convert, "say", lambda stage: None)
    monkeypatch.setattr(reader, "PIECE_ELEMENTS", 256 * 7)  # no tensor is a whole number of pieces
    monkeypatch.setattr(
        gguf.quants, "quantize", lambda value, kind, own=gguf.quants.quantize: _quantise(own, value, kind)
    )
    model = files.model_of("llama", **SIZES)
    reference = files.write(tmp_path / "m.gguf", "llama", model, sizes_of(model.config), kind)
    assert read_header(tmp_path / "m.gguf").quantised_as == name
    (tmp_path / "out").mkdir()
    convert.convert(tmp_path / "m.gguf", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(found), logits(reference))


def _quantise(own: Any, value: np.ndarray[Any, Any], kind: Type) -> np.ndarray[Any, Any]:
    try:
        data: np.ndarray[Any, Any] = own(value, kind)
    except NotImplementedError:
        data = random_blocks(value.shape, kind)
    return data
