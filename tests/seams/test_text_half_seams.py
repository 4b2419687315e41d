"""What text halves of checkpoints with towers stand on in transformers: registries, and a body that may be moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import (
    WeightRenaming,
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from halfbyte.models import text_half
from tests import small_models


class MovedConfig(LlamaConfig):
    pass


class MovedForCausalLM(LlamaForCausalLM):
    config_class = MovedConfig
    _tied_weights_keys = {"lm_head.weight": "model.inner.embed_tokens.weight"}  # noqa: RUF012

    def post_init(self) -> None:
        holder = nn.Module()
        holder.inner, holder.forward = self.model, self.model.forward
        holder.embed_tokens = self.model.embed_tokens
        self.model = holder
        super().post_init()


def test_a_class_of_ones_own_opens_by_its_config_and_renames() -> None:
    AutoModelForCausalLM.register(MovedConfig, MovedForCausalLM, exist_ok=True)
    renaming = WeightRenaming(source_patterns=r"^old\.", target_patterns="model.inner.")
    register_checkpoint_conversion_mapping("MovedForCausalLM", [renaming], overwrite=True)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    model = AutoModelForCausalLM.from_config(MovedConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    assert type(model) is MovedForCausalLM
    assert model.lm_head.weight is model.model.inner.embed_tokens.weight
    assert [each.source_patterns for each in get_model_conversion_mapping(model, add_legacy=False)]
    assert model(input_ids=torch.arange(4)[None]).logits.shape == (1, 4, 32)


@pytest.mark.parametrize("kind", [*small_models.WHOLE, "gemma3n", "qwen2_vl", "llava", "idefics3"])
def test_a_tied_head_says_where_the_language_model_is(kind: str) -> None:
    whole = text_half.whole_class(small_models.config(kind))
    assert whole in AutoModelForMultimodalLM._model_mapping.values()
    assert text_half._place(whole) in ("language_model", "text_model")


def test_renamings_of_a_type_are_a_copy() -> None:
    first, second = (get_checkpoint_conversion_mapping("llava") for _ in range(2))
    assert first and first[0] is not second[0]
