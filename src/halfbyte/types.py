"""Names of the values that pass between rooms, mostly for annotations.

mypy reads torch and transformers as Any here, so these names are for readers first. Importing them loads neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Model: TypeAlias = "PreTrainedModel"
"""A causal LM of transformers, or PEFT's model around one."""
Config: TypeAlias = "PreTrainedConfig"
Tokenizer: TypeAlias = "PreTrainedTokenizerBase"

Value: TypeAlias = Any
"""Of a field, as JSON or YAML has it."""
Document: TypeAlias = dict[str, Value]
"""A JSON object, as it is read or printed."""
ConfigFile: TypeAlias = Mapping[str, Value]
"""The object in a config.json, as it is read and not changed."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, whether it is as it should be, and what was seen."""

    what: str
    ok: bool
    seen: str


class Batch(TypedDict, total=False):
    """One micro-batch, its examples laid end to end: T tokens, n texts, K labelled tokens (`data.collate`)."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T), from 0 in each text
    labels: Tensor  # (1, T), not shifted
    cu_seq_lens_q: Tensor  # (n + 1,) int32: where each text begins, and T
    cu_seq_lens_k: Tensor
    max_length_q: int  # tokens of the longest text
    max_length_k: int
    keep: Tensor  # (K,) positions whose next token is labelled
    targets: Tensor  # (K,) the labels
    token_types: Tensor  # (1, T) int64: 0 in the first text of a pair, 1 in the second
    beginnings: Tensor  # (T,) int64: a hash of a text's tokens up to each one
    # where texts share their beginnings (`data.prefixes`): S segments, each before what follows it; `cu_seq_lens_q` is
    # (S + 1,), the lengths are those of the longest text still
    levels: Tensor  # (S,) how many segments each one follows
    counts: Tensor  # (K,) fp32: how many texts have this label, or what it counts for in all of them together
    label_weights: Tensor  # fp32: what each text's labels count for, one text after another
    label_of: Tensor  # the labels of each text by their place among the K, one text after another
    label_starts: Tensor  # (n + 1,) where each text's begin in `label_of`
    text_lengths: Tensor  # (n,) tokens of each text
    sharers: Tensor  # (T,) how many texts have this token
    # what methods add to it (`objectives/`)
    reference: Tensor  # (n,) what the reference gives the answer of each text: log p
    rows: Tensor  # (4, L) what is said of each label's row (`objectives/grpo.py`)
    answers: Tensor  # bool, of each text's labels, one after another: whether it is the answer's
    desirable: Tensor  # (n,) bool: whether a text's answer is a good one
    step: Mapping[Value, Value]  # what a loss must know of its whole step
    row_numbers: tuple[int, ...]
    row_texts: list[int]  # how many of the n texts each row is
    watched: Document  # what it says beside itself: by name (sum, what it is of)
