"""Tiny random encoders as their checkpoints come: with a head of pretraining, and a tokenizer that joins pairs.

Use: `from tests import encoders`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests import tiny_run

_SIZES = {
    "vocab_size": tiny_run.VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128, "max_position_embeddings": 130, "initializer_range": 0.2, "pad_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForPreTraining", {"type_vocab_size": 2}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {"type_vocab_size": 1}),
    "xlm_roberta": ("XLMRobertaConfig", "XLMRobertaForMaskedLM", {"type_vocab_size": 1, "pad_token_id": 1}),
    "modernbert": (
        "ModernBertConfig", "ModernBertForMaskedLM",
        {
            "local_attention": 8, "layer_types": ["sliding_attention", "full_attention"], "bos_token_id": 1,
            "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "classifier_pooling": "mean",
        },
    ),
    "deberta": (
        "DebertaV2Config", "DebertaV2ForMaskedLM",
        {
            "type_vocab_size": 0, "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False, "pooler_dropout": 0.0,
        },
    ),
    "embeddinggemma": (
        "Gemma3TextConfig", "Gemma3ForCausalLM",
        {
            "use_bidirectional_attention": True, "sliding_window": 8, "head_dim": 16, "query_pre_attn_scalar": 16,
            "num_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"], "bos_token_id": 1,
        },
    ),
}  # fmt: skip
NAMES = tuple(_KINDS)


def model(name: str, seed: int = 0, **changes: Any) -> Any:
    """The whole class with its head of pretraining, in fp32."""
    kind, cls, more = _KINDS[name]
    config = getattr(transformers, kind)(**{**_SIZES, **more, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, cls)(config)
        for parameter in made.parameters():
            if parameter.dim() == 1:  # biases and norms off their 0 and 1: a lost one must show
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return made.eval()


def classifier(name: str, **changes: Any) -> Any:
    """The class for texts with that body, as a base of this kind is opened."""
    whole = model(name, **changes)
    body = whole.base_model_prefix
    built = transformers.AutoModelForSequenceClassification.from_config(whole.config).eval()
    getattr(built, body).load_state_dict(getattr(whole, body).state_dict(), strict=False)
    return built


def tokenizer() -> Any:
    """That of `tiny_run`, with marks around texts and types of their tokens."""
    made = copy.deepcopy(tiny_run.tokenizer()._tokenizer)
    special = [("<s>", 1), ("</s>", 2)]
    made.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=special
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=names, **tokens)


def checkpoint(folder: Path, name: str, **changes: Any) -> Path:
    model(name, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
