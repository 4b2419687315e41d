"""Prompts read into places: by the model's own forward, or by a tape, token beside token.

Why two ways: a forward dequantises the base for each call, which takes as long as some hundred tokens by a tape; a tape
gives a prompt the same bits whatever is read beside it; but a forward's logits are exact enough for a loss, and in 16
bits its products are faster for many tokens. `by_tape` is the policy.
Cost: a tape more, of tens of ms to write.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from halfbyte.data import collate
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.layers import loss, packing
from halfbyte.layers.decoding import llama
from halfbyte.layers.decoding.decoder import Decoder
from halfbyte.models import structure
from halfbyte.types import Batch, Model
from halfbyte.upstream.transformers import cache_argument

VECTORS = 64  # tokens that a tape reads at once
LONGEST = 512  # tokens of a prompt that a tape reads in bf16: of a longer one a forward's products are the faster ones
# What rounding embeddings to bf16 makes of the factor of a text's last token: 2^-9 over the root of 100 numbers.
_FACTOR_NOISE = 2e-4


def by_tape(decoder: Decoder, tokens: int, *, packed: bool) -> bool:
    """Whether a prompt of so many tokens is read by a tape: where a forward would take longer. `packed`: a forward
    reads it together with others."""
    return decoder.tape.isa == "avx2" or (tokens <= LONGEST and not packed)


class TapeReader:
    """Reads prompts by a tape of many vectors into the places of another. Raises linears.Unsupported."""

    def __init__(self, lm: Model, decoder: Decoder, factor: float = 1.0) -> None:
        self.lm, self.target = lm, decoder
        self.factor = factor
        adapters = decoder.tape.adapters
        if adapters is not None:
            adapters = replace(adapters, uses=torch.zeros(len(adapters.names), VECTORS))
        tokens = decoder.tape.max_tokens
        self.decoder = llama.decoder(lm, VECTORS, tokens, beside=decoder, reads=True, adapters=adapters)

    def read(self, jobs: Sequence[tuple[int, Sequence[int], int]]) -> None:
        """Of each job (place, tokens, start) the tokens from `start` on, of which those before are there."""
        flat = [(place, at, t) for place, tokens, start in jobs for at, t in enumerate(tokens) if at >= start]
        embedding = self.lm.get_input_embeddings()
        adapters, used = self.decoder.tape.adapters, self.target.tape.adapters
        for n in range(0, len(flat), VECTORS):
            places, positions, tokens = zip(*flat[n : n + VECTORS], strict=True)
            if adapters is not None and used is not None:
                adapters.uses[:, : len(places)] = used.uses[:, list(places)]
            self.decoder.read(embedding(torch.tensor(tokens)).float() * self.factor, positions, places)


@dataclass
class Prefilled:
    """Prompts after their forward: logits (n, V) and the embedding factor; of each layer keys and values (1, K, T, d),
    in which text i has the tokens [starts[i], starts[i] + lengths[i])."""

    logits: Tensor
    factor: float
    layers: list[tuple[Tensor, Tensor]]
    starts: list[int]
    lengths: list[int]

    def put(self, i: int, decoder: Decoder, place: int) -> None:
        """The cache of text i into a place."""
        start, n = self.starts[i], self.lengths[i]
        for number, (keys, values) in enumerate(self.layers):
            decoder.keys[number][place, :, :n] = keys[0, :, start : start + n]
            decoder.values[number][place, :, :n] = values[0, :, start : start + n]


def forward(
    lm: Model, prompts: Sequence[Sequence[int]], rows: Sequence[Example] = (), head: loss.Head | None = None,
    each: Callable[[Tensor, Batch], None] = lambda hidden, batch: None, before: Sequence[tuple[Tensor, Tensor]] = (),
    *, caches: bool = True,
) -> Prefilled:  # fmt: skip
    """Prompts, or the rows that begin with them, through the model's own forward, end to end without padding. `rows`,
    `head`, `each`: where rows are read; `each` gets the body's hidden states (T, D). `before`: keys and values (1, K,
    T, d) of each layer, of what comes before the one prompt. `caches`: whether keys and values are asked for."""
    from transformers import DynamicCache

    batch = collate.collate(rows or [Example(tuple(p), (IGNORED,) * len(p)) for p in prompts])
    starts = batch["cu_seq_lens_q"].tolist()
    ends = torch.tensor([start + len(prompt) - 1 for start, prompt in zip(starts, prompts, strict=False)])
    cache, module = DynamicCache(), structure.body(lm) if rows else lm
    for layer, (keys, values) in enumerate(before):
        cache.update(keys, values, layer)
    cached = before[0][0].shape[2] if before else 0
    inputs = packing.forward_inputs(lm, batch) | ({"use_cache": True, cache_argument(module): cache} if caches else {})
    inputs.pop("labels", None)
    if before:
        tokens = cached + len(prompts[0])
        inputs["attention_mask"] = torch.ones((1, tokens), dtype=torch.int64)
        inputs["position_ids"] = torch.arange(cached, tokens)[None]
    keeps = not rows and loss.keeps_some(lm)
    with _entering(structure.decoder_layers(structure.body(lm))[0]) as entered:
        logits = module(**inputs, **({"logits_to_keep": ends} if keeps else {}))[0][0]
    if rows and head is not None:
        each(logits, batch)
        logits = loss.head_logits(logits[ends], head)
    elif not keeps:
        logits = logits[ends]
    factor = 1.0
    if llama.enters_plainly(lm):
        factor = embedding_factor(lm.get_input_embeddings()(batch["input_ids"][0, ends]), entered[0][0, ends])
    lengths = [cached + len(p) for p in prompts] if not rows else [len(row.input_ids) for row in rows]
    pairs = [(layer.keys, layer.values) for layer in cache.layers] if caches else []
    return Prefilled(logits, factor, pairs, starts, lengths)


@contextmanager
def _entering(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What the first layer is handed in a forward: (1, T, D)."""
    entered: list[Tensor] = []
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        yield entered
    finally:
        hook.remove()


def embedding_factor(embedded: Tensor, entered: Tensor) -> float:
    """By how much a model multiplies its embeddings, as Gemma does: (N, D) as they are, and as the first layer has
    them. A model's factor is a number of their dtype, most often: then it is the same whatever the tokens are."""
    plain, scaled = embedded.double(), entered.double()
    factor = float((plain * scaled).sum() / plain.square().sum().clamp_min(1e-30))
    rounded = float(torch.tensor(factor, dtype=embedded.dtype))
    return rounded if abs(rounded - factor) <= _FACTOR_NOISE * abs(factor) else factor
