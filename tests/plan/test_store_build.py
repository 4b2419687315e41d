"""plan/store_build.py: bytes on disk and RAM of building a store, against real builds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.base import load
from halfbyte.base.config import open_config
from halfbyte.base.store import supply
from halfbyte.models.sources.checkpoint import beside_weights
from halfbyte.models.sources.lookup import resolve
from halfbyte.models.tensors import TensorSpec, facts_of, read_checkpoint, read_config
from halfbyte.plan.store_build import CHUNK_ELEMENTS, StoreBuild
from halfbyte.recipe.schema import Quant
from halfbyte.system import device as machine
from tests import tiny, tiny_run

WIDE = {
    "llama": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6},
    "gpt2": {"n_embd": 512, "n_inner": 2048, "n_layer": 6},
    "gemma3": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2},
    "bloom": {"hidden_size": 512, "n_layer": 6},
}


def checkpoint(folder: Path, name: str) -> Path:
    tiny.model(name, dtype=torch.bfloat16, vocab_size=tiny_run.VOCAB, changes=WIDE[name]).save_pretrained(folder)
    tiny_run.tokenizer().save_pretrained(folder)
    return folder


def planned(folder: Path, quant: Quant, itemsize: int = 2) -> StoreBuild:
    specs = tuple(read_checkpoint(folder))
    beside = sum(file.stat().st_size for file in beside_weights(folder))
    return StoreBuild(specs, quant, itemsize, facts_of(read_config(folder), specs).vocab, beside)


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize(
    "quant",
    [{}, {"double_quant": False}, {"type": "fp4"}, {"type": "int8"}],
    ids=["nf4", "one level of scales", "fp4", "int8"],
)
def test_bytes_on_disk_within_one_percent(name: str, quant: dict[str, Any], tmp_path: Path) -> None:
    found = resolve(str(checkpoint(tmp_path / "m", name)))
    settings = Quant(compute_dtype="bf16", **quant)
    specs = tuple(read_checkpoint(found.path))
    wanted = load.store_spec(found, open_config(found.path), settings, machine.detect(), specs)
    folder = supply.ensure(wanted, out=tmp_path / "store")
    seen = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert planned(found.path, settings).disk_bytes == pytest.approx(seen, rel=0.01)


def test_ram_does_not_grow_with_the_model_but_with_what_comes_whole() -> None:
    small = TensorSpec("model.layers.0.mlp.up_proj.weight", (2048, 4096), "BF16", "linear", 0)
    large = replace(small, shape=(20480, 4096))

    def chunks(*specs: TensorSpec, itemsize: int = 2, cores: int = 1) -> int:
        lines = StoreBuild(specs, Quant(), itemsize, 100, 0).lines(cores)
        return sum(line.bytes for line in lines if line.name == "chunks")

    eight = StoreBuild((small,), Quant(type="int8"), 2, 100, 0).lines(1)
    assert eight[-1].bytes == (2 + 2 + 4 + 1) * CHUNK_ELEMENTS + 4 * 2048, "read, fp16, fp32, codes; scales"
    scales = 2 * 4 * (large.numel - small.numel) // 64
    assert chunks(large) - chunks(small) == scales
    assert chunks(small, itemsize=4) - chunks(small) == 4 * CHUNK_ELEMENTS
    assert chunks(replace(large, transposed=True)) > 4 * large.numel
    two = (small, replace(small, name="model.layers.1.mlp.up_proj.weight", layer=1))
    assert chunks(*two, cores=4) == 2 * chunks(small), "no more threads than files"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_peak_of_a_real_build_within_ten_percent(name: str, tmp_path: Path) -> None:
    """In a process that has imported what a training has, which builds a store before its first step."""
    folder = checkpoint(tmp_path / "m", name)
    code = f"""
import json, re
from pathlib import Path
from halfbyte import finetune
from halfbyte.base.quantize import quantize
from halfbyte.recipe.file import recipe_from
built = quantize(recipe_from({str(folder)!r}, "none.jsonl", []).recipe, out=Path({str(tmp_path / "out")!r}))
status = Path("/proc/self/status").read_text()
print(json.dumps({{"built": built.built, "peak": 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", status)[1])}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    lines = planned(folder, Quant()).lines(machine.detect().cores)
    assert said["built"]
    assert sum(line.bytes for line in lines) == pytest.approx(said["peak"], rel=0.1)
