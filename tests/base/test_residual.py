"""Adapters that begin at what quantising has lost: as near to the source as the singular values say, made once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte import finetune
from halfbyte.adapters import lora
from halfbyte.adapters.assembly import AdaptedBase, assemble
from halfbyte.base import load, quantisation_error, residual
from halfbyte.base.config import open_config
from halfbyte.base.quantize import quantize
from halfbyte.errors import AdapterError, StoreError
from halfbyte.models.sources.lookup import find_model
from halfbyte.recipe.command import to_resume
from halfbyte.recipe.schema import Loaded
from halfbyte.system import device, pages
from halfbyte.training import preview
from tests import tiny_run
from tests.base import dequantised

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"quant__double_quant": False},
    "nf4 double": {},
    "fp4": {"quant__type": "fp4"},
    "int8": {"quant__type": "int8"},
}
SCALED: dict[str, dict[str, Any]] = {
    "alpha 2r": {},
    "alpha r": {"lora__lora_alpha": 4},
    "rsLoRA": {"lora__use_rslora": True},
    "patterns": {
        "lora__rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.down_proj": 7},
        "lora__alpha_pattern": {"k_proj": 3},
    },
}


def asked(folder: Path, name: str = "llama", **more: Any) -> Loaded:
    if not (folder / "model").exists():
        tiny_run.checkpoint(folder / "model", name)
    more = {"lora__init_lora_weights": "residual", "lora__target_modules": "all-linear", **more}
    return tiny_run.recipe(folder, **more)


def started(loaded: Loaded) -> tuple[AdaptedBase, Path]:
    """The base of a recipe with its fresh adapters, and its store."""
    recipe = loaded.recipe
    base = load.open_base(find_model(recipe), recipe.quant, device.detect())
    assert base.store is not None
    made = residual.ensure(base, recipe.lora, lambda label, text: None)
    return assemble(base, recipe, factors=made), base.store


def misses(loaded: Loaded) -> dict[str, tuple[float, float, float]]:
    """Of each layer ||W - (base + scaling B A)||, the least that a rank can leave, and ||W - base||: by numpy."""
    made, store = started(loaded)
    held, plain = dequantised.weights(store), AutoModelForCausalLM.from_pretrained(loaded.recipe.model)
    found = {}
    for name, layer in made.model.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            gone = (dequantised.source(plain, name) - held[name]).double().numpy()
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            product = layer.scaling["default"] * (b.detach().double() @ a.detach().double()).numpy()
            rest = np.linalg.svd(gone, compute_uv=False)[layer.r["default"] :]
            found[name] = tuple(map(float, map(np.linalg.norm, (gone - product, rest, gone))))
    assert len(found) == len(held)
    return found


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sketch as wide as the matrix: then the randomised decomposition is the full one."""
    monkeypatch.setattr(residual, "OVERSAMPLING", 1 << 20)


@pytest.mark.parametrize(
    ("name", "form"), [*(("llama", form) for form in FORMATS), ("gpt2", "nf4"), ("bloom", "nf4 double")]
)
def test_base_and_adapter_miss_the_source_by_what_the_singular_values_say(
    name: str, form: str, tmp_path: Path, exact: None
) -> None:
    for at, (off, least, before) in misses(asked(tmp_path, name, **FORMATS[form])).items():
        # fp32 rounds W - base and the product by 2^-24 of numbers of about 1; sums over 10^4 of them
        assert off == pytest.approx(least, rel=1e-4, abs=1e-5), at
        assert off < before


@pytest.mark.parametrize("form", SCALED)
def test_every_scaling_is_taken_out_of_the_factors(form: str, tmp_path: Path, exact: None) -> None:
    for at, (off, least, _) in misses(asked(tmp_path, **SCALED[form])).items():
        assert off == pytest.approx(least, rel=1e-4, abs=1e-5), at


def test_a_scaling_that_is_forgotten_is_seen(tmp_path: Path, exact: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora.math, "sqrt", lambda x: 1.0)
    assert all(off > 1.01 * least for off, least, _ in misses(asked(tmp_path)).values())


def test_the_sketch_that_is_used_is_within_its_bound(tmp_path: Path) -> None:
    bound = np.sqrt(1 + 4 / (residual.OVERSAMPLING - 1))  # Halko et al., theorem 10.5
    for at, (off, least, before) in misses(asked(tmp_path)).items():
        assert least * (1 - 1e-4) <= off <= bound * least and off < before, at


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits[0].float()


def test_a_run_begins_nearer_to_the_source_and_plain_peft_loads_its_adapter(tmp_path: Path) -> None:
    loaded = asked(tmp_path, train__max_steps=1, train__learning_rate=1e-30, lora__r=16, lora__lora_alpha=32)
    made, store = started(loaded)
    source = logits(AutoModelForCausalLM.from_pretrained(loaded.recipe.model))
    with made.model.disable_adapter():
        before = float((logits(made.model) - source).norm())
    assert float((logits(made.model) - source).norm()) < before

    outcome = finetune.train(loaded)
    base = AutoModelForCausalLM.from_pretrained(store, dtype=torch.float32)
    for module in base.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # an upstream trap of its own
    plain = peft.PeftModel.from_pretrained(base, outcome.run / "adapter").eval()
    assert plain.peft_config["default"].init_lora_weights is True
    # two orders of the same sums in fp32
    assert torch.allclose(logits(plain), logits(made.model.eval()), atol=1e-4 * float(source.abs().max()))


