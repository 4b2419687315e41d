"""Mixtures of experts in few bits: stored, opened, and trained as plain transformers trains the dequantised weights.

The reference has no code of ours: transformers' eager experts on weights that numpy dequantised.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from halfbyte.adapters import targets
from halfbyte.errors import BaseModelError
from halfbyte.inference import quality
from halfbyte.quant import bnb as codec
from halfbyte.quant import experts, formats, loader
from tests import plain_peft, small_models
from tests.base.store.helpers import differing, opened
from tests.quant.test_dequantise import CODES
from tests.test_every_architecture import as_train

LONGCAT = ["longcat_flash"] if small_models.longcat_is_on_the_interface() else []
KINDS = ("mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss", "qwen2_moe", "glm4_moe", *LONGCAT)
ROUTERS = {
    "gpt_oss": "mlp.router.weight", "qwen2_moe": "mlp.shared_expert_gate.weight",
    "longcat_flash": "mlp.router.classifier.weight",
}  # fmt: skip
# Linear layers of whole blocks: upstream's dequantiser is wrong elsewhere, and tests run with it (tests/conftest.py).
_SHARED = {"moe_intermediate_size": 64, "intermediate_size": 128}
CHANGES: dict[str, dict[str, int]] = {
    "deepseek_v3": {**_SHARED, "q_lora_rank": 64, "kv_lora_rank": 64},
    "qwen2_moe": {**_SHARED, "shared_expert_intermediate_size": 64},
    "glm4_moe": _SHARED,
}
LENGTHS = (5, 40, 1, 23, 9)
TOLERANCE = 1e-5  # fp32: sums in another order


def saved(kind: str, folder: Path, *, fused: bool = False, **changes: Any) -> Path:
    """A checkpoint as transformers writes it, in shards; `fused`: under the model's own names, experts in stacks."""
    model = small_models.build(kind, **CHANGES.get(kind, {}) | changes)
    if fused:
        model.config.save_pretrained(folder)
        save_file(
            {n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
        )
    else:
        model.save_pretrained(folder, max_shard_size="150KB")
    return folder


def dequantised(weight: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A weight in fp64 from its codes and scales."""
    codes = weight.data.numpy()
    if getattr(weight, "SCB", None) is not None:
        return (codes.reshape(-1, shape[-1]) * (weight.SCB.numpy().astype(np.float64) / 127)[:, None]).reshape(shape)
    state, flat = weight.quant_state, codes.reshape(-1)
    values = np.array(CODES[state.quant_type])[np.stack([flat >> 4, flat & 15], 1).reshape(-1)]
    scales = state.absmax.numpy()
    if state.nested:
        outer = state.state2.absmax.numpy().astype(np.float64)[np.arange(len(scales)) // 256]
        scales = state.state2.code.numpy().astype(np.float64)[scales] * outer + float(state.offset)
    return (values * np.repeat(scales.astype(np.float64), 64)[: len(values)]).reshape(shape)


def reference(folder: Path, base: Any) -> Any:
    """Plain transformers with the weights that the base stands for."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    exact = dict(plain.named_parameters())
    for name, parameter in base.named_parameters():
        if not parameter.is_floating_point():
            wanted = exact[name]
            wanted.data = torch.from_numpy(dequantised(parameter, tuple(wanted.shape))).float()
    return plain.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_learns_what_its_dequantised_weights_learn(kind: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path)
    base = opened(folder, compute_dtype="fp32")
    assert base.origin.startswith("store ")
    held = {name: p for name, p in base.model.named_parameters() if ".experts." in name and "bias" not in name}
    exact = reference(folder, base.model)
    assert held and all(
        p.dtype == torch.uint8 and p.nbytes * 2 == exact.get_parameter(n).numel() for n, p in held.items()
    )
    names = targets.matched(exact, targets.auto_targets(exact))
    rows = plain_peft.texts(LENGTHS, small_models.VOCAB)
    loss, grads = plain_peft.learn(plain_peft.adapt(exact, names), rows)
    got_loss, got, _ = as_train(plain_peft.adapt(base.model, names), rows)
    assert abs(got_loss - loss) <= TOLERANCE * loss
    assert plain_peft.apart(got, grads) <= TOLERANCE


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "qwen2_moe"])
@pytest.mark.parametrize("settings", [{"type": "int8"}, {"type": "fp4"}, {"double_quant": False}], ids=str)
def test_every_format_holds_experts(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(kind, tmp_path)
    base = opened(folder, compute_dtype="fp32", **settings)
    exact = reference(folder, base.model)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        got, wanted = base.model(input_ids=ids).logits, exact(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    assert abs(base.resident_bytes - base.expected_bytes) <= 64
    on_disk = sum(path.stat().st_size for path in Path(base.origin.removeprefix("store ")).glob("*.safetensors"))
    codes = sum(p.nbytes for p in base.model.parameters())
    assert codes < on_disk < 1.4 * base.resident_bytes + 50_000  # headers begin on a page


@pytest.mark.parametrize(("kind", "fused"), [("mixtral", False), ("qwen3_moe", True), ("gpt_oss", False)])
def test_what_each_expert_has_lost_is_told(kind: str, fused: bool, tmp_path: Path) -> None:
    """An expert a tensor, all in one, and all in one that is (in, out); by numpy on the source and the codes."""
    folder = saved(kind, tmp_path, fused=fused)
    base = opened(folder, compute_dtype="fp32")
    assert base.store_spec is not None and base.store is not None
    found = quality.errors_of(base.store_spec, base.store)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stacks = {n: p for n, p in base.model.named_parameters() if ".experts." in n and not p.is_floating_point()}
    assert {n for n in found if ".experts." in n} == {f"{n}.{e}" for n, p in stacks.items() for e in range(len(p))}
    for name, held in stacks.items():
        source = plain.get_parameter(name).detach().double().numpy()
        difference = source - dequantised(held, source.shape)
        for e in range(len(source)):
            relative = np.linalg.norm(difference[e]) / np.linalg.norm(source[e])
            assert found[f"{name}.{e}"].relative == pytest.approx(relative, rel=1e-5)
            assert found[f"{name}.{e}"].worst == pytest.approx(np.abs(difference[e]).max(), rel=1e-5)
            assert quality.kind_of(f"{name}.{e}") == f"mlp.experts.{name.rpartition('.')[2]}.*"
    layers = [quality.layer_of(name) for name in found if quality.layer_of(name) is not None]
    assert layers == sorted(layers)


@pytest.mark.parametrize("kind", KINDS)
def test_routers_stay_as_they_are(kind: str, tmp_path: Path) -> None:
    base = opened(saved(kind, tmp_path), compute_dtype="bf16")
    names = [n for n, p in base.model.named_parameters() if n.endswith(ROUTERS.get(kind, "mlp.gate.weight"))]
    assert names and all(base.model.get_parameter(name).is_floating_point() for name in names)
    assert base.resident_bytes <= base.expected_bytes * 1.005  # a router that transformers keeps in fp32


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_every_form_of_a_checkpoint_gives_the_same_base(kind: str, tmp_path: Path) -> None:
    """One tensor for each expert, or all in one; through a store, or quantised while it is loaded."""
    single = opened(saved(kind, tmp_path / "a"), compute_dtype="bf16")
    fused = opened(saved(kind, tmp_path / "b", fused=True), compute_dtype="bf16")
    loaded = opened(tmp_path / "a", compute_dtype="bf16", use_store=False)
    assert fused.origin.startswith("store ") and not loaded.origin.startswith("store ")
    assert differing(single.model, fused.model) == []
    assert differing(single.model, loaded.model) == []


def test_a_checkpoint_with_every_expert_turned_is_turned_back(tmp_path: Path) -> None:
    """As Qwen3-VL's checkpoints hold them: transformers transposes where the shape says so."""
    from halfbyte.base.store import conversion
    from halfbyte.base.store.reading import SourceTensor

    source = SourceTensor("x", "BF16", (4, 64, 192), 4 * 64 * 192 * 2, tmp_path, 0)
    assert conversion.is_transposed("x", (source,), (4, 192, 64))
    assert not conversion.is_transposed("x", (source,), (4, 64, 192))


def test_experts_whose_matrices_share_blocks_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    folder = saved("qwen3_moe", tmp_path, moe_intermediate_size=20, hidden_size=40, head_dim=16)
    with pytest.raises(BaseModelError, match=r"\((20, 40|40, 20)\) is not whole blocks of 64") as caught:
        opened(folder)
    assert "quant.skip_modules=[experts]" in str(caught.value)


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path)
    shard = next(p for p in sorted(folder.glob("*.safetensors")) if any("experts.3.w2" in n for n in names_in(p)))
    tensors = load_file(shard)
    gone = next(name for name in tensors if "experts.3.w2" in name)
    del tensors[gone]
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"down_proj needs \(4, 64, 96\), and the checkpoint's 3 tensors"):
        opened(folder)


