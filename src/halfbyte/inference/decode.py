"""The decoding loop: prompts through the model's own forward, then token after token through a tape.

Why: by the model's own forward a token moves ten times the bytes of a 4-bit base, and takes Python's time a tensor.
What: `Loop` is what transformers' `generate` calls in place of its own loop (`custom_generate`), so sampling,
penalties, stops and streams are its own. Its first token comes from the model's own forward. Before the second, the
tape computes the prompts' last tokens again, and its logits are compared with the model's: where they part by more
than rounding explains, or the model is not built like Llama, `Slower` says why, and the model's own loop is used.
Source: `GenerationMixin._sample`; the tolerance is derived at `tolerance`.
Cost: once a call, the tape (tens of ms) and one token for the proof.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from halfbyte.base import stream
from halfbyte.errors import BaseModelError
from halfbyte.layers.decoding import llama, reader
from halfbyte.layers.decoding.linears import Unsupported
from halfbyte.layers.decoding.tape import MAX_VECTORS
from halfbyte.models import structure

if TYPE_CHECKING:
    from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList, TextStreamer

    from halfbyte.types import Model

# Root mean square of what rounding to bf16 changes, relative to the number: 2^-8 / sqrt(3) at the lower end of a
# binade, half of it at the upper end; over numbers spread evenly by their logarithm 0.0016.
_ROUNDING = 0.0016
# Roundings that a layer's sum goes through in the model's own forward: both sums (2); the norm, twice, q, k, v, rotary,
# probabilities, their product, o (8); the norm, twice, gate, up, activation, product, down (7); the seven weights.
_ROUNDINGS_OF_A_LAYER = {torch.bfloat16: 24, torch.float32: 7}  # in fp32 those of the weights' levels alone
_SIGMAS = 4.0


class Slower(Exception):
    """Why these texts are left to the model's own loop."""


def tolerance(layers: int, dtype: torch.dtype, *, read: bool = False) -> float:
    """How far logits of the two paths may be apart: the norm of their difference over that of the logits about their
    mean.

    Both round in other places. Independent errors add by their squares; 4 standard deviations, since the errors of one
    token are not independent of each other. read: a tape has read the prompt, too, so that the keys and values which a
    token meets are not the same ones: their tokens have had as many roundings as its own, so twice as many count.
    """
    return _SIGMAS * _ROUNDING * math.sqrt((1 + read) * _ROUNDINGS_OF_A_LAYER.get(dtype, 24) * layers)


def apart(fast: Tensor, own: Tensor) -> float:
    """The largest over texts of what `tolerance` bounds; fast, own: (M, V)."""
    fast, own = fast.double(), own.double()
    spread = (own - own.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((fast - own).norm(dim=-1) / spread.clamp_min(1e-30)).max())


def prove(made: llama.Decoder, own: Tensor, texts: Tensor | Sequence[int], layers: int, *, read: bool = False) -> float:
    """`check` of the texts' last step; and that the largest logit is that of the whole head."""
    largest = made.logits.amax(1)
    fast = made.whole()
    if not torch.equal(largest, made.logits.amax(1)):
        raise Slower("its largest logit is not that of the whole head")
    return check(fast[texts], own, layers, read=read)


def check(fast: Tensor, own: Tensor, layers: int, *, read: bool = False) -> float:
    """How far apart logits (M, V) of the two paths are; raises Slower where that is too far."""
    found, allowed = apart(fast, own), tolerance(layers, own.dtype, read=read)
    if not found <= allowed:  # NaN too
        raise Slower(f"its logits are {found:.3g} apart from the model's own, where {allowed:.3g} are allowed")
    return found


def layers_of(lm: Model) -> list[nn.Module]:
    """Those of the text's decoder: beside it may be a tower for pictures, of more parameters."""
    try:
        return structure.decoder_layers(structure.body(structure.causal_lm(lm)))
    except BaseModelError as why:
        raise Slower(str(why)) from why


