"""Text of a grammar (calls of tools, JSON of a schema): which tokens may come next.

Source: llguidance, of the extra `[serve]`.
Cost: a table of a tokenizer's tokens, about a second, once for each tokenizer; then some 50 microseconds a token.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch

from halfbyte.errors import DataError
from halfbyte.types import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from torch import Tensor

    from halfbyte.serving.models import ServedModel

_LOCK = Lock()
_TABLES: WeakKeyDictionary[Tokenizer, dict[int, LLTokenizer]] = WeakKeyDictionary()


class Grammar:
    """A `writing.sampling.Constraint`: one text's way through a grammar in llguidance's Lark syntax."""

    def __init__(self, table: LLTokenizer, grammar: str) -> None:
        from llguidance import LLMatcher

        self._table, self._grammar = table, grammar
        self._matcher = LLMatcher(table, grammar, log_level=0)
        if self._matcher.is_error():
            raise DataError(f"the schema cannot be followed: {self._matcher.get_error()[:300]}")

    def copy(self) -> Grammar:
        return Grammar(self._table, self._grammar)

    def allowed(self, size: int) -> Tensor:
        """Which of so many tokens may come next: (V,) bool."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        flags = np.unpackbits(bits, bitorder="little").astype(bool)[:size]
        allowed = torch.zeros(size, dtype=torch.bool)
        allowed[: len(flags)] = torch.from_numpy(flags)
        return allowed

    def take(self, token: int) -> bool:
        """Go on by a token; whether the text is whole."""
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"token {token} was not allowed: {self._matcher.get_error()}")
        return bool(self._matcher.is_stopped())


def table_of(model: ServedModel, vocabulary: int) -> LLTokenizer:
    """The tokens of a model's tokenizer as llguidance wants them."""
    from llguidance.hf import from_tokenizer

    with _LOCK:
        tables = _TABLES.setdefault(model.tokenizer, {})
        if vocabulary not in tables:
            if not model.tokenizer.is_fast:
                raise DataError("the tokenizer has no table of its tokens: no grammar can be followed.")
            tables[vocabulary] = from_tokenizer(model.tokenizer, n_vocab=vocabulary, eos_token=sorted(model.stop_ids))
        return tables[vocabulary]


def of(model: ServedModel, vocabulary: int, lark: str) -> Grammar:
    """Raises DataError: what is wrong with a schema in it."""
    return Grammar(table_of(model, vocabulary), lark)
