"""GGUF files: every named architecture as it is computed from its file, by llama.cpp where it is installed, by
transformers' own reading of such files, and by ours; what the file has no place for is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from halfbyte.errors import ExportError
from halfbyte.export import gguf as writing
from halfbyte.export import gguf_tokenizer
from halfbyte.export import job as exporting
from halfbyte.export.export import to_gguf, to_gguf_lora
from halfbyte.export.job import ExportJob
from halfbyte.export.weights import MergedModel
from halfbyte.inference.target import Target
from halfbyte.models.sources.gguf_file import checkpoint_of
from halfbyte.proofs import programs
from tests import tiny_run
from tests.export import runs

pytestmark = pytest.mark.usefixtures("forked_children")
COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "vocab_size": tiny_run.VOCAB,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEAD = {"head_dim": 16}
WINDOW = {**HEAD, "query_pre_attn_scalar": 16, "sliding_window": 8}
OLD = {"initializer_range": 0.2, "vocab_size": tiny_run.VOCAB, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {  # llama.cpp's contexts are whole multiples of 256 tokens
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512,
    "short_factor": [1 + 0.1 * i for i in range(8)], "long_factor": [2 + 0.3 * i for i in range(8)],
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", COMMON),
    "llama 3": ("llama", {**COMMON, "rope_parameters": LLAMA3, "max_position_embeddings": 16384}),
    "smollm": ("llama", {**COMMON, "tie_word_embeddings": True}),
    "yarn": ("llama", {**COMMON, "rope_parameters": YARN}),
    "mistral": ("mistral", {**COMMON, "sliding_window": None}),
    "qwen2": ("qwen2", COMMON),
    "qwen3": ("qwen3", {**COMMON, **HEAD}),
    "gemma2": ("gemma2", {**COMMON, **WINDOW}),
    "gemma3": ("gemma3_text", {**COMMON, **WINDOW, "num_hidden_layers": 6}),
    "phi3": ("phi3", {**COMMON, "original_max_position_embeddings": 256, "sliding_window": None}),
    "phi3 long": (
        "phi3", {**COMMON, "max_position_embeddings": 2048, "sliding_window": None, "rope_parameters": LONG}
    ),
    "gpt2": ("gpt2", {**OLD, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
    "bloom": ("bloom", {**OLD, "hidden_size": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0}),
    "granite": (
        "granite",
        {**COMMON, "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7,
         "logits_scaling": 2.0},
    ),
    "smollm3": ("smollm3", {**COMMON, **HEAD, "no_rope_layers": [1, 1]}),
}  # fmt: skip
IDS = [int(i) for i in np.random.default_rng(0).integers(5, 300, 24)]


def build(folder: Path, name: str, **changes: Any) -> tuple[Any, MergedModel]:
    """A tiny random model, and its checkpoint as what is to be written."""
    kind, values = CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**values, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder / "model")
    tiny_run.tokenizer().save_pretrained(folder / "model")
    recipe = tiny_run.recipe(folder, quant__type="none").recipe
    return model, MergedModel(Target(folder, recipe), "16bit")


def write(merged: MergedModel, path: Path, kind: str = "F32") -> Path:
    tokenizer = tiny_run.tokenizer()
    writing.write(
        merged,
        path,
        kind,
        lambda w: gguf_tokenizer.add(w, tokenizer, tiny_run.VOCAB, merged.checkpoint, tiny_run.CHATML),
    )
    return path


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        out: np.ndarray = model(torch.tensor([IDS])).logits[0].numpy()
    return out


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed: pip install 'halfbyte[gguf]'")
    model, merged = build(tmp_path, name)
    program = programs.LlamaCpp(str(write(merged, tmp_path / "m.gguf")), tokens=64)
    assert np.abs(program.logits(IDS, range(len(IDS))) - logits(model)).max() < 1e-2  # its table of GELU is in fp16
    for text in (*gguf_tokenizer.PROBES, "<|im_start|>user\nred cup<|im_end|>\n"):
        assert program.tokens(text) == tiny_run.tokenizer()(text)["input_ids"], text


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2"])
def test_a_head_that_is_no_longer_tied_is_in_the_file(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed: pip install 'halfbyte[gguf]'")
    model, merged = build(tmp_path, name, tie_word_embeddings=True)
    tied = logits(model)
    layer = "c_attn" if name == "gpt2" else "q_proj"
    adapter = tmp_path / "adapter"
    runs.adapter(model, adapter, {"target_modules": [layer], "modules_to_save": ["lm_head"]})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    expected = logits(peft.PeftModel.from_pretrained(plain, adapter).eval())
    merged = MergedModel(Target(adapter, merged.run.recipe, adapter), "16bit")
    program = programs.LlamaCpp(str(write(merged, tmp_path / "m.gguf")), tokens=64)
    assert np.abs(program.logits(IDS, range(len(IDS))) - expected).max() < 1e-2 < np.abs(tied - expected).max()


@pytest.mark.parametrize("name", sorted(writing.READ_WHOLE))
def test_llama_cpp_reads_past_a_window(name: str, tmp_path: Path) -> None:
    """Of a model with a window of 8 it says of 24 tokens what the model says without one, which the export tells."""
    pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed: pip install 'halfbyte[gguf]'")
    narrow, merged = build(tmp_path, name, sliding_window=8)
    whole, _ = build(tmp_path / "whole", name)
    seen = programs.LlamaCpp(str(write(merged, tmp_path / "m.gguf")), tokens=64).logits(IDS, range(len(IDS)))
    assert np.abs(seen - logits(whole)).max() < 1e-2 < 1.0 < np.abs(seen - logits(narrow)).max()


@pytest.mark.parametrize("name", sorted(writing.READ_WHOLE))
def test_a_run_is_asked_within_a_window_that_llama_cpp_does_not_read(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed: pip install 'halfbyte[gguf]'")
    model, _ = build(tmp_path, name, sliding_window=8, initializer_range=0.05)
    layer = {"mistral": "q_proj", "phi3": "qkv_proj"}[name]
    job = adapted(tmp_path, model, layer)
    written = to_gguf(job, "F16")
    assert written.proven is not None and written.proven.answers == 4
    assert sum("no notice of this model's window of 8" in note for note in written.notes) == 1


def adapted(folder: Path, model: Any, layer: str) -> ExportJob:
    """What is asked of an export of an adapter of `model`, a checkpoint in `folder`."""
    runs.adapter(model, folder / "adapter", {"target_modules": [layer]})
    config = folder / "adapter/adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": str(folder / "model")}
    config.write_text(json.dumps(values))
    data = tiny_run.rows(folder / "train.jsonl")
    return ExportJob(folder / "adapter", folder / "out", ("quant.type=none",), data=data, prompts=4)


@pytest.mark.parametrize("export", [lambda job: to_gguf(job, "Q8_0"), to_gguf_lora])
def test_what_it_has_no_place_for_is_told_before_the_run_is_asked(
    export: Callable[[ExportJob], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = build(tmp_path, "llama", hidden_act="gelu")
    job = adapted(tmp_path, model, "q_proj")
    monkeypatch.setattr(exporting, "ask_run", lambda questions: pytest.fail("the run was asked"))
    monkeypatch.setattr(MergedModel, "value", lambda merged, item: pytest.fail("a weight was read"))
    monkeypatch.setattr(programs, "has_llama", lambda: True)
    with pytest.raises(ExportError, match=r"hidden_act: 'gelu', read back 'silu'\.\n.*halfbyte merge "):
        export(job)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"granite", "smollm3", "qwen3"}))  # not read, or not whole
def test_transformers_reads_the_same(name: str, tmp_path: Path) -> None:
    model, merged = build(tmp_path, name)
    write(merged, tmp_path / "m.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    own, theirs = dict(model.named_parameters()), dict(read.named_parameters())
    assert own.keys() == theirs.keys()
    for key, value in own.items():
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", ["granite", "smollm3", "qwen3", "bloom"])
def test_ours_reads_the_same(name: str, tmp_path: Path) -> None:
    model, merged = build(tmp_path, name)
    again = AutoModelForCausalLM.from_pretrained(checkpoint_of(write(merged, tmp_path / "m.gguf"))).float()
    assert np.abs(logits(again) - logits(model)).max() < 0.5  # it is read into bf16
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).float()
    other = AutoModelForCausalLM.from_pretrained(checkpoint_of(tmp_path / "m.gguf")).float()
    for (key, a), b in zip(again.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=2**-8, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_formats_by_the_gguf_packages_own_reader(kind: str, tmp_path: Path) -> None:
    model, merged = build(tmp_path, "qwen2")
    tensors = {t.name: t for t in gguf.GGUFReader(write(merged, tmp_path / "m.gguf", kind)).tensors}
    weight = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    tensor = tensors["blk.1.ffn_down.weight"]
    assert tensor.tensor_type.name == kind
    read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    blocks = np.abs(weight.reshape(-1, 32)).max(1, keepdims=True).repeat(32, 1).reshape(weight.shape)
    # Q8_0: half a step of 127 in a block, and the scale rounded to 16 bits: 1/254 + 2^-11 = 1/226 of its largest
    step = {"F16": 2**-11 * np.abs(weight), "BF16": 2**-8 * np.abs(weight), "Q8_0": blocks / 225, "Q4_0": blocks / 7}
    assert (np.abs(read - weight) <= step[kind] + 1e-7).all()
    assert tensors["blk.1.attn_norm.weight"].tensor_type.name == "F32"


def test_the_adapter_is_in_it(tmp_path: Path) -> None:
    found = runs.make(tmp_path, "rslora", quant__type="none")
    path = write(MergedModel(found, "16bit"), tmp_path / "m.gguf")
    (tmp_path / "out").mkdir()
    from halfbyte.export import folder

    folder.write(MergedModel(found, "16bit"), tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert np.abs(logits(read) - logits(wanted)).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gemma3", {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gemma2", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        *[
            ("qwen3", {"rope_parameters": {**YARN, **more}}, "rope_parameters")
            for more in (
                {"attention_factor": 0.7},
                {"beta_fast": 16.0, "beta_slow": 2.0},
                {"truncate": False},
                {"mscale": 1.0, "mscale_all_dim": 0.5},
            )
        ],
    ],
)
def test_what_the_file_has_no_place_for(name: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    _, merged = build(tmp_path, name, **changes)
    with pytest.raises(ExportError, match=said):
        write(merged, tmp_path / "m.gguf")


def test_an_architecture_that_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"opt is not written.*\n.*own converter"):
        writing.architecture_of(AutoConfig.for_model("opt"))
