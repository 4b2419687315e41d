"""A store opens as what quantising at load gives, bit for bit, on every architecture, also in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from halfbyte.base.store import shelf, supply
from halfbyte.errors import BaseModelError
from halfbyte.models import tensors as shapes
from halfbyte.models.sources.safetensors import read_header
from halfbyte.quant import formats
from tests import tiny
from tests.base.store.helpers import checkpoint, differing, logits, opened, wanted

CHOICES = [("nf4", True, torch.float16, "bf16"), ("fp4", False, torch.bfloat16, "fp32")]


@pytest.mark.parametrize(("kind", "double", "dtype", "compute"), CHOICES)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_store_is_what_quantising_at_load_gives(
    name: str, kind: str, double: bool, dtype: torch.dtype, compute: str, tmp_path: Path
) -> None:
    tiny.save(tmp_path, name, dtype)
    settings = {"type": kind, "double_quant": double, "compute_dtype": compute}
    stored, loaded = opened(tmp_path, **settings), opened(tmp_path, use_store=False, **settings)
    assert stored.origin.startswith("store ")
    assert differing(stored.model, loaded.model) == []
    assert stored.resident_bytes == loaded.resident_bytes
    assert torch.equal(logits(stored.model), logits(loaded.model))


@pytest.mark.parametrize("name", [n for n in tiny.ARCHITECTURES if n != "falcon"])
def test_plain_transformers_opens_the_store(name: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, name, torch.bfloat16)
    ours = opened(tmp_path, compute_dtype="bf16")
    folder = ours.origin.removeprefix("store ")
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert next(plain.parameters()).dtype == torch.bfloat16
    assert differing(plain, ours.model) == []
    formats.settle(plain)  # its own eval forward repacks and rounds the scales to bf16
    assert torch.equal(logits(plain), logits(ours.model))


def test_plain_transformers_refuses_the_store_of_falcon(tmp_path: Path) -> None:
    """It does not put Falcon's own linears into 4 bits: better an error than random numbers under a warning."""
    tiny.save(tmp_path, "falcon", torch.bfloat16)
    folder = opened(tmp_path, compute_dtype="bf16").origin.removeprefix("store ")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    again = opened(Path(folder), compute_dtype="bf16")  # as a model of its own
    assert differing(again.model, opened(tmp_path, use_store=False, compute_dtype="bf16").model) == []
    assert again.model.config.quantization_config.quant_method == "bitsandbytes"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"skip_modules": ("down_proj",)}),
        ("gpt2", {"skip_modules": ("mlp.c_proj",)}),
        ("llama", {"skip_modules": ("q_proj", "layers.1")}),
        ("llama", {"fp32_modules": ("norm", "o_proj")}),
        ("gemma3", {"fp32_modules": ("lm_head",)}),
        ("falcon", {"skip_modules": ("dense_4h_to_h",), "fp32_modules": ("h.0.mlp",)}),
    ],
)
def test_exemptions_are_the_same_too(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    tiny.save(tmp_path, name, torch.float32)
    settings = {"compute_dtype": "bf16", **settings}
    assert differing(opened(tmp_path, **settings).model, opened(tmp_path, use_store=False, **settings).model) == []


@pytest.mark.parametrize(("name", "tied"), [("llama", True), ("llama", False), ("gpt2", True), ("gpt2", False)])
def test_tied_heads(name: str, tied: bool, tmp_path: Path) -> None:
    tiny.model(name, changes={"tie_word_embeddings": tied}).save_pretrained(tmp_path)
    stored = opened(tmp_path, compute_dtype="bf16")
    head, embedding = stored.model.get_output_embeddings().weight, stored.model.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) is tied
    assert differing(stored.model, opened(tmp_path, use_store=False, compute_dtype="bf16").model) == []


