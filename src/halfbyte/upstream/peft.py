"""What differs between the versions of PEFT."""

from collections.abc import Callable
from typing import Any

from halfbyte.upstream.seam import Seam, fields_of

# What `layers/fuse.py` reads of a LoRA layer.
_READ = (
    "base_layer", "lora_A", "lora_B", "lora_dropout", "scaling", "active_adapters", "disable_adapters", "merged",
    "lora_variant", "lora_bias",
)  # fmt: skip


def convert_expert_names() -> Callable[..., None]:
    """What turns names of single experts in a LoraConfig, in place, into those of their stacks."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    return convert_peft_config_for_transformers


def loraplus() -> Callable[..., Any]:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer


def lora_fields() -> frozenset[str]:
    """The fields of LoraConfig."""
    return fields_of("peft.tuners.lora.config", "LoraConfig") | fields_of("peft.config", "PeftConfig")


def _has_what_is_read() -> bool:
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        model = torch.nn.Sequential(torch.nn.Linear(1, 1))
        layer = inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"]), model)[0]
    return all(hasattr(layer, name) for name in _READ)


def _experts_are_out_by_in() -> bool:
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=1, target_modules=[], target_parameters=["0.stack"])
    with torch.random.fork_rng(devices=[]):
        experts = torch.nn.Module()
        experts.stack, experts.is_transposed = torch.nn.Parameter(torch.zeros(2, 3, 5)), False
        layer = inject_adapter_in_model(config, torch.nn.Sequential(experts))[0]
    return tuple(layer.lora_A["default"].weight.shape) == (2, 5)


def _saves_biases_beside_lora() -> bool:
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    config = LoraConfig(r=1, target_modules=["0"], bias="lora_only")
    with torch.random.fork_rng(devices=[]):
        model: Any = get_peft_model(torch.nn.Sequential(torch.nn.Linear(1, 1)), config)
    return any(name.endswith("bias") for name in get_peft_model_state_dict(model))


LORA_LAYER = Seam(
    "peft", "LoRA layer with the fields that ours reads", "LoRA runs PEFT's own forward", _has_what_is_read
)
EXPERT_NAMES = Seam(
    "peft", "conversion of experts' names", "lora.target_modules does not know experts by the names of single ones",
    lambda: callable(convert_expert_names()),
)  # fmt: skip
EXPERT_LORA = Seam(
    "peft", "LoRA whose A takes the input of an expert's (out, in) matrix", "lora.target_parameters is refused",
    _experts_are_out_by_in,
)  # fmt: skip
LORAPLUS = Seam("peft", "LoRA+ optimiser", "train.loraplus_lr_ratio is refused", lambda: callable(loraplus()))
BIASES = Seam(
    "peft", "file of an adapter with the biases of its layers", "lora.bias lora_only is refused",
    _saves_biases_beside_lora,
)  # fmt: skip
SEAMS = (LORA_LAYER, EXPERT_NAMES, EXPERT_LORA, LORAPLUS, BIASES)
