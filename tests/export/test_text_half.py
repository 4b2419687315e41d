"""A checkpoint with towers, from training to export: its adapter is one of the whole class, its merge a whole model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM

from halfbyte import finetune
from halfbyte.export import export
from halfbyte.export.job import ExportJob
from halfbyte.inference.load import open_run
from tests import in_process, small_models, tiny_run

VOCAB = tiny_run.VOCAB + 16  # some types' tokenizers add tokens
IDS = torch.arange(20, 44)[None]
ANY_TARGETS = ["q_proj", "v_proj"]


def trained(folder: Path, kind: str, **overrides: Any) -> Any:
    """A run on a small checkpoint of a type."""
    if not (folder / "model").is_dir():
        small_models.whole(kind, vocab_size=VOCAB).save_pretrained(folder / "model")
        tiny_run.tokenizer().save_pretrained(folder / "model")
    return finetune.train(tiny_run.recipe(folder, **overrides))


def whole(folder: Path) -> Any:
    return AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", small_models.WHOLE)
def test_a_run_on_a_checkpoint_with_towers(kind: str, tmp_path: Path) -> None:
    trained(tmp_path, kind, quant__type="none", lora__target_modules=ANY_TARGETS)
    keys = load_file(tmp_path / "run/adapter/adapter_model.safetensors").keys()
    assert all(
        key.startswith(("base_model.model.model.language_model.", "base_model.model.model.text_model.")) for key in keys
    )
    base = whole(tmp_path / "model")
    alone = logits(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        adapted = logits(peft.PeftModel.from_pretrained(base, tmp_path / "run/adapter").eval())
    assert (adapted - alone).abs().max() > 1e-3
    export.to_peft(ExportJob(tmp_path / "run", tmp_path / "peft"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        again = logits(peft.PeftModel.from_pretrained(whole(tmp_path / "model"), tmp_path / "peft").eval())
    torch.testing.assert_close(again, adapted, rtol=1e-4, atol=1e-4)
    export.merge(ExportJob(tmp_path / "run", tmp_path / "merged", prove=False))
    torch.testing.assert_close(logits(whole(tmp_path / "merged")), adapted, rtol=1e-3, atol=1e-3)
    with (
        safe_open(tmp_path / "merged/model.safetensors", "pt") as merged,
        safe_open(tmp_path / "model/model.safetensors", "pt") as source,
    ):
        assert set(merged.keys()) == set(source.keys())


@pytest.mark.parametrize(
    ("program", "file", "name", "sides"),
    [
        ("vllm", "adapter_model.safetensors",
         "base_model.model.language_model.model.layers.{}.self_attn.{}.lora_{}.weight", "AB"),
        ("mlx", "adapters.safetensors", "language_model.model.layers.{}.self_attn.{}.lora_{}", "ab"),
    ],
)  # fmt: skip
def test_an_adapter_under_another_programs_names(
    program: str, file: str, name: str, sides: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command; its product is that of the run's own adapter, with alpha in it."""
    trained(tmp_path, "gemma3", quant__type="none", lora__target_modules=ANY_TARGETS)
    command = in_process.runner(tmp_path, capsys)
    ended = command("export", str(tmp_path / "run"), "--peft", "--for", program, "--out", str(tmp_path / "out"))
    assert ended.code == 0, ended.err
    source, written = load_file(tmp_path / "run/adapter/adapter_model.safetensors"), load_file(tmp_path / "out" / file)
    layers = small_models.whole("gemma3", vocab_size=VOCAB).config.text_config.num_hidden_layers
    assert {*written} == {name.format(i, leaf, side) for i in range(layers) for leaf in ANY_TARGETS for side in sides}
    a, b = (written[name.format(0, "v_proj", side)] for side in sides)
    product = b @ a if program == "vllm" else (a @ b).T
    path = "base_model.model.model.language_model.layers.0.self_attn.v_proj.lora_{}.weight"
    settings = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    own = source[path.format("B")] @ source[path.format("A")] * settings["lora_alpha"] / settings["r"]
    assert own.abs().max() > 0
    torch.testing.assert_close(product.float(), own.float(), rtol=1e-5, atol=1e-7)


def test_a_program_that_lacks_a_layer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, "glm4v", quant__type="none", lora__target_modules=ANY_TARGETS)
    command = in_process.runner(tmp_path, capsys)
    ended = command("export", str(tmp_path / "run"), "--peft", "--for", "mlx", "--out", str(tmp_path / "out"))
    assert ended.code == 1 and "which layers mlx has in a glm4v" in ended.err and not (tmp_path / "out").exists()


def test_a_store_has_no_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    trained(tmp_path, "gemma3")
    (store,) = [path for path in (tmp_path / "cache/bases").iterdir() if not path.name.startswith(".")]
    names = {name for file in store.glob("*.safetensors") for name in load_file(file)}
    assert names and not [name for name in names if "vision" in name or "projector" in name]
    run = open_run(tmp_path / "run")
    assert not [name for name, _ in run.model.named_modules() if "vision" in name]
