"""An adapter for other programs: a GGUF adapter for llama.cpp, and a PEFT folder within vLLM's limits.

llama.cpp scales every layer by one alpha over the layer's own rank, and vLLM by one alpha and one rank; neither reads
rsLoRA's or a pattern's scaling of a single layer. So that scaling is multiplied into B, and what neither can hold
(DoRA, biases, modules trained whole, rows of tokens, experts) is refused. A residual start doubles the rank: what was
learned since is B A minus the factors that it began with.
Source: llama.cpp, src/llama-adapter.h (`get_scale`); vLLM, vllm/lora/peft_helper.py.
Cost: the adapter in fp32.

Under names that a program does not have an adapter may be served without effect and without an error, so a layer not in
the lists below is refused. Source: vLLM 0.33, `model_executor/models` (where a class mounts its language model,
`SupportsLoRA`, `packed_modules_mapping`); mlx-lm d78bf58e, `mlx_lm/models`; a test reads both where they are.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from gguf import GGUFWriter
from safetensors.torch import save_file

from halfbyte.base.store.in_file import FileSource
from halfbyte.errors import ExportError, typed
from halfbyte.export import gguf, hub
from halfbyte.export.weights import Item, MergedModel
from halfbyte.models import tensors as tensors_of
from halfbyte.models.gguf.layouts import transform_of
from halfbyte.models.gguf.reader import FileNumbers, Transform
from halfbyte.models.lora_sites import split_at_layer
from halfbyte.recipe.adapter import read_config
from halfbyte.recipe.adapter_folder import ADAPTER_FILES
from halfbyte.system import files

Program = Literal["transformers", "vllm", "mlx"]

_LLAMA = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
_FUSED = "q_proj k_proj v_proj o_proj down_proj"  # gate and up are one matrix here and two there
_LFM2 = "q_proj k_proj v_proj out_proj in_proj w1 w2 w3"
_QWEN3_5 = f"{_LLAMA} in_proj_qkv in_proj_z in_proj_b in_proj_a out_proj"
_GEMMA4 = f"{_LLAMA} per_layer_input_gate per_layer_projection"
# Of a language model: its type -> the linear layers that both programs have under transformers' names.
_LEAVES = {
    **dict.fromkeys(("llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite"), _LLAMA),
    "phi3": "qkv_proj o_proj gate_up_proj down_proj", "glm4": _FUSED, "lfm2": _LFM2, "qwen3_5_text": _QWEN3_5,
    "gemma4_text": _GEMMA4,
}  # fmt: skip
_BESIDE = "language_model.model.layers"
# Of a checkpoint with towers: its type -> where the program has the layers of its language model.
_WHOLE: dict[Program, dict[str, str]] = {
    "vllm": {
        **dict.fromkeys(("gemma3", "gemma4", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), _BESIDE),
        **dict.fromkeys(("llava", "lfm2_vl", "glm4v"), _BESIDE),
        **dict.fromkeys(("smolvlm", "idefics3"), "model.text_model.layers"),
    },
    "mlx": dict.fromkeys(("gemma3", "gemma4", "mistral3", "qwen2_vl", "qwen3_vl", "qwen3_5", "lfm2_vl"), _BESIDE),
}
_RENAMED = {("vllm", "lfm2"): ("conv.", "short_conv.")}


def names_for(program: Program, kind: str, whole: str | None, modules: Iterable[str]) -> dict[str, str]:
    """The name in a program of each module that an adapter changes.

    Args:
        kind: `model_type` of the language model. whole: of the checkpoint that it is the half of, if it is one.
        modules: under the names of transformers.

    Raises:
        ExportError: the program has no such architecture, or no such layer; names what it has.
    """
    layers = "model.layers" if whole is None else _WHOLE[program].get(whole)
    leaves = _LEAVES.get(kind, "").split()
    if not leaves or layers is None:
        there = ", ".join(sorted({*_LEAVES, *_WHOLE[program]}))
        raise ExportError(
            f"which layers {program} has in a {whole or kind}, and under which names, is not known here.",
            fix=f"halfbyte merge RUN, which needs no names; known are {there}",
        )
    named, strange = dict[str, str](), list[str]()
    for module in modules:
        stack, inner = split_at_layer(module)
        number = module[len(stack) + 1 :].partition(".")[0]
        if not inner or inner[-1] not in leaves:
            strange.append(module)
        there = ".".join(inner).replace(*_RENAMED.get((program, kind), ("", "")))
        named[module] = f"{layers}.{number}.{there}"
    if strange:
        raise ExportError(
            f"{program} has no layer in a {whole or kind} that is called {strange[0]} ({len(strange)} of the adapter's "
            f"{len(named)}); it would be served without them.",
            fix=f"train on some of {', '.join(leaves)}, or halfbyte merge RUN",
        )
    return named


# vLLM pads an adapter to one of these; beyond the last it refuses (vllm/config/lora.py, MaxLoRARanks).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def merged_instead(merged: MergedModel) -> str:
    """The command that puts into weights what an adapter cannot hold."""
    return f"halfbyte merge {typed(merged.run.path)}; there everything is in the weights"


@dataclass(frozen=True)
class Factors:
    """One layer's delta as B A, its whole scaling in B: B (O, R) and A (R, D), fp32."""

    parameter: str
    b: torch.Tensor
    a: torch.Tensor


