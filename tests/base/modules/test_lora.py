"""LoRA on any quantised module: PEFT's own functions and halfbyte's, a plain torch loop, and what is on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import halfbyte
from tests.base.modules.helpers import LAYERS, empty, inputs, made, output, quantised, reference, save

pytestmark = pytest.mark.filterwarnings("ignore:.*stay as they are, being no plain linear layers")
TARGETS = {"encoder": ["up", "down", "mixer.0"], "vit": ["q_proj", "fc1"], "llama": ["q_proj", "down_proj"]}
NAMES = tuple(TARGETS)


def adapted(module: nn.Module, name: str, get: Any = peft.get_peft_model) -> nn.Module:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[name], init_lora_weights=True)
    model: nn.Module = get(module, config)
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def loss_of(model: nn.Module, name: str) -> torch.Tensor:
    return output(model, name).float().square().mean()


def gradients(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, name).backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("get", [peft.get_peft_model, halfbyte.get_peft_model], ids=["peft", "halfbyte"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_over_dequantised_weights(name: str, get: Any, kind: str, tmp_path: Path) -> None:
    original = made(name)
    held = halfbyte.quantize_model(empty(name), save(original, tmp_path), quant=kind, dtype="fp32")
    plain = adapted(reference(original, held), name)
    ours = adapted(held, name, get)
    layers = [m for m in ours.modules() if type(m).__module__.startswith("peft.tuners.lora.bnb")]
    assert len(layers) == len([m for m in plain.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A")]) > 0
    got, wanted = gradients(ours, name), gradients(plain, name)
    assert set(got) == set(wanted) and all("lora_" in key for key in got)
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for key, gradient in wanted.items():  # fp32 sums in another order; what is small is a difference of what is not
        wrong = (got[key] - gradient).abs().max()
        assert wrong <= 2e-5 * largest and wrong <= 1e-3 * gradient.abs().max(), key


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_loop_learns_and_the_base_stays(name: str, tmp_path: Path) -> None:
    held = halfbyte.quantize_model(empty(name), save(made(name), tmp_path), dtype="bf16", keep_in_fp32_modules=None)
    before = {key: t.clone() for key, t in held.state_dict().items()}
    model = adapted(halfbyte.prepare_model_for_kbit_training(held), name, halfbyte.get_peft_model).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for step in range(12):
        given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(name).items()}
        out = model(**given)
        loss = (out if isinstance(out, torch.Tensor) else out.logits).float().square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if step == 5:  # an evaluation in between must not end the gradients
            with torch.no_grad():
                model.eval()(**given)
            model.train()
    assert losses[-1] < 0.8 * losses[0]
    base = model.get_base_model().state_dict()  # type: ignore[operator]
    for key, tensor in before.items():
        path, _, leaf = key.partition(".weight") if ".weight" in key else (key, "", "")
        now = base.get(
            key,
            base.get(
                f"{path}.base_layer.weight{leaf}",
                base.get(f"{path.rpartition('.')[0]}.base_layer.{path.rpartition('.')[2]}"),
            ),
        )
        assert now is not None and torch.equal(now, tensor), key


@pytest.mark.parametrize("name", NAMES)
def test_gradients_through_layers_on_disk(name: str, tmp_path: Path) -> None:
    folder = save(made(name), tmp_path / "weights")
    there = adapted(halfbyte.quantize_model(empty(name), folder, dtype="fp32"), name)
    places = {"": "cpu", LAYERS[name]: "disk"}
    off = halfbyte.quantize_model(empty(name), folder, dtype="fp32", device_map=places, offload_folder=tmp_path / "off")
    away = adapted(off, name)
    wanted = gradients(there, name)
    for _ in range(2):
        got = gradients(away, name)
        assert set(got) == set(wanted) and all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_the_adapter_is_saved_and_read_by_plain_peft(tmp_path: Path) -> None:
    original = made("encoder")
    held = halfbyte.quantize_model(copy.deepcopy(original), dtype="fp32")
    plain = reference(original, held)
    model = adapted(held, "encoder", halfbyte.get_peft_model)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert quantised(held)
    assert (output(again, "encoder") - output(model, "encoder")).abs().max() <= 2e-5 * output(
        again, "encoder"
    ).abs().max()
