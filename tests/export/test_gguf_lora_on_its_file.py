"""A run on a GGUF's own blocks, as an adapter for that very file: by the gguf package and plain transformers alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.export import lora
from halfbyte.export.export import bases, to_gguf_lora
from halfbyte.export.job import ExportJob
from halfbyte.export.weights import MergedModel
from halfbyte.inference import target
from halfbyte.inference.load import open_target
from tests.base.test_gguf_file import CLOSE, run_of, written
from tests.models.gguf import files
from tests.models.gguf.test_architectures import CASES, logits

pytestmark = pytest.mark.usefixtures("forked_children")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))


def grown(run: Path) -> None:
    """An adapter that moves the answers, in place of the few steps that were trained."""
    path = run / "adapter" / "adapter_model.safetensors"
    draw = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(x.shape, generator=draw) * 0.1 for name, x in load_file(path).items()}, path)


def deltas(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Tensor of the model's file -> what llama.cpp adds to it: alpha / rank x B A (llama-adapter.h)."""
    reader = gguf.GGUFReader(file)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    there = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    names = [name.removesuffix(".lora_a") for name in there if name.endswith(".lora_a")]
    return {n: alpha / len(there[f"{n}.lora_a"]) * there[f"{n}.lora_b"] @ there[f"{n}.lora_a"] for n in names}


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2", "qwen35"])
def test_the_adapter_fits_the_file(tmp_path: Path, name: str) -> None:
    file, reference = written(tmp_path, name)
    run = run_of(tmp_path, file, train__max_steps=1, lora__target_modules="all-linear", lora__lora_dropout=0.0)
    grown(run)
    found = target.find(run)
    assert bases(found, "auto") == ["16bit"]
    lora.write_gguf(MergedModel(found, "16bit"), tmp_path / "lora.gguf")
    shipped = to_gguf_lora(ExportJob(run, tmp_path / "shipped", prove=False, force=True))
    assert (
        file.name in shipped.notes[0]
        and f"(sha256 {hashlib.sha256(file.read_bytes()).hexdigest()})" in shipped.notes[0]
    )
    assert next(shipped.path.glob("*.gguf")).read_bytes() == (tmp_path / "lora.gguf").read_bytes()
    trained = logits(open_target(found, force=True).model)
    changed = deltas(tmp_path / "lora.gguf")
    plain = logits(reference)
    added(CASES[name][0], reference, changed)
    spread = trained.abs().max()
    assert changed and (logits(reference) - trained).abs().max() <= 4 * CLOSE * spread
    assert (plain - trained).abs().max() > 100 * CLOSE * spread  # an adapter that is not there would be seen


def added(architecture: str, model: Any, changed: dict[str, np.ndarray[Any, Any]]) -> None:
    """Add to a model what an adapter adds to its file's tensors, put back into the model's order by hand."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], model.config.num_hidden_layers)
    todo = set(changed)
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            mapped = names.get_name(name, (".weight", ".bias"))
            mapped = mapped or names.get_name(name.removeprefix(f"{model.base_model_prefix}."), (".weight", ".bias"))
            if mapped in todo:
                _, undone = files._changed(architecture, mapped, parameter.numpy(), model.config)
                parameter += torch.from_numpy(np.ascontiguousarray(undone(changed[mapped])))
                todo.remove(mapped)
    assert not todo
