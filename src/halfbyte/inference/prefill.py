"""Prompts read by the model's own forward, several end to end, and their caches put into the places of a tape.

Cost: a forward dequantises the base once for all that it reads.
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
from halfbyte.models import structure

if TYPE_CHECKING:
    from torch import Tensor

    from halfbyte.layers.decoding.llama import Decoder
    from halfbyte.types import Batch, Model


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
            made.keys[number][m, :, :n] = keys[0, :, a : a + n]
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