def names_in(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("kind", ["llama4_text", "jetmoe", *({"longcat_flash"} - {*LONGCAT})])
def test_experts_outside_the_interface_are_refused_and_can_stay_in_16_bits(kind: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path)
    with pytest.raises(BaseModelError, match=f"code of a {kind} computes with all its experts at once") as caught:
        opened(folder)
    advice = str(caught.value).partition("skip_modules=[")[2].partition("]")[0].split(",")
    base = opened(folder, compute_dtype="bf16", skip_modules=tuple(advice))
    assert codec.linears_4bit(base.model) and base.resident_bytes <= base.expected_bytes * 1.02 + 1000


def test_a_stack_is_copied_with_its_scales(tmp_path: Path) -> None:
    import copy

    model = opened(saved("qwen3_moe", tmp_path), compute_dtype="bf16").model
    again = copy.deepcopy(model)
    assert differing(model, again) == []
    ours, theirs = (dict(experts.stacks(each)) for each in (model, again))
    assert all(theirs[n].quant_state is not ours[n].quant_state and torch.equal(theirs[n][1], ours[n][1]) for n in ours)
    assert all(formats.of_module(stack.holder).name == "nf4" for stack in theirs.values())


def test_the_store_says_in_its_config_that_it_needs_our_reader(tmp_path: Path) -> None:
    base = opened(saved("qwen3_moe", tmp_path), compute_dtype="bf16")
    store = Path(base.origin.removeprefix("store "))
    assert "halfbyte_plain_linears_but" in json.loads((store / "config.json").read_text())["quantization_config"]
    assert any(
        name.endswith("experts.gate_up_proj.weight.absmax") for p in store.glob("*.safetensors") for name in names_in(p)
    )


NAMES = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")


def test_what_the_oldest_transformers_does_to_names_and_dtypes_does_no_harm() -> None:
    """5.10.1 takes a converter's first pattern that is in a name, and casts a weight, before it is quantised, to the
    dtype of the empty parameter."""
    quantisers = {}
    for stored in (False, True):
        model = small_models.build("mixtral")
        config = loader.OwnConfig({"type": "nf4"})
        quantisers[stored] = loader.OwnQuantizer(config, pre_quantized=stored)
        quantisers[stored]._process_model_before_weight_loading(model)
        stacks = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
        assert stacks and all(stack.dtype.is_floating_point is not stored for stack in stacks)
    mapping = get_model_conversion_mapping(model, None, quantisers[True])
    ours = [entry.source_patterns for entry in mapping if any("nested_absmax" in p for p in entry.source_patterns)]
    for stem in ("self_attn.q_proj.weight", "mlp.experts.gate_up_proj.weight", "mlp.experts.down_proj.weight"):
        for name in [f"model.layers.0.{stem}{suffix}" for suffix in NAMES]:
            first = next(hit for patterns in ours for pattern in patterns if (hit := re.search(pattern, name)))
            assert first.end() == len(name), name