def factors(merged: MergedModel, program: str) -> list[Factors]:
    """The adapter's layers. Raises ExportError: names what the program's adapters cannot hold."""
    layers, refused = list[Factors](), dict[str, list[str]]()
    for parameter, change in merged.changes.items():
        layer = change.layer
        if layer is None or change.norms or not hasattr(layer, "lora_A") or not layer.lora_A:
            what = (
                "experts" if change.experts is not None else "a trained bias" if parameter.endswith(".bias")
                else "trained rows of tokens" if change.rows is not None else "DoRA" if change.norms
                else "LoRA on an embedding" if layer is not None else "a module trained whole"
            )  # fmt: skip
            refused.setdefault(what, []).append(parameter)
            continue
        key = next(iter(layer.scaling))
        b, a = layer.lora_B[key].weight.detach() * layer.scaling[key], layer.lora_A[key].weight.detach()
        if change.start is not None:
            b, a = torch.cat([b, -change.start[0]], 1), torch.cat([a, change.start[1]])
        layers.append(Factors(parameter, b, a))
    if refused:
        listed = "; ".join(f"{what} ({names[0]})" for what, names in refused.items())
        raise ExportError(f"an adapter for {program} cannot hold {listed}.", fix=merged_instead(merged))
    return layers


@dataclass(frozen=True)
class GgufLayers:
    """An adapter's layers as a GGUF adapter has them. `names`: of each its tensor in a GGUF file of the base."""

    architecture: str
    numbers: FileNumbers
    names: list[str]
    factors: list[Factors]

    @classmethod
    def of(cls, merged: MergedModel) -> "GgufLayers":
        """Raises ExportError: the architecture, or a part of the adapter, has no place in such a file."""
        every = factors(merged, "llama.cpp")
        if tied := [each.parameter for each in every if each.parameter in merged.plain.all_tied_weights_keys]:
            what = f"LoRA on a head that the base's file has as its embedding ({tied[0]})"
            raise ExportError(f"an adapter for llama.cpp cannot hold {what}.", fix=merged_instead(merged))
        items = {item.parameter: item for item in merged.items}
        architecture, numbers, names = _file_of(merged, [items[each.parameter] for each in every])
        return cls(architecture, numbers, [names[items[each.parameter].name] for each in every], every)


