"""Matrices rounded anew: codes lie where ggml reads them, a step is the definition's, and outputs come nearer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM

from halfbyte import finetune
from halfbyte.data.encoding.examples import Example
from halfbyte.errors import DataError, ExportError, RecipeError
from halfbyte.export import folder as writing
from halfbyte.export import repair
from halfbyte.export.export import to_gguf
from halfbyte.export.job import ExportJob
from halfbyte.export.witness import training_rows
from halfbyte.models.gguf.blocks import BLOCKS
from halfbyte.models.gguf.header import read_header
from halfbyte.proofs import programs
from tests import tiny_run
from tests.export import runs, test_gguf

pytestmark = pytest.mark.skipif(not programs.has_llama(), reason="ggml's quantiser comes with halfbyte[gguf]")


def correlated(columns: int, tokens: int = 600, seed: int = 0) -> torch.Tensor:
    """Inputs (tokens, columns), some of them much larger than others, which go together."""
    draw = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, columns // 4, generator=draw) @ torch.randn(columns // 4, columns, generator=draw)
    sizes = torch.exp(torch.randn(columns, generator=draw))
    return (few / columns**0.5 + 0.1 * torch.randn(tokens, columns, generator=draw)) * sizes


@pytest.mark.parametrize("kind", sorted(repair.LARGEST))
def test_codes_are_written_where_ggml_reads_them(kind: str) -> None:
    """Codes read off the values of ggml's own blocks and written again give the same values; so do others."""
    size, draw = BLOCKS[kind][1], np.random.default_rng(1)
    blocks = repair.nearest(draw.normal(size=(7, size)).astype(np.float32), kind, np.ones(size, np.float32))
    values = repair.values_of(blocks, kind)
    low, step = (each.numpy() for each in repair._levels(blocks.copy(), kind))
    codes = np.rint((values - low) / step)
    assert codes.min() >= 0 and codes.max() <= repair.LARGEST[kind] and len(np.unique(codes)) > 10
    again = blocks.copy()
    repair.put_codes(again, kind, draw.integers(0, repair.LARGEST[kind] + 1, (7, size)).astype(np.uint8))
    assert not np.array_equal(again, blocks)
    repair.put_codes(again, kind, codes.astype(np.uint8))
    assert np.array_equal(again, blocks)


def by_definition(weight: torch.Tensor, moments: torch.Tensor, kind: str) -> torch.Tensor:
    """Optimal brain surgeon, column by column: the inverse of what is left is made anew for each (fp64)."""
    size, left = BLOCKS[kind][1], weight.double().clone()
    hessian = moments.double() + repair.DAMPING * moments.double().diagonal().mean() * torch.eye(len(moments))
    values = torch.empty_like(left)
    for first in range(0, left.shape[1], size):
        costs = []
        for c in range(first, first + size):
            costs.append(1 / float(torch.linalg.inv(hessian[c:, c:])[0, 0]))
        blocks = repair.nearest(left[:, first : first + size].float().numpy(), kind, np.array(costs, np.float32))
        low, step = (each.double() for each in repair._levels(blocks, kind))
        for c in range(first, first + size):
            inverse, j = torch.linalg.inv(hessian[c:, c:]), c - first
            code = ((left[:, c] - low[:, j]) / step[:, j]).round().clamp(0, repair.LARGEST[kind])
            values[:, c] = low[:, j] + step[:, j] * code
            error = (left[:, c] - values[:, c]) / inverse[0, 0]
            left[:, c:] -= error[:, None] * inverse[0]
    return values.float()


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1"])
def test_each_column_is_made_up_for_as_the_definition_says(kind: str) -> None:
    inputs = correlated(64)
    moments, weight = inputs.T @ inputs, torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    _, values = repair.round_matrix(weight, moments, kind)
    slow = by_definition(weight, moments, kind)
    # a choice between two levels may turn on the last bit of a sum, and changes what follows in its row
    assert sum(torch.allclose(a, b, atol=1e-5) for a, b in zip(values, slow, strict=True)) >= 4


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"])
def test_outputs_come_nearer_than_by_the_nearest_levels(kind: str) -> None:
    inputs = correlated(256)
    moments, weight = inputs.T @ inputs, torch.randn(16, 256, generator=torch.Generator().manual_seed(3))
    blocks, values = repair.round_matrix(weight, moments, kind)
    as_read = torch.from_numpy(dequantize(blocks, gguf.GGMLQuantizationType[kind]))
    assert torch.equal(as_read, values)
    plain = repair.values_of(repair.nearest(weight.numpy(), kind, np.ones(256, np.float32)), kind)
    assert repair.lost(weight, values, moments) < repair.lost(weight, torch.from_numpy(plain), moments)


def written(folder: Path, name: str) -> tuple[Path, Path]:
    """A merged folder of a tiny model, and its GGUF file in Q4_0."""
    _, merged = test_gguf.build(folder, name)
    (folder / "merged").mkdir()
    writing.write(merged, folder / "merged")
    return folder / "merged", test_gguf.write(merged, folder / "m.gguf", "Q4_0")


