"""Prompts read by a tape of many vectors into the places of another, token beside token.

Why: a forward dequantises the base for each prompt, which takes as long as some hundred tokens by a tape; and a prompt
has the same bits whatever is read beside it, so several can be read together.
Cost: a tape more, of tens of milliseconds to write; what all texts begin with is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from halfbyte.layers.decoding import llama

if TYPE_CHECKING:
    from torch import Tensor

    from halfbyte.layers.decoding.llama import Decoder
    from halfbyte.types import Model

VECTORS = 64  # tokens that a tape reads at once
LONGEST = 512  # tokens of a prompt that a tape reads in bf16: of a longer one a forward's products are the faster ones
LEAST_SHARED = 4  # tokens


def worth(of: Decoder, tokens: int) -> bool:
    """Whether a prompt of so many tokens is read by a tape: where a forward would take longer."""
    return of.tape.isa == "avx2" or tokens <= LONGEST


def same(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Reader:
    """Texts read by a tape into the places of another, all of which have begun with the same `shared` tokens."""

    def __init__(self, lm: Model, of: Decoder, factor: float = 1.0) -> None:
        """Raises linears.Unsupported."""
        self.lm, self.of, self.factor, self.shared = lm, of, factor, 0
        adapters = of.tape.adapters
        if adapters is not None:
            adapters = replace(adapters, uses=torch.zeros(len(adapters.names), VECTORS))
        self.made = llama.decoder(lm, VECTORS, of.tape.max_tokens, beside=of, reads=True, adapters=adapters)

    def read(self, texts: Sequence[tuple[int, Sequence[int]]], start: int = 0, *, first: bool = False) -> list[Tensor]:
        """Of each text (its place, its tokens) what the head reads of its tokens but the shared ones, and those before
        `start`, which are there, but for the `first` token where that is said: (T, D) fp32. It has the same bits
        whatever is read beside it."""
        start = max(start, self.shared)
        each = [[at for at in range(len(ids)) if at >= start or (first and at == 0)] for _, ids in texts]
        flat = [(m, at, ids[at]) for (m, ids), own in zip(texts, each, strict=True) for at in own]
        table, found = self.lm.get_input_embeddings(), [torch.zeros(0, self.made.hidden.shape[1])]
        for n in range(0, len(flat), VECTORS):
            places, positions, tokens = zip(*flat[n : n + VECTORS], strict=True)
            embedded = table(torch.tensor(tokens)).float() * self.factor
            if (adapters := self.made.tape.adapters) is not None and self.of.tape.adapters is not None:
                adapters.uses[:, : len(places)] = self.of.tape.adapters.uses[:, list(places)]
            found.append(self.made.read(embedded, positions, places).clone())
        return list(torch.cat(found).split([len(own) for own in each]))

    def share(self, m: int, tokens: int) -> None:
        """From now on all texts begin with so many tokens of the text in place m. A place that is not in use must be
        left alone there."""
        if tokens < LEAST_SHARED:
            return
        for keys, values in zip(self.of.keys, self.of.values, strict=True):
            keys[:, :, :tokens] = keys[m, :, :tokens].clone()
            values[:, :, :tokens] = values[m, :, :tokens].clone()
        self.shared = tokens
