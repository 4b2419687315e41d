"""A toy architecture of Llama's kind, which transformers and halfbyte know nothing of: it norms queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.llama import modeling_llama as llama

from halfbyte.models.families import LLAMA, Family

# The line of `FAMILIES` that it needs.
FAMILY = {"toy_llama": Family(LLAMA, "Toy", qk_norms=True)}


class ToyConfig(LlamaConfig):
    model_type = "toy_llama"


class ToyAttention(llama.LlamaAttention):
    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.q_norm = llama.LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = llama.LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Any,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        cache: Any = None,
        **more: Any,
    ) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        q, k = llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        cache = cache if cache is not None else more.pop("past_key_values", None)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = llama.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, llama.eager_attention_forward
        )
        out, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **more)
        return self.o_proj(out.reshape(*shape[:-2], -1).contiguous()), weights


class ToyMLP(llama.LlamaMLP):
    pass


class ToyDecoderLayer(llama.LlamaDecoderLayer):
    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn, self.mlp = ToyAttention(config, layer_idx), ToyMLP(config)


class ToyModel(llama.LlamaModel):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.layers = torch.nn.ModuleList(ToyDecoderLayer(config, n) for n in range(config.num_hidden_layers))
        self.post_init()


class ToyForCausalLM(llama.LlamaForCausalLM):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.model = ToyModel(config)
        self.post_init()


def register() -> None:
    """Make it known to transformers."""
    AutoConfig.register("toy_llama", ToyConfig, exist_ok=True)
    AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)


def model(layers: int = 2, dtype: torch.dtype = torch.float32) -> ToyForCausalLM:
    """A random one, whose queries and keys are large enough that a missing norm would be seen."""
    torch.manual_seed(0)
    config = ToyConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    toy = ToyForCausalLM(config)
    for name, parameter in toy.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return toy.to(dtype)
