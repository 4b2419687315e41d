"""A table of per-layer embeddings is a line of its own: in its file wherever the rest lies, and no 4 bits of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from halfbyte.models import tensors
from halfbyte.plan import Job, Rows, base_memory
from halfbyte.quant import policy
from halfbyte.recipe.schema import Recipe
from halfbyte.system import device

VOCAB, HIDDEN, LAYERS, WIDE = 262_144, 2048, 4, 256
CONFIG = {
    "model_type": "gemma4_text", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB,
    "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip
TABLE = "model.language_model.embed_tokens_per_layer.weight"
SHAPES = {
    "model.language_model.embed_tokens.weight": (VOCAB, HIDDEN),
    TABLE: (VOCAB, LAYERS * WIDE),
    **{f"model.language_model.layers.{n}.self_attn.q_proj.weight": (2048, HIDDEN) for n in range(LAYERS)},
}


def job(*, mappable: bool, lengths: tuple[int, ...] = (300,) * 8) -> Job:
    specs = [tensors.spec_of(name, shape, "BF16", CONFIG) for name, shape in SHAPES.items()]
    recipe = Recipe.model_validate({"model": "x", "data": {"train": "x"}, "output": "x"})
    here = replace(device.detect(), kind="cpu")
    return Job.of(recipe, specs, tensors.facts_of(CONFIG, specs), Rows(lengths), here, mappable=mappable)


@pytest.mark.parametrize("placement", ["resident", "mapped", "streamed"])
def test_the_table_is_a_line_of_its_own(placement: str) -> None:
    with_table, whole = job(mappable=True), job(mappable=False)
    nbytes = VOCAB * LAYERS * WIDE * with_table.itemsize
    assert with_table.table_bytes == nbytes == whole.base_bytes - with_table.base_bytes
    lines = {each.name: each for each in base_memory.base_lines(with_table, placement, 1, "private", 1e12)}
    line = lines["per-layer embeddings"]
    assert line.where == "file" and line.bytes < nbytes
    assert lines["base"].bytes <= with_table.base_bytes
    assert "per-layer embeddings" not in {e.name for e in base_memory.base_lines(whole, "resident", 1, "private", 0)}


def test_rows_that_are_read_grow_with_the_data_up_to_the_table() -> None:
    few, many = (job(mappable=True, lengths=(300,) * n) for n in (1, 40_000))
    sizes = [base_memory.base_lines(each, "mapped", 1, "private", 1e12)[-1].bytes for each in (few, many)]
    assert sizes[0] < sizes[1] <= few.table_bytes


def test_it_is_never_quantised() -> None:
    spec = tensors.spec_of(TABLE, SHAPES[TABLE], "BF16", {**CONFIG, "vocab_size": VOCAB + 256})
    assert spec.per_layer and spec.role == "embedding"
    assert policy.encoding(spec, Recipe.model_validate({"model": "x", "data": {"train": "x"}}).quant) == "compute"