def example(ids: Sequence[int]) -> Example:
    """A row of which the second half is labelled."""
    half = len(ids) // 2
    return Example(tuple(ids), (-100,) * half + tuple(ids[half:]), "here", tuple(ids[:half]), "")


def apart(one: Any, other: Any, rows: list[list[int]]) -> float:
    """The square of what the logits of two models differ by on rows."""
    with torch.no_grad():
        return sum(float(((one(torch.tensor([r])).logits - other(torch.tensor([r])).logits) ** 2).sum()) for r in rows)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_a_repaired_file_is_nearer_and_laid_out_as_it_was(name: str, tmp_path: Path) -> None:
    """With rotary rows in another order, windows, and fused matrices; the file is read by transformers."""
    merged, path = written(tmp_path, name)
    before, header = path.read_bytes(), read_header(path)
    draw = np.random.default_rng(4)
    rows = [[int(i) for i in draw.integers(5, 300, 40)] for _ in range(12)]
    examples = [example(row) for row in rows]
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)

    def read() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()

    plain = apart(model, read(), rows)
    note = repair.repair(path, merged, examples)
    assert apart(model, read(), rows) < plain and "on 12 rows (480 tokens)" in note
    assert read_header(path).tensors == header.tensors and len(path.read_bytes()) == len(before)
    first = min(tensor.start for tensor in header.tensors)
    assert path.read_bytes()[:first] == before[:first]


def test_a_matrix_that_would_come_out_worse_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged, path = written(tmp_path, "llama")
    before = path.read_bytes()
    right = repair.round_matrix

    def wrong(weight: torch.Tensor, moments: torch.Tensor, kind: str) -> Any:
        return right(weight.flip(0), moments, kind)

    monkeypatch.setattr(repair, "round_matrix", wrong)
    monkeypatch.setattr(repair, "RATE", 0.0)
    assert repair.repair(path, merged, [example(range(5, 60))]).startswith(
        "0 of 14 matrices were rounded anew and 5 norms tuned"
    )
    assert path.read_bytes() == before


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged, path = written(tmp_path, "llama")
    monkeypatch.setattr(repair.device, "ram_available", lambda: 1000)
    with pytest.raises(ExportError, match="holds the merged model in memory"):
        repair.repair(path, merged, [example([5, 6, 7])])


def test_an_export_is_repaired_on_the_runs_rows(tmp_path: Path) -> None:
    finetune.train(tiny_run.recipe(tmp_path, quant__type="none", train__max_steps=1))
    job = ExportJob(tmp_path / "run", tmp_path / "out", prove=False)
    result = to_gguf(job, "Q4_0", repair=True)
    assert result.base == "16bit, repaired"
    assert any("rounded anew and 5 norms tuned, on 16 rows" in note for note in result.notes)
    assert {path.name for path in result.path.iterdir()} == {"model-Q4_0.gguf", "export.json", "README.md"}
    with pytest.raises(RecipeError, match="rounds too little"):
        to_gguf(job, "F16", repair=True)


def test_without_training_rows_there_is_nothing_to_repair_on(tmp_path: Path) -> None:
    target = runs.make(tmp_path, "plain", quant__type="none")
    recipe = target.recipe.model_copy(update={"data": target.recipe.data.model_copy(update={"train": None})})
    with pytest.raises(DataError, match="names no training rows"):
        training_rows(replace(target, recipe=recipe), tiny_run.tokenizer(), 100)
    rows = training_rows(target, tiny_run.tokenizer(), 100)
    assert 1 < len(rows) < 16 and sum(len(row.input_ids) for row in rows) <= 100
    assert len(training_rows(target, tiny_run.tokenizer(), 1)) == 1


def test_norms_learn_the_runs_logits_from_a_file_whose_norms_are_off(tmp_path: Path) -> None:
    """A fault that rounding cannot mend: the divergence falls, by the definition over the whole vocabulary."""
    merged, path = written(tmp_path, "llama")
    rows = [example([5 + (7 * i * k) % 290 for i in range(40)]) for k in range(1, 37)]
    right = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    wrong = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    wanted = [repair._Wanted.of(right, row) for row in rows]
    wrong.model.norm.weight.data *= 1.05

    def divergence() -> float:
        total = 0.0
        for row in rows:
            with torch.no_grad():
                logits = [m(torch.tensor([row.input_ids])).logits[0, 19:-1].double() for m in (right, wrong)]
            p, q = (each.log_softmax(-1) for each in logits)
            total += float((p.exp() * (p - q)).sum())
        return total

    before = divergence()
    with torch.no_grad():
        summed = sum(float(each.divergence(wrong)) for each in wanted)
    assert 0 < summed <= before * (1 + 1e-3), "others as one can only say less"
    file = repair._File.of(path, wrong)
    file.put("model.norm.weight", wrong.model.norm.weight)
    assert repair._tune(file, wrong, wanted) == 5 and divergence() < before
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert torch.equal(read.model.norm.weight, wrong.model.norm.weight)
