"""`lora.target_parameters` on tiny mixtures: what is adapted, what is refused, and files that plain PEFT reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import halfbyte
from halfbyte.adapters import lora as adapters
from halfbyte.adapters import targets
from halfbyte.errors import AdapterError, RecipeError
from halfbyte.models.structure import meta_model
from halfbyte.quant.stack import ExpertStack
from halfbyte.recipe.file import recipe_from
from halfbyte.recipe.schema import Lora, Quant
from halfbyte.upstream.peft import EXPERT_LORA
from tests import plain_peft, small_models
from tests.layers.experts.stacks import dequantised, quantised

pytestmark = pytest.mark.skipif(bool(EXPERT_LORA.reason), reason=EXPERT_LORA.reason)
KINDS = ("mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss")
BOTH = ("gate_up_proj", "down_proj")
QUANTS = {"nf4": Quant(), "int8": Quant(type="int8")}


def asked(**changes: Any) -> Lora:
    return Lora(**{"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "target_parameters": BOTH, **changes})


def base(kind: str, quant: str = "nf4") -> Any:
    """A mixture with its experts in few bits, computing in fp32."""
    return quantised(small_models.build(kind), QUANTS[quant])


def adapted(model: Any, recipe: Lora) -> Any:
    targets, _ = adapters.choose_targets(model, recipe)
    model = adapters.add(model, recipe, targets, seed=0)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    return model.train()


def learned(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of a row of 13 tokens, and all gradients of their sum of squares."""
    logits = model(input_ids=plain_peft.texts((13,), small_models.VOCAB)[0][None], use_cache=False).logits
    logits.square().sum().backward()
    return logits.detach(), plain_peft.gradients(model)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_over_few_bits_it_is_the_same_in_plain_peft_on_plain_weights(
    kind: str, quant: str, tmp_path: Path
) -> None:
    recipe = asked(use_rslora=True, rank_pattern={"gate_up_proj": 3}, alpha_pattern={"down_proj": 5})
    ours = adapted(base(kind, quant), recipe)
    assert any(isinstance(p, ExpertStack) for p in ours.parameters())
    adapters.save(ours, tmp_path / "adapter", base_id="tiny", revision=None)
    logits, grads = learned(ours)
    plain = dequantised(base(kind, quant))
    plain = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"), is_trainable=True).train()
    own, wanted = learned(plain)
    assert float((logits - own).norm() / own.norm()) < 1e-5
    assert plain_peft.apart(grads, wanted) < 1e-5
    assert sum("experts" in name for name in grads) == 4 * (1 if kind == "deepseek_v3" else 2)


def test_plain_pefts_file_is_the_same_over_few_bits(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=list(BOTH), init_lora_weights=False)
    plain = peft.get_peft_model(dequantised(base("olmoe")), config)
    plain.save_pretrained(tmp_path)
    logits, _ = learned(plain)
    ours = adapters.load(base("olmoe"), tmp_path)
    ids = plain_peft.texts((13,), small_models.VOCAB)[0][None]
    assert float((ours(input_ids=ids).logits - logits).norm() / logits.norm()) < 1e-5
    again = adapters.load(base("olmoe"), tmp_path, trainable=True)
    adapters.save(again, tmp_path / "again", base_id="tiny", revision=None)
    assert (tmp_path / "again" / "adapter_model.safetensors").stat().st_size > 0
    fresh = adapted(base("olmoe"), asked(target_modules=["q_proj"], lora_alpha=8))
    adapters.start_from(fresh, tmp_path)
    assert float((fresh.eval()(input_ids=ids).logits - logits).norm() / logits.norm()) < 1e-5


def test_wrappers_are_nested_as_in_plain_peft_over_few_bits() -> None:
    model = adapted(base("mixtral"), asked())
    outer = model.base_model.model.model.layers[0].mlp.experts
    assert (outer.parameter_name, outer.base_layer.parameter_name) == ("down_proj", "gate_up_proj")


def test_adapters_on_16_bit_experts_are_fp32() -> None:
    model = adapted(small_models.build("mixtral").bfloat16(), asked())
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32} and any("experts" in name for name in trained)


