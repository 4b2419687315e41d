"""Where the numbers of a module come from: files, an index, folders, pickles; renamed, tied and left-over tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTForImageClassification

import halfbyte
from halfbyte.plan import store_build
from tests.base.modules import helpers
from tests.base.modules.helpers import empty, llama_config, made, output, quantised, save

pytestmark = pytest.mark.filterwarnings("ignore:.*stay as they are, being no plain linear layers")


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def wanted() -> nn.Module:
    return halfbyte.quantize_model(made("encoder"))


def test_a_file_an_index_and_a_folder_of_safetensors(wanted: nn.Module, tmp_path: Path) -> None:
    one, several = save(made("encoder"), tmp_path / "one"), save(made("encoder"), tmp_path / "several", files=3)
    assert len(list(several.glob("*.safetensors"))) == 3
    for named in (one, one / "model.safetensors", several, several / "model.safetensors.index.json"):
        assert same(halfbyte.quantize_model(empty("encoder"), named), wanted)
        assert same(halfbyte.quantize_model(empty("encoder"), str(named)), wanted)


def test_pickles_are_read_with_weights_only(wanted: nn.Module, tmp_path: Path) -> None:
    state = made("encoder").state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    for named in (tmp_path, tmp_path / "pytorch_model.bin"):
        assert same(halfbyte.quantize_model(empty("encoder"), named), wanted)
    folder = tmp_path / "several"
    folder.mkdir()
    names = list(state)
    where = {name: f"part-{n % 2}.bin" for n, name in enumerate(names)}
    for file in ("part-0.bin", "part-1.bin"):
        torch.save({n: state[n] for n in names if where[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    for named in (folder, folder / "pytorch_model.bin.index.json"):
        assert same(halfbyte.quantize_model(empty("encoder"), named), wanted)


def test_safetensors_go_before_pickles(wanted: nn.Module, tmp_path: Path) -> None:
    save(made("encoder"), tmp_path)
    torch.save(made("encoder", seed=5).state_dict(), tmp_path / "pytorch_model.bin")
    assert same(halfbyte.quantize_model(empty("encoder"), tmp_path), wanted)


def test_weights_of_a_loaded_module_are_replaced(wanted: nn.Module, tmp_path: Path) -> None:
    save(made("encoder"), tmp_path)
    assert same(halfbyte.quantize_model(made("encoder", seed=5), tmp_path), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_float_dtype_is_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    save(made("encoder").to(dtype), tmp_path)
    held = halfbyte.quantize_model(empty("encoder"), tmp_path, dtype="bf16")
    assert same(held, halfbyte.quantize_model(made("encoder").to(dtype), dtype="bf16"))


def test_a_tensor_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch, wanted: nn.Module, tmp_path: Path) -> None:
    monkeypatch.setattr(store_build, "CHUNK_ELEMENTS", 130)  # no multiple of a block
    save(made("encoder"), tmp_path)
    assert same(halfbyte.quantize_model(empty("encoder"), tmp_path), wanted)
    eight = halfbyte.quantize_model(empty("encoder"), tmp_path, quant="int8")
    assert same(eight, halfbyte.quantize_model(made("encoder"), quant="int8"))


def test_a_tied_tensor_under_its_other_name_or_twice(wanted: nn.Module, tmp_path: Path) -> None:
    save(made("encoder"), tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({**state, "output.weight": state["embedding.weight"].clone()}, file)
    assert same(halfbyte.quantize_model(empty("encoder"), tmp_path), wanted)
    state["output.weight"] = state.pop("embedding.weight")
    save_file(state, file)
    assert same(halfbyte.quantize_model(empty("encoder"), tmp_path), wanted)


def test_names_are_those_that_transformers_saves(tmp_path: Path) -> None:
    """On disk a ViT's tensors have other names than in the module."""
    original: Any = made("vit")
    save(original, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) != set(original.state_dict())
    assert same(halfbyte.quantize_model(empty("vit"), tmp_path), halfbyte.quantize_model(original))


def test_the_body_alone_from_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    original: Any = made("llama")
    save(original.model, tmp_path)
    with torch.device("meta"):
        body = type(original.model)(llama_config())
    assert same(halfbyte.quantize_model(body, tmp_path), halfbyte.quantize_model(original.model))


def test_buffers_that_no_checkpoint_holds_are_computed(tmp_path: Path) -> None:
    """The angles of rotary embeddings, in fp32 also beside bf16."""
    original: Any = made("llama")
    held: Any = halfbyte.quantize_model(empty("llama"), save(original, tmp_path), dtype="bf16")
    angles = held.model.rotary_emb.inv_freq
    assert angles.dtype == torch.float32 and torch.equal(angles, original.model.rotary_emb.inv_freq)
    assert held.model.rotary_emb.original_inv_freq.equal(original.model.rotary_emb.original_inv_freq)


def test_old_buffers_in_a_file_are_passed_over(tmp_path: Path) -> None:
    save(made("llama"), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "model.rotary_emb.inv_freq": torch.zeros(6)}, file, {"format": "pt"})
    held = halfbyte.quantize_model(empty("llama"), tmp_path)
    assert same(held, halfbyte.quantize_model(made("llama")))
    assert output(held, "llama", torch.bfloat16).isfinite().all() and quantised(held)


def test_vit_is_what_transformers_loads(tmp_path: Path) -> None:
    save(made("vit"), tmp_path)
    theirs = ViTForImageClassification.from_pretrained(tmp_path)
    held = halfbyte.quantize_model(empty("vit"), tmp_path, quant="none", dtype="fp32")
    assert same(held, theirs)


@pytest.mark.parametrize("name", ["llama", "whisper", "vit"])
def test_a_transformers_model_under_accelerates_empty_weights(name: str, tmp_path: Path) -> None:
    """Its context makes new parameters at each assignment, so that ties are undone; buffers stay in memory."""
    from accelerate import init_empty_weights

    original: Any = made(name)
    with init_empty_weights():
        module: Any = helpers.MAKE[name]().eval()
    if name == "whisper":
        assert module.proj_out.weight is not module.model.decoder.embed_tokens.weight
    held = halfbyte.quantize_model(module, save(original, tmp_path), dtype="fp32")
    assert same(held, halfbyte.quantize_model(original, dtype="fp32"))
    if name == "whisper":
        assert held.proj_out.weight is held.model.decoder.embed_tokens.weight
    assert torch.equal(output(held, name), output(original, name))
