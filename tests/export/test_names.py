"""Names of layers for other programs: held against the programs' own sources where they are at hand; refusals.

`HALFBYTE_VLLM=FOLDER` (in which `vllm/` is) and `HALFBYTE_MLX_LM=FOLDER` (in which `mlx_lm/` is), or the packages where
they are installed.
"""

from __future__ import annotations

import ast
import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from halfbyte.errors import ExportError
from halfbyte.export import lora
from halfbyte.models import text_half


def source(variable: str, package: str) -> Path:
    spec = find_spec(package)
    folder = os.environ.get(variable) or (spec and Path(spec.submodule_search_locations[0]).parent)
    if not folder:
        pytest.skip(f"{package} is not here")
    return Path(folder) / package


@cache
def vllm() -> tuple[Path, dict[str, str], dict[str, tuple[Path, ast.ClassDef]]]:
    """(folder, architecture -> class, class -> file and definition) of its models."""
    folder = source("HALFBYTE_VLLM", "vllm") / "model_executor" / "models"
    entries = re.findall(r'"(\w+)":\s*\(\s*"\w+",\s*"(\w+)",?\s*\)', (folder / "registry.py").read_text())
    classes = {
        node.name: (file, node)
        for file in folder.glob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    return folder, dict(entries), classes


def lineage(name: str) -> list[str]:
    classes = vllm()[2]
    above = [ast.unparse(base) for base in classes[name][1].bases] if name in classes else []
    return [name, *(each for base in above for each in lineage(base))]


def test_vllm_holds_loras_of_each_type_where_the_table_says() -> None:
    _, architectures, classes = vllm()
    for kind, place in lora._WHOLE["vllm"].items():
        cls = architectures[text_half.whole_class(CONFIG_MAPPING[kind]()).__name__]
        assert "SupportsLoRA" in lineage(cls), kind
        text = "".join(classes[each][0].read_text() for each in lineage(cls) if each in classes)
        mapped = '"model.language_model.": "language_model.model."' in text
        if place == lora._BESIDE:
            assert mapped and "self.language_model" in text, kind
        else:
            assert "self.text_model = LlamaModel" in text and not mapped, kind


@pytest.mark.parametrize("kind", sorted(lora._LEAVES))
def test_vllm_has_the_layers_of_each_type(kind: str) -> None:
    _, architectures, classes = vllm()
    from transformers import AutoModelForCausalLM

    cls = architectures[AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[kind]].__name__]
    assert "SupportsLoRA" in lineage(cls)
    files = {classes[each][0] for each in lineage(cls) if each in classes}
    text = "".join(file.read_text() for file in files)
    near = {vllm()[0] / f"{module}.py" for module in re.findall(r"from \.(\w+) import", text)}
    near |= {vllm()[0].parents[2] / f"{m.replace('.', '/')}.py" for m in re.findall(r"vllm[\w.]+mamba[\w.]+", text)}
    text += "".join(path.read_text() for path in near if path.is_file())
    absent = [leaf for leaf in lora._LEAVES[kind].split() if not re.search(rf'"{leaf}"|self\.{leaf}\b', text)]
    assert absent == []


def test_mlx_has_the_layers_of_each_type() -> None:
    folder = source("HALFBYTE_MLX_LM", "mlx_lm") / "models"
    same = {"mistral": "llama", "qwen3_5_text": "qwen3_5", "lfm2_vl": "lfm2-vl"}
    for kind, leaves in lora._LEAVES.items():
        text = (folder / f"{same.get(kind, kind)}.py").read_text()
        if "llama" in re.findall(r"from \. import (\w+)", text):
            text += (folder / "llama.py").read_text()
        text += (folder / "qwen3_next.py").read_text() if kind == "qwen3_5_text" else ""
        assert [leaf for leaf in leaves.split() if f"self.{leaf} " not in text] == [], kind
    for kind, place in lora._WHOLE["mlx"].items():
        text = (folder / f"{same.get(kind, kind)}.py").read_text()
        assert "self.language_model = " in text and place == lora._BESIDE, kind


def test_names_of_a_program() -> None:
    mine = ["model.language_model.layers.3.self_attn.q_proj"]
    assert lora.names_for("vllm", "gemma3_text", "gemma3", mine) == {
        mine[0]: "language_model.model.layers.3.self_attn.q_proj"
    }
    conv = ["model.language_model.layers.0.conv.in_proj"]
    assert lora.names_for("vllm", "lfm2", "lfm2_vl", conv)[conv[0]].endswith("layers.0.short_conv.in_proj")
    assert lora.names_for("mlx", "lfm2", "lfm2_vl", conv)[conv[0]].endswith("layers.0.conv.in_proj")
    plain = ["model.layers.0.mlp.up_proj"]
    assert lora.names_for("vllm", "llama", None, plain) == {plain[0]: plain[0]}


@pytest.mark.parametrize(
    ("kind", "whole", "module", "said"),
    [
        ("gpt2", None, "transformer.h.0.attn.c_attn", "vllm has in a gpt2"),
        ("gemma3n_text", "gemma3n", "model.language_model.layers.0.self_attn.q_proj", "in a gemma3n"),
        ("glm4", "glm4v", "model.language_model.layers.0.mlp.gate_up_proj", "no layer in a glm4v that is called"),
        ("llama", None, "lm_head", "no layer in a llama that is called lm_head"),
    ],
)
def test_what_a_program_has_not_is_refused(kind: str, whole: str | None, module: str, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        lora.names_for("vllm", kind, whole, [module])