def test_experts_alone() -> None:
    model = small_models.build("olmoe")
    targets, hit = adapters.choose_targets(model, asked(target_modules=(), target_parameters=("down_proj",)))
    assert targets.names == () and len(hit) == 2 and all(name.endswith("experts.down_proj") for name in hit)
    made = adapters.add(model, asked(target_modules=(), target_parameters=("down_proj",)), targets, seed=0)
    assert adapters.summary(made).startswith("down_proj x2; ")


def test_the_summary_counts_weights_and_not_bytes() -> None:
    few, plain = (adapters.summary(adapted(m, asked())) for m in (base("mixtral"), small_models.build("mixtral")))
    assert few == plain and "gate_up_proj x2" in few


def test_what_the_choice_does_with_experts_is_said() -> None:
    model = small_models.build("qwen3_moe")
    for chosen in ("auto", "all-linear"):
        targets, _ = adapters.choose_targets(model, Lora(target_modules=chosen))
        assert "its experts get none: lora.target_parameters: [gate_up_proj, down_proj]" in targets.reason
    targets, _ = adapters.choose_targets(model, asked(target_parameters=("down_proj",)))
    assert targets.reason.endswith("; and of the experts down_proj")
    assert "experts" not in adapters.choose_targets(small_models.build("llama"), Lora())[0].reason


@pytest.mark.parametrize(
    ("kind", "names", "said"),
    [
        ("llama4_text", ["gate_up_proj"], "Llama4TextExperts, whose file does not use transformers' experts interface"),
        ("jetmoe", ["input_linear.weight"], "JetMoeParallelExperts, whose file does not use"),
        ("llama", ["gate_up_proj"], "no parameter of llama ends in 'gate_up_proj'"),
        ("mixtral", ["gate_up"], r"no parameter of mixtral ends in 'gate_up' \(near: gate_up_proj\)"),
        ("mixtral", ["mlp.gate.weight"], "gate.weight is no stack of experts"),
        ("mixtral", ["q_proj.weight"], "q_proj.weight is no stack of experts"),
        ("gpt_oss", ["down_proj_bias"], "down_proj_bias is no stack of experts"),
    ],
)  # fmt: skip
def test_what_cannot_be_adapted_is_refused_by_name(kind: str, names: list[str], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        targets.matched_stacks(meta_model(small_models.config(kind)), names)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("lora_dropout", 0.05, "lora.lora_dropout 0.05 cannot be had with lora.target_parameters"),
        ("use_dora", True, "lora.use_dora is not for lora.target_parameters"),
        ("lora_bias", True, "lora.lora_bias is not for lora.target_parameters"),
        ("init_lora_weights", "orthogonal", "orthogonal is not for lora.target_parameters"),
        ("layers_to_transform", [0], "lora.layers_to_transform is not read for lora.target_parameters"),
    ],
)
def test_settings_that_peft_has_none_of_are_refused_before_anything_is_read(field: str, value: Any, said: str) -> None:
    lora = {"target_parameters": ["down_proj"], "lora_dropout": 0.0, field: value}
    with pytest.raises(RecipeError, match=said):
        recipe_from("nowhere", "nowhere.jsonl", [f"lora.{name}={json.dumps(given)}" for name, given in lora.items()])


def test_names_of_single_experts_lead_to_the_right_field() -> None:
    with pytest.raises(AdapterError) as raised:
        adapters.choose_targets(small_models.build("mixtral"), Lora(target_modules=["w1", "w3"]))
    assert "lora.target_parameters: [gate_up_proj, down_proj]" in str(raised.value)


def test_merging_into_few_bits_is_refused_and_several_adapters_at_once() -> None:
    model = adapted(base("mixtral"), asked())
    with pytest.raises(AdapterError, match="cannot be merged into quantised experts"):
        model.merge_adapter()
    with model.disable_adapter(), torch.no_grad():
        off = model(input_ids=torch.arange(5)[None]).logits
    assert torch.allclose(off, dequantised(base("mixtral"))(input_ids=torch.arange(5)[None]).logits, atol=1e-5)
    model.add_adapter("other", halfbyte.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=list(BOTH)))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(AdapterError, match="several adapters"):
        model(input_ids=torch.arange(5)[None])
