"""Prompts read by the model's own forward, several end to end, and their caches put into the places of a tape; or read
by a tape of many vectors into those places, where its products are the faster ones (fp32).

Cost: a forward dequantises the base once for all that it reads; a tape never does, and reads what all texts begin with
once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from halfbyte.data import collate
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.inference import decode
from halfbyte.layers import loss, packing
from halfbyte.layers.decoding import llama
from halfbyte.models import structure

if TYPE_CHECKING:
    from torch import Tensor

    from halfbyte.layers.decoding.llama import Decoder
    from halfbyte.types import Batch, Model

VECTORS = 64  # tokens that a tape reads at once
_LEAST_SHARED = 4  # tokens


@dataclass
class Prefilled:
    """Prompts after their forward: logits (n, V) and embedding factor; of each layer keys and values (1, K, T, d), in
    which text i, whose prompt has lengths[i] tokens, has the tokens [starts[i], starts[i] + reach[i])."""

    logits: Tensor
    factor: float
    layers: list[tuple[Tensor, Tensor]]
    starts: list[int]
    lengths: list[int]
    reach: list[int]

    def put(self, i: int, made: Decoder, m: int) -> None:
        """The cache of text i into place m."""
        a, n = self.starts[i], self.reach[i]
        for number, (keys, values) in enumerate(self.layers):
            made.keys[number][m, :, :, :n] = keys[0, :, a : a + n].transpose(1, 2)
            made.values[number][m, :, :n] = values[0, :, a : a + n]


def read(
    lm: Model,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Example] = (),
    head: loss.Head | None = None,
    each: Callable[[Tensor, Batch], None] = lambda hidden, batch: None,
) -> Prefilled:
    """Prompts, or the rows that begin with them, through the model's own forward.

    Args:
        rows, head, each: where rows are read; `each` gets the body's hidden states (T, D).
    """
    from transformers import DynamicCache

    plain = [Example(tuple(p), (IGNORED,) * len(p), "", (), "") for p in prompts]
    batch = collate.collate(rows or plain)
    starts = batch["cu_seq_lens_q"].tolist()
    ends = torch.tensor([start + len(prompt) - 1 for start, prompt in zip(starts, prompts, strict=False)])
    cache, of = DynamicCache(), structure.body(lm) if rows else lm
    name = "cache" if "cache" in inspect.signature(of.forward).parameters else "past_key_values"
    options = {**packing.forward_inputs(lm, batch), "use_cache": True, name: cache}
    options.pop("labels", None)
    keeps = not rows and loss.keeps_some(lm)
    with decode.entering(decode.layers_of(lm)[0]) as entered:
        made = of(**options, **({"logits_to_keep": ends} if keeps else {}))[0][0]
    if rows and head is not None:
        each(made, batch)
        made = loss.head_logits(made[ends], head)
    elif not keeps:
        made = made[ends]
    last = batch["input_ids"][0, ends]
    factor = decode.embedding_factor(lm.get_input_embeddings()(last), entered[0][0, ends])
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    lengths = [len(prompt) for prompt in prompts]
    return Prefilled(made, factor, layers, starts, lengths, [len(row.input_ids) for row in rows] or lengths)


class Reader:
    """Texts read by a tape into the places of another, all of which have begun with the same `shared` tokens."""

    def __init__(self, lm: Model, of: Decoder, room: int, factor: float) -> None:
        """Raises linears.Unsupported."""
        self.lm, self.of, self.factor, self.shared = lm, of, factor, 0
        self.made = llama.decoder(lm, VECTORS, room, beside=of, reads=True)

    def read(self, texts: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor]:
        """Of each text (its place, its tokens) what the head reads of its tokens but the shared ones: (T, D) fp32."""
        flat = [(m, at, token) for m, ids in texts for at, token in enumerate(ids) if at >= self.shared]
        table, found = self.lm.get_input_embeddings(), []
        for first in range(0, len(flat), VECTORS):
            some = flat[first : first + VECTORS]
            places, positions, tokens = zip(*some, *[some[-1]] * (VECTORS - len(some)), strict=True)
            embedded = table(torch.tensor(tokens)).float() * self.factor
            found.append(self.made.read(embedded, positions, places)[: len(some)].clone())
        return list(torch.cat(found).split([len(ids) - self.shared for _, ids in texts]))

    def share(self, m: int, tokens: int) -> None:
        """From now on all texts begin with so many tokens of the text in place m. A place that is not in use must be
        left alone there."""
        if tokens < _LEAST_SHARED:
            return
        for keys, values in zip(self.of.keys, self.of.values, strict=True):
            keys[..., :tokens] = keys[m, ..., :tokens].clone()
            values[:, :, :tokens] = values[m, :, :tokens].clone()
        self.shared = tokens
