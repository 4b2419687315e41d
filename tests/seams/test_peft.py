"""What adapters.py and targets.py stand on in peft."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model, get_peft_model_state_dict
from peft import set_peft_model_state_dict as set_state
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.pipelines.base import SUPPORTED_PEFT_TASKS

from halfbyte.adapters import dropin
from halfbyte.layers import fuse
from tests import tiny

IDS = torch.arange(3, 13)[None]


def adapted(**values: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **values})
    return get_peft_model(tiny.model("llama"), config)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_an_instance_takes_our_class() -> None:
    model = adapted(init_lora_weights=False)
    assert type(model) is PeftModelForCausalLM
    wanted = logits(model)
    own = dropin.own_class(model)
    assert own is model and type(own) is dropin.PeftModelForCausalLM and isinstance(own, PeftModel)
    torch.testing.assert_close(logits(own), wanted, rtol=1e-4, atol=1e-5)  # fused: other roundings
    assert fuse.remove(own) > 0
    assert torch.equal(logits(own), wanted)
    assert type(copy.deepcopy(own)) is dropin.PeftModelForCausalLM


def test_an_adapted_model_without_its_adapter_is_the_base() -> None:
    model = dropin.own_class(adapted(init_lora_weights=False))
    with model.disable_adapter():
        bare = logits(model)
        torch.testing.assert_close(bare, logits(tiny.model("llama")), rtol=1e-4, atol=1e-5)
        fuse.remove(model)
        bare = logits(model)
    torch.testing.assert_close(bare, logits(tiny.model("llama")), rtol=0, atol=0)
    assert not torch.allclose(logits(model), bare)


def test_the_saved_names_are_those_that_are_set_back() -> None:
    first, second = adapted(init_lora_weights=False), adapted()
    state = get_peft_model_state_dict(first, save_embedding_layers=False)
    assert all(".default" not in name for name in state)
    result = set_state(second, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(first), logits(second))


def test_tensors_without_a_place_are_dropped_without_a_word() -> None:
    """Why `adapters.load` compares the names itself."""
    model = adapted()
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    extra = {name.replace("layers.0.", "layers.9."): tensor for name, tensor in state.items()}
    set_state(model, {**state, **extra})


def test_fused_experts_are_seen_by_the_conversion_of_the_config() -> None:
    config = MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, num_local_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    asked = LoraConfig(target_modules=["w1", "w3", "q_proj"])
    convert_peft_config_for_transformers(asked, model=model, conversions=None)
    assert set(asked.target_parameters) == {"gate_up_proj"} and set(asked.target_modules) == {"q_proj"}
    with pytest.raises(ValueError, match="without also targeting w3"):
        convert_peft_config_for_transformers(LoraConfig(target_modules=["w1"]), model=model, conversions=None)
    plain = LoraConfig(target_modules=["q_proj"])
    convert_peft_config_for_transformers(plain, model=tiny.model("llama"), conversions=None)
    assert not plain.target_parameters and set(plain.target_modules) == {"q_proj"}


def test_how_names_are_matched() -> None:
    config = LoraConfig(target_modules=["q_proj"], exclude_modules=["layers.1.self_attn.q_proj"])
    assert check_target_module_exists(config, "model.layers.0.self_attn.q_proj")
    assert not check_target_module_exists(config, "model.layers.1.self_attn.q_proj")
    assert not check_target_module_exists(config, "model.layers.0.self_attn.k_proj")
    assert get_pattern_key(["q_proj"], "model.layers.0.self_attn.q_proj") == "q_proj"


def test_adapters_and_saved_modules_are_found_by_type() -> None:
    model = adapted(modules_to_save=["lm_head"])
    assert sum(isinstance(m, BaseTunerLayer) for m in model.base_model.model.modules()) >= tiny.LAYERS
    assert [n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)] == [
        "lm_head"
    ]


def test_adapters_of_a_16_bit_base_are_fp32() -> None:
    model = get_peft_model(tiny.model("llama", dtype=torch.bfloat16), LoraConfig(target_modules=["q_proj"]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_module_to_save_is_a_copy_behind_the_bases_own() -> None:
    """`adapters/masters.py`: the copy is in the base's dtype, and the base's own is first among the parameters."""
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], trainable_token_indices=None)
    model = get_peft_model(tiny.model("llama", dtype=torch.bfloat16), config)
    assert model.get_base_model().dtype == torch.bfloat16
    wrapper = model.get_base_model().get_input_embeddings()
    copy = wrapper.modules_to_save["default"].weight
    assert next(wrapper.parameters()) is wrapper.original_module.weight is not copy
    assert copy.dtype == torch.bfloat16 and copy.requires_grad and not wrapper.original_module.weight.requires_grad


def test_trained_rows_are_cast_to_the_embedding_by_peft() -> None:
    model = get_peft_model(
        tiny.model("llama", dtype=torch.bfloat16), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4])
    )
    rows = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    assert [p.dtype for p in rows] == [torch.float32]
    assert model.get_base_model().get_input_embeddings()(torch.tensor([3, 9])).dtype == torch.bfloat16


def test_loraplus_makes_groups_of_two_rates() -> None:
    optimizer = create_loraplus_optimizer(
        adapted(), torch.optim.AdamW, loraplus_lr_ratio=4, loraplus_weight_decay=0.0, lr=0.1
    )
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {0.1, 0.4}


def test_a_missing_weight_is_a_warning(tmp_path: Path) -> None:
    """`adapters.load` turns it into an error by these words."""
    from safetensors.torch import load_file, save_file

    adapted().save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(tiny.model("llama"), str(tmp_path))


def test_signatures() -> None:
    assert "is_trainable" in inspect.signature(PeftModel.from_pretrained).parameters
    assert "save_embedding_layers" in inspect.signature(get_peft_model_state_dict).parameters


def test_pefts_layer_of_trained_rows_has_the_fields_that_the_fused_one_reads() -> None:
    """`layers/fuse.py`, and `proofs/setting.py`, which moves the indices for the moment of a proof."""
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[9, 4], task_type="CAUSAL_LM")
    model = get_peft_model(tiny.model("gemma3"), config)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for wrapper in (embedding, head):
        assert isinstance(wrapper, TrainableTokensWrapper) and isinstance(wrapper.token_adapter, TrainableTokensLayer)
    layer, tied = embedding.token_adapter, head.token_adapter
    assert layer.base_layer.weight is tied.base_layer.weight
    assert tied.tied_adapter is layer and layer.tied_adapter is None
    assert tied.token_indices is layer.token_indices and layer.token_indices == {"default": [9, 4]}
    assert tied.trainable_tokens_delta is layer.trainable_tokens_delta
    assert layer.active_adapters == ["default"] and not layer.disable_adapters and not layer.merged
    assert float(layer._get_embed_scale()) == tiny.HIDDEN**0.5
    assert layer.trainable_tokens_delta["default"].shape == (2, tiny.HIDDEN)


def test_torch_tells_of_the_part_that_pefts_model_is_built_on() -> None:
    """`dropin._adopt`: called when PEFT sets `base_model`, with the LoRA layers and their config in place."""
    seen: list[tuple[type, str, type, bool]] = []

    def hear(module: torch.nn.Module, name: str, part: torch.nn.Module | None) -> None:
        if isinstance(part, LoraModel):
            layers = any(isinstance(m, BaseTunerLayer) for m in part.model.modules())
            seen.append((type(module), name, type(part.peft_config["default"]), layers))

    handle = register_module_module_registration_hook(hear)
    try:
        adapted()
        get_peft_model(tiny.model("llama"), LoraConfig(target_modules=["q_proj"]))
    finally:
        handle.remove()
    assert seen == [(PeftModelForCausalLM, "base_model", LoraConfig, True), (PeftModel, "base_model", LoraConfig, True)]


def test_pefts_auto_class_asks_for_a_class_by_its_name() -> None:
    target = peft.AutoPeftModelForCausalLM._target_peft_class
    assert target is PeftModelForCausalLM and dropin.AutoPeftModelForCausalLM._target_peft_class is not target
    assert dropin.PeftModelForCausalLM.__name__ == target.__name__ == "PeftModelForCausalLM"
    assert target.__name__ in SUPPORTED_PEFT_TASKS["text-generation"]  # a pipeline looks for the name too


def test_trl_calls_pefts_own_function_and_makes_lora_bf16() -> None:
    pytest.importorskip("trl")
    for name in ("sft", "dpo"):
        trainer = importlib.util.find_spec(f"trl.trainer.{name}_trainer")
        source = Path(str(trainer and trainer.origin)).read_text(encoding="utf-8")
        assert "model = get_peft_model(model, peft_config" in source
        assert "param.data = param.data.to(torch.bfloat16)" in source
