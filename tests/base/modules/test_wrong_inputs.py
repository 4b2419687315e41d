"""What is wrong with a call is told at once, in one sentence with what helps, before anything is read or changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import halfbyte
from halfbyte.base.store import encode
from halfbyte.errors import BaseModelError, HalfbyteError, RecipeError, SourceError
from halfbyte.recipe.schema import Quant
from halfbyte.system import files
from tests.base.modules.helpers import empty, made, quantised, save

pytestmark = pytest.mark.filterwarnings("ignore:.*stay as they are, being no plain linear layers")
ON_DISK = {"": "cpu", "layers": "disk"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(made("encoder"), tmp_path / "weights")


def refused(match: str, kind: type[HalfbyteError] = BaseModelError, **call: Any) -> str:
    """The error's text; the module is as it was, and no tensor of it was read."""
    module = call.pop("module", None) or empty("encoder")
    before = {name: id(p) for name, p in module.named_parameters()}
    with pytest.raises(kind, match=match) as caught:
        halfbyte.quantize_model(module, call.pop("weights", None), **call)
    assert {name: id(p) for name, p in module.named_parameters()} == before and not quantised(module)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode.TensorReader, "chunks", None)


def test_settings_that_exclude_each_other(folder: Path) -> None:
    said = refused("quant.block_size cannot be set with quant.type int8", RecipeError, weights=folder,
                   quant={"type": "int8", "block_size": 64})  # fmt: skip
    assert "one scale for each row" in said
    refused("quant.block_size", RecipeError, weights=folder, quant=Quant(type="int8", block_size=64))
    refused("llm_int8_threshold is not read", RecipeError, weights=folder, quant={"llm_int8_threshold": 6.0})


@pytest.mark.parametrize(
    ("quant", "said"),
    [
        ("nf5", "quant.type must be nf4, fp4, int8, gguf, none or auto, got 'nf5'"),
        ({"typ": "nf4"}, "quant.typ is not a field; did you mean quant.type?"),
        ({"block_size": 128}, "quant.block_size must be 64, got 128"),
        (3, "quant must be a type .* got int"),
    ],
)
def test_settings_that_are_unknown(quant: Any, said: str, folder: Path) -> None:
    refused(said, RecipeError, weights=folder, quant=quant)


def test_a_dtype_that_is_unknown(folder: Path) -> None:
    refused("compute_dtype must be auto, bf16, fp16 or fp32, got 'float8'", RecipeError, weights=folder, dtype="float8")


def test_a_name_in_place_of_a_list(folder: Path) -> None:
    refused(
        r"skip_modules must be a list of module names, got 'output'", RecipeError, weights=folder, skip_modules="output"
    )


@pytest.mark.parametrize("argument", ["skip_modules", "keep_in_fp32_modules"])
def test_names_that_are_not_there_with_the_nearest(argument: str, folder: Path) -> None:
    said = refused(
        f"{argument} 'atention' names no module; did you mean 'attention'", weights=folder, **{argument: ["atention"]}
    )
    assert "module.named_modules()" in said
    # a part of a name is not the name
    refused(f"{argument} 'norm' names no module; did you mean 'norm[12]'", weights=folder, **{argument: ["norm", "up"]})


def test_a_parameter_can_be_skipped_but_not_computed_with_in_fp32(folder: Path) -> None:
    refused("keep_in_fp32_modules 'position' names no module", weights=folder, keep_in_fp32_modules=["position"])


