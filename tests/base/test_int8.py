"""A base in LLM.int8's 8 bits: stored, opened by us and by plain transformers, placed, and as large as planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import halfbyte
from halfbyte.base import stream
from halfbyte.layers import fuse
from halfbyte.models.sources.safetensors import read_header, weight_files
from halfbyte.proofs.closeness import row_distances
from halfbyte.quant import formats, int8
from halfbyte.quant.bnb import state_tensors
from halfbyte.system import pages
from tests import tiny
from tests.base.store.helpers import differing, logits, opened

INT8: dict[str, Any] = {"type": "int8", "compute_dtype": "bf16"}


def scales(model: Any) -> list[torch.Tensor]:
    return [getattr(*each) for each in state_tensors(model)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_store_is_what_quantising_at_load_gives(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny.save(tmp_path, name, dtype)
    stored, loaded = opened(tmp_path, **INT8), opened(tmp_path, use_store=False, **INT8)
    assert stored.origin.startswith("store ")
    assert differing(stored.model, loaded.model) == []
    ours, theirs = scales(stored.model), scales(loaded.model)
    assert len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))
    assert stored.resident_bytes == stored.expected_bytes == loaded.resident_bytes
    assert torch.equal(logits(stored.model), logits(loaded.model))


@pytest.mark.parametrize("name", [n for n in tiny.ARCHITECTURES if n != "falcon"])
def test_plain_transformers_opens_the_store_and_says_the_same(name: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, name, torch.bfloat16)
    ours = opened(tmp_path, **INT8)
    folder = ours.origin.removeprefix("store ")
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(plain) is type(ours.model) and plain.is_loaded_in_8bit
    assert any(type(m) is bnb.nn.Linear8bitLt for m in plain.modules())
    # upstream evaluates through another path; with our threshold it multiplies every column in 16 bits
    assert torch.equal(logits(plain), logits(ours.model))
    assert torch.equal(logits(plain.train()), logits(ours.model))


def test_the_threshold_is_what_plain_transformers_and_we_compute_with(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama", torch.bfloat16)
    none, some = opened(tmp_path, **INT8), opened(tmp_path, llm_int8_threshold=1.0, **INT8)
    assert none.origin != some.origin
    plain = AutoModelForCausalLM.from_pretrained(some.origin.removeprefix("store "))
    assert plain.config.quantization_config.llm_int8_threshold == 1.0
    exact, rounded, theirs = logits(none.model), logits(some.model), logits(plain)
    assert not torch.equal(exact, rounded)
    # roundings of both are of one size; only columns of outliers differ
    assert 0.2 < float((rounded - exact).norm() / (theirs - exact).norm()) < 5
    assert torch.equal(logits(some.model.train()), rounded)


@pytest.mark.parametrize("placement", ["resident", "mapped", "streamed"])
def test_every_placement_computes_the_same(placement: str, tmp_path: Path) -> None:
    if placement == "streamed" and not pages.supported():
        pytest.skip("needs Linux and /proc/self/pagemap")
    tiny.save(tmp_path, "llama", torch.bfloat16)
    base = opened(tmp_path, **INT8)
    wanted, model = logits(base.model), base.model
    assert stream.is_mapped(model)
    placed = stream.place(model, placement)
    assert torch.equal(logits(model), wanted)
    assert placed.total_bytes >= base.resident_bytes
    matrices = sum(t.nbytes for t in scales(model)) + sum(
        m.weight.nbytes for m in model.modules() if formats.is_quantised(m)
    )
    assert (placed.mapped_bytes >= matrices) is (placement != "resident")
    placed.remove()


def test_bytes_of_the_file_are_those_in_memory(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama", torch.bfloat16)
    base = opened(tmp_path, **INT8)
    headers = [read_header(file) for file in weight_files(Path(base.origin.removeprefix("store ")))]
    spans = [(name, entry["data_offsets"]) for header in headers for name, entry in header.items()]
    on_disk = sum(end - start for name, (start, end) in spans if not name.endswith(".weight_format"))
    assert on_disk == base.resident_bytes


def test_load_base_in_8_bits(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model", "llama", torch.float16)
    model = halfbyte.load_base(str(tmp_path / "model"), load_in_8bit=True, dtype="fp32")
    layers = [m for m in model.modules() if formats.is_quantised(m)]
    assert len(layers) == 14 and {formats.of_module(m).name for m in layers} == {"int8"}
    assert {m.state.threshold for m in layers} == {int8.EVERY_COLUMN}
    asked = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.0, llm_int8_skip_modules=["down_proj"])
    other = halfbyte.load_base(str(tmp_path / "model"), quantization_config=asked, dtype="fp32")
    layers = [m for m in other.modules() if formats.is_quantised(m)]
    assert len(layers) == 12 and {m.state.threshold for m in layers} == {3.0}


def test_a_checkpoint_in_8_bits_opens_as_it_is_and_is_saved_again(tmp_path: Path) -> None:
    """One that plain transformers has made, and one that we have saved."""
    tiny.save(tmp_path / "plain", "llama", torch.bfloat16)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=int8.EVERY_COLUMN)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16, quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    first = opened(tmp_path / "theirs", **INT8)
    first.model.save_pretrained(tmp_path / "ours")
    second = opened(tmp_path / "ours", **INT8)
    wanted = logits(opened(tmp_path / "plain", **INT8).model)
    assert all(torch.equal(logits(each.model), wanted) for each in (first, second))


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["fused", "DoRA"])
def test_an_adapter_is_evaluated_as_it_is_trained_and_gradients_outlast_an_eval(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """In fp32: in training norms are fused too, which rounds elsewhere, and may turn a level of an input in 8 bits, a
    matter of single tokens. What upstream does in evaluation alone would move all of them by a hundredth."""
    tiny.save(tmp_path, "llama", torch.float32)
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **config
    )
    model = halfbyte.get_peft_model(
        opened(tmp_path, llm_int8_threshold=4.0, **INT8 | {"compute_dtype": "fp32"}).model, lora
    )
    fuse.install(model)
    ids = torch.arange(3, 23)[None]

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    assert float(row_distances(logits(model.train()), logits(model.eval())).median()) < 1e-5
    with model.disable_adapter():
        assert float(row_distances(logits(model.train()), logits(model.eval())).median()) < 1e-5
    after = gradients()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert all(bool(g.any()) for g in after.values())


def test_merging_leaves_layers_of_ours(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama", torch.bfloat16)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = halfbyte.get_peft_model(opened(tmp_path, **INT8).model, lora)
    with model.disable_adapter():
        bare = logits(model.eval())
    adapted = logits(model)
    merged = model.merge_and_unload()
    assert sum(formats.is_quantised(m) for m in merged.modules()) == 14
    got = logits(merged.eval())
    assert torch.equal(got, logits(merged.train()))
    # merging rounds to 8 bits once more: of the adapter's effect a few percent
    assert float((got - adapted).norm()) < 0.2 * float((adapted - bare).norm())
