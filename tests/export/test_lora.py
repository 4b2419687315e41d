"""Adapters for other programs: by llama.cpp beside the merged model where it is installed; by plain PEFT; refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from halfbyte import finetune
from halfbyte.errors import ExportError
from halfbyte.export import gguf, gguf_tokenizer, lora
from halfbyte.export.weights import MergedModel
from halfbyte.inference import target
from halfbyte.inference.target import Target
from halfbyte.proofs import programs
from tests import tiny_run
from tests.export import runs

IDS = list(range(20, 44))
HELD = ["plain", "rslora", "patterns"]
REFUSED = {
    "dora": "DoRA", "Conv1D and biases": "a trained bias", "head and norms saved": "a module trained whole",
    "trained tokens": "trained rows of tokens", "experts": "experts", "embedding": "LoRA on an embedding",
}  # fmt: skip


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        out: np.ndarray = model(torch.tensor([IDS])).logits[0].numpy()
    return out


def adapted(folder: Path) -> np.ndarray:
    """What plain PEFT says with the adapter as it was saved."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return logits(peft.PeftModel.from_pretrained(base, folder / "adapter").eval())


@pytest.mark.parametrize("kind", HELD)
def test_a_gguf_adapter_in_llama_cpp(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed: pip install 'halfbyte[gguf]'")
    found = runs.make(tmp_path, kind, quant__type="none")
    bare = MergedModel(Target(tmp_path, found.recipe), "16bit")
    gguf.write(
        bare, tmp_path / "base.gguf", "F32",
        lambda w: gguf_tokenizer.add(w, tiny_run.tokenizer(), tiny_run.VOCAB, bare.checkpoint, None),
    )  # fmt: skip
    lora.write_gguf(MergedModel(found, "16bit"), tmp_path / "lora.gguf")
    program = programs.LlamaCpp(str(tmp_path / "base.gguf"), str(tmp_path / "lora.gguf"), tokens=64)
    wanted = adapted(tmp_path)
    assert np.abs(program.logits(IDS, range(len(IDS))) - wanted).max() < 1e-2
    base = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32))
    assert np.abs(base - wanted).max() > 0.3


@pytest.mark.parametrize("kind", HELD)
def test_a_gguf_adapter_by_its_definition(kind: str, tmp_path: Path) -> None:
    """alpha / rank x B A of the file, rows as llama.cpp has them, is PEFT's own delta."""
    found = runs.make(tmp_path, kind, quant__type="none")
    lora.write_gguf(MergedModel(found, "16bit"), tmp_path / "lora.gguf")
    read = package.GGUFReader(tmp_path / "lora.gguf")
    alpha = read.fields["adapter.lora.alpha"].contents()
    tensors = {t.name: torch.from_numpy(np.array(t.data)) for t in read.tensors}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    for name, heads in (("q", 4), ("v", None)):
        a, b = (tensors[f"blk.1.attn_{name}.weight.lora_{x}"] for x in "ab")
        delta = alpha / len(a) * b @ a
        layer = model.get_base_model().model.layers[1].self_attn.get_submodule(f"{name}_proj")
        wanted = layer.get_delta_weight("default").detach()
        if heads:  # halves of a head's rows become neighbours
            wanted = wanted.view(heads, 2, -1, wanted.shape[1]).transpose(1, 2).reshape(wanted.shape)
        torch.testing.assert_close(delta, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_an_adapter_of_other_programs_cannot_hold(kind: str, tmp_path: Path) -> None:
    merged = MergedModel(runs.make(tmp_path, kind, quant__type="none"), "16bit")
    for write in (lambda: lora.factors(merged, "llama.cpp"), lambda: lora.write_peft(merged, tmp_path)):
        with pytest.raises(ExportError, match=REFUSED[kind]):
            write()


def test_a_tied_head_has_no_place_beside_its_base(tmp_path: Path) -> None:
    """The base's file has it as its embedding; llama.cpp does not open an adapter for a tensor that is not there."""
    tiny_run.checkpoint(tmp_path / "model", "gpt2")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    runs.adapter(plain, tmp_path / "adapter", {"target_modules": ["c_attn", "lm_head"]})
    recipe = tiny_run.recipe(tmp_path, quant__type="none").recipe
    merged = MergedModel(Target(tmp_path / "adapter", recipe, tmp_path / "adapter"), "16bit")
    with pytest.raises(ExportError, match="LoRA on a head that the base's file has as its embedding") as refused:
        lora.GgufLayers.of(merged)
    assert (refused.value.fix or "").startswith(f"halfbyte merge {tmp_path / 'adapter'}")


@pytest.mark.parametrize("kind", HELD)
def test_a_folder_of_one_rank_and_one_scaling(kind: str, tmp_path: Path) -> None:
    """What vLLM reads of it (r, lora_alpha, use_rslora) is all that its scaling is; plain PEFT says the same."""
    found = runs.make(tmp_path, kind, quant__type="none")
    (tmp_path / "out").mkdir()
    told = lora.write_peft(MergedModel(found, "16bit"), tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and not config["use_rslora"] and not config["rank_pattern"]
    assert not config["alpha_pattern"] and not config["modules_to_save"] and "--max-lora-rank 8" in told[0]
    assert not config["use_dora"] and config["bias"] == "none"
    for name, tensor in load_file(tmp_path / "out/adapter_model.safetensors").items():
        (leaf, factor) = re.findall(r"\Abase_model\.model\..+\.(\w+)\.(lora_[AB])\.weight\Z", name)[0]
        assert leaf in runs.Q_V and tensor.shape[0 if factor == "lora_A" else 1] == config["r"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    again = logits(peft.PeftModel.from_pretrained(base, tmp_path / "out").eval())
    assert np.abs(again - adapted(tmp_path)).max() < 1e-4


def test_a_residual_start_in_twice_the_rank(tmp_path: Path) -> None:
    finetune.train(tiny_run.recipe(tmp_path, lora__init_lora_weights="residual"))
    merged = MergedModel(target.find(tmp_path / "run"), "16bit")
    (tmp_path / "out").mkdir()
    lora.write_peft(merged, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    weights = dict(model.named_parameters())
    with merged:
        for item in merged.items:
            if merged.is_changed(item):
                torch.testing.assert_close(weights[item.parameter], merged.value(item), rtol=1e-4, atol=1e-4)