def test_a_meta_module_without_weights() -> None:
    said = refused("Encoder is on the meta device .* and no weights are named")
    assert "quantize_model(module, 'model.safetensors')" in said


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    refused("there are no weights at .*nowhere", SourceError, weights=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("has no .safetensors file", SourceError, weights=tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("no weights")
    refused("neither a file of weights .* nor an index", SourceError, weights=tmp_path / "notes.txt")


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    how(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def test_weights_that_are_missing_too_many_or_of_another_shape(folder: Path) -> None:
    def wrong(state: dict[str, torch.Tensor]) -> None:
        del state["layers.0.up.weight"]
        state["layers.0.upp.weight"] = torch.zeros(1)
        state["mixer.0.weight"] = torch.zeros(3, 4)
        state["mixer.2.weight"] = torch.zeros(48, 48, dtype=torch.int8)

    change(folder, wrong)
    said = refused("do not fit Encoder", weights=folder)
    assert "lack 1 of its tensors: layers.0.up.weight" in said
    assert "hold 1 that it does not have: layers.0.upp.weight" in said
    assert "mixer.0.weight is (3, 4), not (48, 48)" in said and "mixer.2.weight is I8, which is not quantised" in said
    assert "nearest to 'layers.0.up.weight' is 'layers.0.upp.weight'" in said


def test_names_with_another_prefix_are_told(folder: Path) -> None:
    def wrap(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[f"module.{name}"] = state.pop(name)

    change(folder, wrap)
    assert "nearest to 'position' is 'module.position'" in refused("lack", weights=folder)


def test_a_file_that_is_cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused("is cut short", SourceError, weights=folder)


def test_an_index_whose_files_are_not_there(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}}))
    for named in (folder, index):
        refused("lacks 1 of the 2 files in model.safetensors.index.json: gone.safetensors", SourceError, weights=named)


def test_an_offload_folder_that_is_missing_not_writable_or_full(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused("go to disk, and no folder is named", weights=folder, device_map=ON_DISK)
    file = tmp_path / "file"
    file.write_text("")
    refused("cannot be written: .*Not a directory", weights=folder, device_map=ON_DISK, offload_folder=file / "below")
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    said = refused(
        "has 0.000 GB free, and 0.000 GB go to disk", weights=folder, device_map=ON_DISK, offload_folder=tmp_path
    )
    assert "send less to disk in device_map" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "weights"]


@pytest.mark.parametrize(
    ("device_map", "said"),
    [
        ({"": "cpu", "layer": "disk"}, "device_map names 'layer', which Encoder does not have"),
        ({"layers": "cpu"}, "device_map says nothing about 7 tensors: position, scale, "),
        ({"": "tape"}, "sends '' to 'tape'; allowed are a card, cpu and disk"),
        ({"": 99}, r"sends '' to cuda:99, and this machine has \d+ cards"),
        ("fast", "must be a mapping or one of auto, balanced, balanced_low_0, sequential, got 'fast'"),
    ],
)
def test_device_maps_that_cannot_be(device_map: Any, said: str, folder: Path) -> None:
    refused(said, weights=folder, device_map=device_map)


def test_a_module_without_linear_layers_or_quantised_already(folder: Path) -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MultiheadAttention(8, 2))
    assert "its largest matrices are 1.in_proj_weight" in refused("Sequential has no linear layer", module=conv)
    refused("is a layer itself", module=nn.Linear(8, 8))
    refused("has no linear layer", weights=folder, skip_modules=["layers", "mixer"])


def test_buffers_that_nothing_computes(tmp_path: Path) -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("angles", torch.arange(4.0), persistent=False)
            self.linear = nn.Linear(4, 4)

    save_file(Rotary().state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        module = Rotary()
    said = refused("angles: buffers of Rotary that no checkpoint holds", module=module, weights=tmp_path)
    assert "init_empty_weights()" in said


def test_tied_parameters_with_two_contents(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(state: dict[str, torch.Tensor]) -> None:
        state["output.weight"] = state["embedding.weight"].clone()

    change(folder, add)
    with pytest.raises(TypeError):  # it fits: it would be read now, which this file's fixture forbids
        halfbyte.quantize_model(empty("encoder"), folder)
    change(folder, lambda state: state["output.weight"].view(-1)[-1:].add_(1))
    refused("embedding.weight and output.weight are one tensor of the module, but .* holds two", weights=folder)


def test_pickles_with_more_than_tensors(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    torch.save({"layers.0.up.weight": torch.zeros(1), "loaded": Path}, file)
    said = refused("pickled weights hold more than tensors", weights=file)
    assert "safetensors" in said


def test_quantised_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    held = halfbyte.quantize_model(made("llama"))
    with pytest.raises(BaseModelError, match=r"LlamaForCausalLM is quantised already: model.layers.0.self_attn.q_proj"):
        halfbyte.quantize_model(held)