@contextmanager
def entering(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What the first layer is handed in a forward: (M, T, D)."""
    entered: list[Tensor] = []
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        yield entered
    finally:
        hook.remove()


def embedding_factor(plain: Tensor, entered: Tensor) -> float:
    """By how much a model multiplies its embeddings, as Gemma does: (M, D) as they are, and as the first layer has
    them."""
    plain, wanted = plain.float(), entered.float()
    return float((plain * wanted).sum() / plain.square().sum().clamp_min(1e-30))


@dataclass
class Kept:
    """What a conversation has been read already, by one adapter: its tokens, and of each layer their keys
    and values (1, K, T, d)."""

    ids: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def begins(self, ids: Sequence[int]) -> int:
        """How many tokens at the beginning of `ids` are read; the last is left, since its logits are wanted."""
        both = zip(self.ids, ids[:-1], strict=False)
        return next((n for n, (a, b) in enumerate(both) if a != b), min(len(self.ids), len(ids) - 1))

    def put(self, cache: DynamicCache, n: int) -> None:
        """The first n tokens into a cache of transformers."""
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(keys[:, :, :n], values[:, :, :n], layer)


class Loop:
    """For `generate(custom_generate=)`: greedy or sampled continuations of up to 16 texts, padded on the left.

    Args:
        kept: of one text: what was read before, and is not read again; afterwards what was read now.
    """

    def __init__(self, streamer: TextStreamer | None = None, kept: Kept | None = None) -> None:
        self.streamer, self.kept = streamer, kept  # `generate` passes its own streamer on to its own loops only
        self.apart = 0.0
        self.layers: list[nn.Module] = []

    def __call__(
        self,
        lm: Model,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **others: Tensor | None,
    ) -> Tensor:
        if generation_config.num_beams != 1 or generation_config.return_dict_in_generate:
            raise Slower("beams or a dictionary were asked for")
        self._check(lm, len(input_ids))
        mask = others.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        greedy = not generation_config.do_sample and not logits_processor
        made = self._decoder(lm, len(input_ids), int(stopping_criteria.max_length), largest=greedy)
        logits, embed = self._prefilled(made, lm, input_ids, mask)
        before, ids = mask.sum(1).tolist(), input_ids
        pad, unfinished = generation_config._pad_token_tensor, torch.ones(len(ids), dtype=torch.int64)
        while True:
            scores = logits_processor(ids, logits.float().clone())
            if generation_config.do_sample:
                chosen = torch.multinomial(torch.softmax(scores, -1), 1).squeeze(1)
            else:
                chosen = scores.argmax(-1)
            if pad is not None:
                chosen = chosen * unfinished + pad * (1 - unfinished)
            ids = torch.cat([ids, chosen[:, None]], -1)
            if self.streamer is not None:
                self.streamer.put(chosen)
            unfinished = unfinished & ~stopping_criteria(ids, None)
            if not unfinished.any():
                break
            logits = self._step(made, embed(chosen), before)
            before = [n + 1 for n in before]
        if self.streamer is not None:
            self.streamer.end()
        if self.kept is not None:  # the last token was not read
            self.kept.ids, self.kept.keys, self.kept.values = ids[0, :-1].tolist(), made.keys, made.values
        return ids

    def _check(self, lm: Model, texts: int) -> None:
        if texts > MAX_VECTORS:
            raise Slower(f"more than {MAX_VECTORS} texts at once")
        self.layers = layers_of(lm)

    def _decoder(self, lm: Model, texts: int, room: int, *, largest: bool) -> llama.Decoder:
        try:
            return llama.decoder(lm, texts, room, largest=largest and stream.of(self.layers[0]) is None)
        except Unsupported as why:
            raise Slower(str(why)) from why

    def _step(self, made: llama.Decoder, embedded: Tensor, before: list[int]) -> Tensor:
        return made.step(embedded, before, stream.of(self.layers[0]))

    def _prefilled(
        self, made: llama.Decoder, lm: Model, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits after the prompts, and how to embed; the caches are filled and the proof is done."""
        from transformers import DynamicCache

        cache = DynamicCache()
        name = "cache" if "cache" in inspect.signature(lm.forward).parameters else "past_key_values"
        positions, n = (mask.cumsum(-1) - 1).clamp_min(0), 0
        if self.kept is not None and (n := self.kept.begins(ids[0].tolist())):
            self.kept.put(cache, n)
        more = {"use_cache": True, "logits_to_keep": 1, name: cache}
        with entering(self.layers[0]) as entered:
            own = lm(ids[:, n:], attention_mask=mask, position_ids=positions[:, n:], **more)
        logits, table, last = own.logits[:, -1], lm.get_input_embeddings(), ids[:, -1]
        factor = embedding_factor(table(last), entered[0][:, -1])

        def embed(tokens: Tensor) -> Tensor:
            return table(tokens).float() * factor if factor != 1.0 else table(tokens)

        lengths = mask.sum(1).tolist()
        for number, layer in enumerate(cache.layers):
            made.fill(number, layer.keys, layer.values, lengths)
        read = self._read(
            made, lm, [row[-length:-1] for row, length in zip(ids.tolist(), lengths, strict=True)], n, factor
        )
        self._step(made, embed(last), [length - 1 for length in lengths])
        # Of texts that are not padded: with a mask the model's own attention rounds more (docs/log).
        whole = mask.all(1)
        self.apart = prove(made, logits[whole], whole, len(self.layers), read=read)
        return made.capped(), embed

    def _read(self, made: llama.Decoder, lm: Model, texts: list[list[int]], start: int, factor: float) -> bool:
        """Texts from token `start` on by a tape, as `serve` does, in place of what a forward has filled in; whether
        there were any."""
        shorter = [(m, text) for m, text in enumerate(texts) if reader.worth(made, len(text) + 1)]
        if not shorter or stream.of(self.layers[0]) is not None:
            return False
        reader.Reader(lm, made, factor).read(shorter, start)
        return True