def write_gguf(merged: MergedModel, path: Path) -> None:
    """A GGUF adapter, for a GGUF file of the base. Raises ExportError: the architecture, or a part of the adapter, has
    no place in it."""
    assert merged.run.adapter is not None
    layers = GgufLayers.of(merged)
    alpha = float(read_config(merged.run.adapter)["lora_alpha"])
    writer = GGUFWriter(path, layers.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_name(Path(merged.checkpoint.id).name)
    for name, each in zip(layers.names, layers.factors, strict=True):
        transform = transform_of(layers.architecture, name)
        orders = Transform(order=transform.order, columns=transform.columns)
        b = each.b.numpy() * (each.a.shape[0] / alpha)  # llama.cpp multiplies by alpha over the rank
        writer.add_tensor(f"{name}.lora_a", replace(orders, order=None).inverse(each.a.numpy(), layers.numbers, name))
        writer.add_tensor(f"{name}.lora_b", replace(orders, columns=None).inverse(b, layers.numbers, name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _file_of(merged: MergedModel, items: list[Item]) -> tuple[str, FileNumbers, dict[str, str]]:
    """(its architecture, its numbers, what it calls each tensor) of the GGUF file that an adapter is for: the one that
    it was trained on, or one that would be written of its base. Raises ExportError: a tensor is no one of the file."""
    if not isinstance(merged.source, FileSource):
        config = merged.config.get_text_config()
        metadata, _ = gguf.describe(config)
        return metadata.architecture, metadata, gguf.names_of(config, items, metadata)
    there = merged.source.parameters
    sources = {item.name: there.sources[item.name] for item in items}
    if composed := [name for name, source in sources.items() if source.parts or source.expert is not None]:
        raise ExportError(
            f"{composed[0]} is several tensors of the file, and an adapter for it is none.", fix=merged_instead(merged)
        )
    names = {name: source.name for name, source in sources.items()}
    return there.file.header.architecture, there.file, names


def write_peft(merged: MergedModel, folder: Path, program: Program | None = None) -> list[str]:
    """A PEFT folder of one rank and one alpha, which plain PEFT and vLLM read alike; for mlx one of mlx-lm's. Returns
    notes on its use. `program`: whose names the layers get; None: those of the source checkpoint, as transformers has
    them. Raises ExportError: vLLM could not hold it, or `program` has no such layers."""
    adapter = merged.run.adapter
    assert adapter is not None
    every = factors(merged, "mlx" if program == "mlx" else "vLLM")
    rank = max(each.a.shape[0] for each in every)
    if rank > VLLM_RANKS[-1]:
        raise ExportError(
            f"the adapter's rank is {rank}, and vLLM holds {VLLM_RANKS[-1]} at most.", fix=merged_instead(merged)
        )
    modules = {each.parameter.removesuffix(".weight") for each in every}
    names, whole = {each: each for each in modules}, tensors_of.read_config(merged.checkpoint.path).get("text_half_of")
    if program in ("vllm", "mlx"):
        names = names_for(program, merged.config.model_type, whole, sorted(modules))
    tensors = dict[str, torch.Tensor]()
    for each in every:
        name = names[each.parameter.removesuffix(".weight")]
        a, b = each.a.new_zeros(rank, each.a.shape[1]), each.b.new_zeros(each.b.shape[0], rank)
        a[: len(each.a)], b[:, : each.b.shape[1]] = each.a, each.b  # alpha = r: B has the scaling
        if program == "mlx":
            tensors |= {f"{name}.lora_a": a.T.contiguous(), f"{name}.lora_b": b.T.contiguous()}
        else:
            tensors |= {f"base_model.model.{name}.lora_{x}.weight": value for x, value in (("A", a), ("B", b))}
    if program == "mlx":
        return _write_mlx(tensors, folder, rank, merged.config.num_hidden_layers)
    config = read_config(adapter) | {
        "r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "init_lora_weights": True, "base_model_name_or_path": hub.shipped(merged.checkpoint.id),
        "target_modules": sorted({each.parameter.removesuffix(".weight").rpartition(".")[2] for each in every}),
        "layers_to_transform": None, "layers_pattern": None, "exclude_modules": None, "lora_bias": False,
        "bias": "none",
    }  # fmt: skip
    weights = {item.parameter.removesuffix(".weight") for item in merged.items if item.parameter.endswith(".weight")}
    if whole or {
        each for each in weights - modules if each.rpartition(".")[2] in config["target_modules"]
    }:  # PEFT's way
        config["target_modules"] = sorted(names.values())
    save_file(tensors, folder / ADAPTER_FILES[0], metadata={"format": "pt"})
    files.write(folder / ADAPTER_FILES[1], json.dumps(config, indent=2).encode() + b"\n")
    for path in adapter.iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "added_tokens", "chat_template")):
            shutil.copyfile(path, folder / path.name)
    if program == "transformers":
        return ["PeftModel.from_pretrained(BASE, FOLDER)"]
    max_rank = next(each for each in VLLM_RANKS if each >= rank)
    notes = [f"vLLM: --enable-lora --max-lora-rank {max_rank} --lora-modules NAME=FOLDER"]
    if merged.run.recipe.quant.quantises:
        notes += ["its base was quantised: on the 16-bit base of vLLM it says what `merge --base 16bit` says"]
    return notes


def _write_mlx(tensors: dict[str, torch.Tensor], folder: Path, rank: int, layers: int) -> list[str]:
    """An adapter that mlx-lm's `load_adapters` reads: every layer of a model has the same modules."""
    keys = {".".join(split_at_layer(name)[1][:-1]) for name in tensors}
    settings = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)}
    config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": settings}
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    files.write(folder / ADAPTER_FILES[1], files.as_json(config))
    return ["mlx-lm: mlx_lm.generate --model BASE --adapter-path FOLDER; it was not run here"]