def test_a_checkpoint_of_the_body_alone_and_with_old_buffers(tmp_path: Path) -> None:
    """GPT-2 on the hub: no `transformer.` before the names, no head, and masks that nothing reads any more."""
    tiny.model("gpt2", dtype=torch.float16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    for layer in range(tiny.LAYERS):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stored, loaded = (opened(tmp_path, use_store=use, compute_dtype="bf16") for use in (True, False))
    assert differing(stored.model, loaded.model) == []
    folder = stored.origin.removeprefix("store ")
    names = json.loads((Path(folder) / "model.safetensors.index.json").read_text())["weight_map"]
    assert "h.0.attn.c_attn.weight.absmax" in names and "h.0.attn.bias" not in names
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert differing(plain, loaded.model) == []


def test_shards_and_pickles(tmp_path: Path) -> None:
    model = tiny.model("llama", dtype=torch.bfloat16, changes={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    model.save_pretrained(tmp_path / "one")
    model.config.save_pretrained(tmp_path / "pickle")
    torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")  # the tied head twice, one storage
    first = opened(tmp_path / "one", compute_dtype="bf16")
    for kind in ("sharded", "pickle"):
        other = opened(tmp_path / kind, compute_dtype="bf16")
        assert other.origin.startswith("store ")
        assert differing(first.model, other.model) == []
    # one content, wherever it lies; the two of the pickle hold the head once more or not
    keys = [b.origin.removeprefix("store ") for b in (first, opened(tmp_path / "sharded", compute_dtype="bf16"))]
    hashes = {supply.verify(Path(key)).content_sha256 for key in keys}
    assert len(set(keys)) == 2 and len(hashes) == 1


def test_a_pickle_that_could_run_code_is_not_read(tmp_path: Path) -> None:
    tiny.model("llama").config.save_pretrained(tmp_path)
    torch.save({"x": torch.nn.Linear(1, 1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="pickled weights hold more than tensors"):
        opened(tmp_path)
    assert not list(shelf.folder().glob("*.partial"))


def test_one_layer_a_file_on_pages_of_its_own(tmp_path: Path) -> None:
    tiny.model("llama", changes={"num_hidden_layers": 3}, vocab_size=4096 * 4).save_pretrained(tmp_path)
    folder = supply.ensure(wanted(tmp_path, compute_dtype="fp32"))
    files = {path.name for path in folder.glob("*.safetensors")}
    layers = {f"model-layer-{i:04d}.safetensors" for i in range(3)}
    large = {"model-model-embed_tokens-weight.safetensors", "model-lm_head-weight.safetensors"}
    assert files == layers | large | {"model-rest.safetensors"}
    for name in files:
        header = read_header(folder / name)
        with (folder / name).open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        assert start % 4096 == 0
        for tensor, entry in header.items():
            begin, end = entry["data_offsets"]
            assert begin % {"F32": 4, "U8": 1}[entry["dtype"]] == 0
            if end - begin >= 1024 and "quant_state" not in tensor:
                assert begin % 64 == 0
            layer = shapes.spec_of(tensor, (1,), "F32", {}).layer
            assert name == f"model-layer-{layer:04d}.safetensors" if layer is not None else name not in layers
        with safe_open(folder / name, "pt") as reader:  # the library checks that there are no holes
            assert set(reader.keys()) == set(header)


def test_opened_weights_are_pages_of_the_files(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama", torch.bfloat16)
    model = opened(tmp_path, compute_dtype="bf16").model
    maps = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            first, last = line.split()[0].split("-")
            maps.append((int(first, 16), int(last, 16)))
    tensors = dict(model.named_parameters())
    tensors |= {f"{name}.absmax": t.quant_state.absmax for name, t in tensors.items() if hasattr(t, "quant_state")}
    away = [name for name, t in tensors.items() if not any(a <= t.data_ptr() < b for a, b in maps)]
    assert away == [] and len(tensors) > 30


def test_what_lies_beside_the_weights_comes_along(tmp_path: Path) -> None:
    from tests import tiny_run

    tiny_run.checkpoint(tmp_path)
    (tmp_path / "optimizer.bin").write_bytes(b"x" * 100)
    folder = supply.ensure(wanted(tmp_path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("red cup")["input_ids"] == tiny_run.tokenizer()("red cup")["input_ids"]
    assert tokenizer.chat_template == tiny_run.CHATML
    assert not (folder / "optimizer.bin").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


def test_an_opened_store_can_be_saved_again(tmp_path: Path) -> None:
    tiny.save(tmp_path / "m", "gpt2", torch.bfloat16)
    first = opened(tmp_path / "m", compute_dtype="bf16")
    first.model.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again", compute_dtype="bf16")
    assert differing(first.model, again.model) == []


@pytest.mark.parametrize("change", ["missing", "shape", "skip", "fp32"])
def test_what_cannot_be_opened_is_said_before_anything_is_built(change: str, tmp_path: Path) -> None:
    quant: dict[str, Any] = {"compute_dtype": "bf16"}
    tiny.save(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    if change == "shape":
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(64, 64)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    quant |= {"skip": {"skip_modules": ("nope",)}, "fp32": {"fp32_modules": ("nope",)}}.get(change, {})
    before = set(shelf.folder().glob("*")) if shelf.folder().is_dir() else set()
    said = {
        "missing": r"lacks 1 of the weights.*layers\.1\.mlp\.up_proj",
        "shape": r"not the shape of 1 .*up_proj.weight is \(64, 64\), not \(128, 64\)",
        "skip": r"skip_modules \['nope'\] name no module",
        "fp32": r"fp32_modules \['nope'\] name no module",
    }[change]
    with pytest.raises(BaseModelError, match=said):
        opened(tmp_path, **quant)
    assert {path for path in shelf.folder().glob("*") if path.name != ".locks"} <= before


def test_experts_that_are_exempted_are_stored_under_the_source_s_names(tmp_path: Path) -> None:
    """transformers merges experts while it loads; exempted they stay in 16 bits, and are merged as ever."""
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, num_experts_per_tok=2, num_local_experts=4,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = {"compute_dtype": "bf16", "skip_modules": ("experts",)}
    stored, loaded = (opened(tmp_path, use_store=use, **settings) for use in (True, False))
    assert stored.origin.startswith("store ") and differing(stored.model, loaded.model) == []


def test_a_checkpoint_with_an_id_of_a_revision_is_another_store(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama")
    from halfbyte.recipe.schema import Quant

    one, two = (
        shelf.key_of(checkpoint(tmp_path, kind="hub", revision=revision), Quant(), "bfloat16") for revision in "ab"
    )
    assert one != two and one.startswith("name-nf4-")