def test_a_second_run_reads_no_source_and_a_resumed_one_not_even_the_factors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"train__lr_scheduler_type": "constant", "train__save_strategy": "steps"}
    whole = finetune.train(asked(tmp_path, output=tmp_path / "whole", **more))
    _, store = started(asked(tmp_path))

    def unread(*_: object) -> None:
        raise AssertionError("the source is read again")

    monkeypatch.setattr(quantisation_error, "matrices", unread)
    finetune.train(asked(tmp_path, output=tmp_path / "half", train__max_steps=2, **more))
    (store / "residual/rank-4.safetensors").unlink()
    finetune.train(to_resume(str(tmp_path / "half"), ["train.max_steps=4"]), resume=True)
    saved = [folder / "adapter/adapter_model.safetensors" for folder in (whole.run, tmp_path / "half")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


@pytest.mark.skipif(not pages.supported(), reason="needs Linux and /proc/self/pagemap")
def test_a_streamed_base_begins_at_the_same_numbers(tmp_path: Path) -> None:
    values = [{"output": tmp_path / where, "quant__placement": where} for where in ("streamed", "resident")]
    first, second = (finetune.train(asked(tmp_path, **more)).report["loss"] for more in values)
    assert first["first"] == second["first"] and first["last"] == pytest.approx(second["last"], rel=1e-6)


def test_quantize_makes_the_factors_and_a_store_alone_is_enough_then(tmp_path: Path) -> None:
    loaded = asked(tmp_path)
    built = quantize(loaded.recipe, out=tmp_path / "store")
    assert built.residual == tmp_path / "store/residual/rank-4.safetensors" and built.residual.is_file()
    assert quantize(loaded.recipe, out=tmp_path / "store").residual == built.residual
    shutil.rmtree(tmp_path / "model")
    again = asked(tmp_path, model=str(tmp_path / "store"))
    assert finetune.train(again).report["steps"] == 4
    with pytest.raises(AdapterError, match="no factors of rank 8 are kept beside it") as error:
        preview.resolve(asked(tmp_path, model=str(tmp_path / "store"), lora__r=8))
    assert "name the 16-bit model" in str(error.value)


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(tmp_path: Path) -> None:
    loaded = asked(tmp_path, lora__rank_pattern={"q_proj": 9})
    notes = dict(preview.resolve(loaded).notes)
    assert notes["residual"].startswith("rank 9 of what is lost will be made from the source and kept in ")
    assert not Path(notes["residual"].rpartition("kept in ")[2]).exists()
    finetune.train(loaded)
    assert dict(preview.resolve(loaded).notes)["residual"].startswith("rank 9 of what was lost, kept in ")
    assert "residual" not in dict(preview.resolve(asked(tmp_path, lora__init_lora_weights=True)).notes)


def test_layers_that_are_not_quantised_are_named(tmp_path: Path) -> None:
    loaded = asked(tmp_path, quant__skip_modules=["down_proj"])
    with pytest.raises(
        AdapterError, match=r"2 layers that get an adapter are not quantised.*layers\.0\.mlp\.down_proj"
    ):
        preview.resolve(loaded)
    with pytest.raises(AdapterError, match="are not quantised"):
        finetune.train(loaded)
    assert not (tmp_path / "run").exists()
    finetune.train(asked(tmp_path, quant__skip_modules=["down_proj"], lora__exclude_modules=["down_proj"]))


def test_a_damaged_file_is_made_again_and_one_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    loaded = asked(tmp_path)
    _, store = started(loaded)
    path = store / "residual/rank-4.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    started(loaded)
    assert path.read_bytes() == whole
    shutil.rmtree(path.parent)
    path.parent.write_text("in the way")
    with pytest.raises(StoreError, match=r"rank-4\.safetensors cannot be written"):
        started(loaded)
    path.parent.unlink()


def test_an_interrupted_file_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = asked(tmp_path)

    def ends(matrix: torch.Tensor, rank: int) -> Any:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(residual, "low_rank", ends)
        with pytest.raises(MemoryError):
            started(loaded)
    _, store = started(loaded)
    assert [p.name for p in (store / "residual").iterdir() if not p.name.startswith(".")] == ["rank-4.safetensors"]


def test_a_base_without_a_store_is_refused(tmp_path: Path) -> None:
    recipe = asked(tmp_path).recipe
    base = load.open_base(find_model(recipe), recipe.quant, device.detect(), use_store=False)
    with pytest.raises(AdapterError, match="needs a store"):
        residual.ensure(base, recipe.lora, lambda label, text: None)
    config = open_config(Path(recipe.model))
    assert residual.look(find_model(recipe), config, asked(tmp_path, lora__init_lora_weights=True).recipe, ()) is None
