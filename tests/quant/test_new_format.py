"""A number format that the package has never seen, of two bits: `two_bits.py` and three lines here, and it is stored,
opened, planned, trained, decoded and merged as the others are."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from halfbyte import finetune
from halfbyte.errors import RecipeError
from halfbyte.export import folder
from halfbyte.export.weights import MergedModel
from halfbyte.inference import target
from halfbyte.inference.generate import generate
from halfbyte.inference.load import open_target
from halfbyte.layers.decoding import linears
from halfbyte.models.sources.safetensors import read_header, weight_files
from halfbyte.quant import bnb, formats
from halfbyte.recipe import number_formats
from halfbyte.recipe.schema import Quant
from halfbyte.writing.sampling import SamplingParams
from tests import tiny, tiny_run
from tests.base.store.helpers import opened
from tests.inference.test_generate import greedy
from tests.quant.two_bits import TWO_BITS, TwoBitLinear, encoded, reference

INFO = number_formats.FormatInfo("two_bits", 2, reads=frozenset(), scales="has blocks of 16", suggested=True)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "QUANTISING", (*formats.QUANTISING, TWO_BITS))
    monkeypatch.setitem(formats.FORMATS, "two_bits", TWO_BITS)
    monkeypatch.setitem(number_formats.FORMATS, "two_bits", INFO)


def layers(model: Any) -> dict[str, TwoBitLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, TwoBitLinear)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_its_store_is_what_quantising_at_load_gives_and_its_reference(name: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, name, torch.float32)
    stored, loaded = (opened(tmp_path, type="two_bits", compute_dtype="fp32", use_store=use) for use in (True, False))
    assert stored.origin.startswith("store ") and layers(stored.model).keys() == layers(loaded.model).keys()
    source = tiny.model(name, dtype=torch.float32)
    assert len(layers(stored.model)) == sum(
        type(m).__name__ in ("Linear", "Conv1D", "FalconLinear") and m is not source.get_output_embeddings()
        for m in source.modules()
    )
    for path, layer in layers(stored.model).items():
        weight = source.get_submodule(path).weight.detach()
        matrix = weight.T.contiguous() if name == "gpt2" else weight
        codes, scales = encoded(matrix.reshape(-1).numpy())
        assert np.array_equal(layer.weight.data.numpy(), codes)
        assert torch.equal(layer.weight.data, layers(loaded.model)[path].weight.data)
        values = TWO_BITS.weight(layer, torch.float32).double().numpy()
        assert np.allclose(values.reshape(-1), reference(codes, scales), rtol=1e-6)


def test_its_bytes_are_planned_and_its_fields_are_its_own(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama", torch.bfloat16)
    base = opened(tmp_path, type="two_bits", compute_dtype="bf16")
    assert base.resident_bytes == base.expected_bytes == bnb.resident_bytes(base.model)
    matrices = [read_header(file) for file in weight_files(base.store)]
    assert sum(".scales" in name for header in matrices for name in header) == len(layers(base.model)) == 14
    assert Quant(type="two_bits").block_size is None and not Quant(type="two_bits").double_quant
    assert [info.name for info in number_formats.smaller("nf4")] == ["two_bits"]
    with pytest.raises(
        RecipeError, match=r"block_size cannot be set with quant\.type two_bits, which has blocks of 16"
    ):
        tiny_run.recipe(tmp_path / "run", quant__type="two_bits", quant__block_size=64)


def test_a_run_trains_is_decoded_and_merged(tmp_path: Path) -> None:
    recipe = tiny_run.recipe(tmp_path, quant__type="two_bits", train__max_steps=4)
    finetune.train(recipe)
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    found = target.find(run)
    opened_run = open_target(found)
    prompt = [3, 40, 50, 60]
    model, tokenizer = opened_run.model, tiny_run.tokenizer()
    assert len(layers(model)) == 14
    wanted = tokenizer.decode(greedy(model, prompt, [], 4), skip_special_tokens=True)
    assert generate(model, tokenizer, [prompt], SamplingParams(4)) == [wanted]
    tape: Any = SimpleNamespace(adapters=None, dtype=torch.float32)
    with pytest.raises(linears.Unsupported, match=r"TwoBitLinear in two_bits, torch\.uint8"):
        linears.Linear(tape, next(iter(layers(model).values())))
    merged_into_two_bits(found, model, tmp_path / "merged")


def merged_into_two_bits(found: target.Target, model: Any, out: Path) -> None:
    """Each weight is that of the format's reference and LoRA's own on top."""
    out.mkdir()
    folder.write(MergedModel(found, "4bit"), out)
    merged = load_file(out / "model.safetensors")
    adapter = load_file(found.path / "adapter" / "adapter_model.safetensors")
    for name, layer in layers(model).items():
        path = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        values = reference(layer.weight.data.numpy(), layer.weight.scales.numpy()).reshape(layer.weight.matrix)
        if name.endswith("base_layer"):
            a, b = (adapter[f"base_model.model.{path}.lora_{x}.weight"].double().numpy() for x in "AB")
            values = values + 2.0 * b @ a
        assert np.allclose(merged[f"{path}.weight"].double().numpy(), values, atol=1e-5)
