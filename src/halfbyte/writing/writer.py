"""Writes texts side by side by a tape: `insert` reads prompts, each `step` gives every text its next token.

Why: by the model's own forward a token moves ten times the bytes of a 4-bit base; by a tape it reads the base once for
all texts, whatever adapter each has. A text has the same bits whatever is written beside it.
What: the one writer of `generate`, `chat`, `eval` and `serve`. Where a prompt is longer than those that were proven for
its adapter, the model's own forward reads it too, and the tape's logits after it are compared with the model's. Where
they part by more than rounding explains, `FastPathUnavailable` says why, before a token is written (`plain.py`).
Where every text takes its likeliest token, a step uses the head in 8 bits, which gives the same (`decoding/head.py`).
Of a row in fp32 the forward shows how far the model itself would write what is expected: that is taken at once
(speculative decoding, arXiv:2211.17192, whose draft it is). A model with recurrent layers has its prompts read by a
tape, all of them: a forward leaves the states behind its last token alone.
Source: the interface is that of mlx-lm's `BatchGenerator`; the tolerance is derived at `tolerance`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from halfbyte.base import stream
from halfbyte.errors import BaseModelError
from halfbyte.layers import loss, packing
from halfbyte.layers.decoding.decoder import Decoder
from halfbyte.layers.decoding.linears import Unsupported
from halfbyte.models import structure
from halfbyte.proofs import closeness
from halfbyte.types import Batch, Model
from halfbyte.writing import plain, prefill
from halfbyte.writing.places import CachePlaces, FastPathUnavailable
from halfbyte.writing.text import Text, TextWriter, by_prompt, same_beginning

# Root mean square of what rounding to bf16 changes, relative to the number: 2^-8 / sqrt(3) at the lower end of a
# binade, half of it at the upper end; over numbers spread evenly by their logarithm 0.0016.
_ROUNDING = 0.0016
# Roundings that a layer's sum goes through in the model's own forward: both sums (2); the norm, twice, q, k, v, rotary,
# probabilities, their product, o (8); the norm, twice, gate, up, activation, product, down (7); the seven weights.
_ROUNDINGS_OF_A_LAYER = {torch.bfloat16: 24, torch.float32: 7}  # in fp32 those of the weights' levels alone
_LOGITS_AT_ONCE = 64  # tokens
# In which one of several adapters is active, or none.
Using = Callable[[str | None], AbstractContextManager[None]]


def tolerance(layers: int, dtype: torch.dtype, *, read: bool = False) -> float:
    """How far logits of the two ways may be apart: the norm of their difference over that of the logits about their
    mean.

    Both round in other places. Independent errors add by their squares; 4 standard deviations, since the errors of one
    token are not independent of each other. read: a tape has read the prompt, too, so that the keys and values which a
    token meets are not the same ones: their tokens have had as many roundings as its own, so twice as many count.
    """
    roundings = (1 + read) * _ROUNDINGS_OF_A_LAYER.get(dtype, 24) * layers
    return closeness.accumulated_rounding(_ROUNDING, roundings, margin=4.0)


def check(fast: Tensor, own: Tensor, layers: int, *, read: bool = False) -> float:
    """How far apart logits (M, V) of the two ways are; raises FastPathUnavailable where that is too far."""
    apart = float(closeness.row_distances(closeness.centred(fast), closeness.centred(own)).max())
    allowed = tolerance(layers, own.dtype, read=read)
    if not apart <= allowed:
        raise FastPathUnavailable(
            f"the tape's logits are {apart:.3g} apart from the model's own, where {allowed:.3g} are allowed"
        )
    return apart


def layers_of(lm: Model) -> list[nn.Module]:
    """Those of the text's decoder: beside it may be a tower for pictures, of more parameters."""
    try:
        return structure.decoder_layers(structure.body(structure.causal_lm(lm)))
    except BaseModelError as why:
        raise FastPathUnavailable(str(why)) from why


class Writer(TextWriter):
    """Raises FastPathUnavailable where the model cannot be written as a tape.

    Args:
        places: most texts at once. max_length: tokens of a text, its prompt included.
        adapters: PEFT's names, one of which each text uses; None: all use what is active. using: makes one active.
        rough: texts are greedy, most of them, so the head may be used in 8 bits.
        forward_tokens: of prompts that are inserted together, so many go through one forward; or one longer prompt.
        exact: a text's bits do not depend on what was read before it. Else what a forward has read is used again, too,
            as it is needed for a long conversation; then there is one place.
    """

    def __init__(
        self, model: Model, places: int, max_length: int, *, adapters: Sequence[str] | None = None,
        using: Using = lambda adapter: nullcontext(), rough: bool = True, exact: bool = True,
        forward_tokens: int = 2048,
    ) -> None:  # fmt: skip
        self.lm, self.using = structure.causal_lm(model), using
        self.forward_tokens, self.exact = forward_tokens, exact
        self.layers = layers_of(self.lm)
        self.embedding = self.lm.get_input_embeddings()
        if adapters is not None and type(self.embedding) is not nn.Embedding:
            raise FastPathUnavailable(f"an adapter changes the embedding ({type(self.embedding).__name__})")
        self.streamed = stream.before_layers(self.layers[0])
        self.places = CachePlaces(self.lm, places, max_length, adapters, rough=rough and self.streamed is None)
        if self.places.recurrent and self.streamed is not None:
            raise FastPathUnavailable("recurrent layers of a base that is streamed")
        self.packs = packing.installed(self.lm) == "cu_seq_lens"
        self.factor = 1.0
        self.proven: dict[str | None, int] = {}
        self.apart = 0.0
        """How far the logits were apart in the last proof."""
        self._reader: prefill.TapeReader | None = None

    @property
    def free(self) -> int:
        return self.places.texts.count(None)

    # ----------------------------------------------------------------- reading
    def insert(self, texts: Sequence[Text], *, packed: bool = False) -> None:
        """packed: prompts go through as few forwards as may be, where those are faster than a tape; then first tokens
        are chosen from the forward's logits, and rows get their losses. Raises FastPathUnavailable: the tape is not
        right; none of the texts is written."""
        waiting = list(texts)
        try:
            while waiting:
                count = self.together(waiting, packed=packed)
                self._read(waiting[:count], packed=packed)
                waiting = waiting[count:]
        except FastPathUnavailable:
            for text in texts:
                self.remove(text)
            raise

    def together(self, texts: Sequence[Text], *, packed: bool) -> int:
        """How many of the first of these are read together: as many as go through one forward, where one is needed."""
        tokens = count = 0
        for text, *others in by_prompt(texts):
            read = text.row.input_ids if text.row else text.prompt
            more = 0 if text.row is None and self.by_tape(text, packed=packed) else len(read)
            if tokens and more and (not self.packs or tokens + more > self.forward_tokens):
                break
            tokens, count = tokens + more, count + 1 + len(others)
        return count

    def by_tape(self, text: Text, *, packed: bool) -> bool:
        if self.places.recurrent:
            return True
        tape = prefill.by_tape(self.places.caches, len(text.prompt), packed=packed)
        return tape and self.streamed is None and text.row is None

    def _read(self, texts: Sequence[Text], *, packed: bool) -> None:
        """Prompts that are read together, their proof, and their first tokens where a forward has those."""
        choices = by_prompt(texts)
        firsts = [same[0] for same in choices]
        adapter, longest = texts[0].adapter, max(firsts, key=lambda text: len(text.prompt))
        if (needed := max(len(text.prompt) + text.params.max_tokens for text in texts)) > self.places.max_length:
            self.places.grow(needed)
            self._reader = None
        for text in texts:
            text.sampler.processors = plain.processors(self.lm, text)
        taped = [text for text in firsts if self.by_tape(text, packed=packed)]
        forwarded = [text for text in firsts if text.row is not None or text not in taped]
        proves = len(longest.prompt) > self.proven.get(adapter, 0)
        result, likeliest = None, dict[int, list[int]]()
        if forwarded or proves:
            result = self._forward(forwarded or [longest], likeliest)
            for i, text in enumerate(forwarded if not self.places.recurrent else ()):
                result.put(i, self.places.caches, self.places.take(text))
        self._read_by_tape(taped)
        for first, *others in choices:
            m = self.places.texts.index(first)
            for text in others:
                self.places.copy(m, self.places.take(text), len(text.prompt))
            for text in (first, *others):
                self.places.contents[self.places.texts.index(text)] = adapter, list(text.prompt), first in taped
        if result is None:
            return
        if proves:
            self._prove([same for same in choices if same[0] in (forwarded or [longest])], result, read=bool(taped))
            self.proven[adapter] = len(longest.prompt)
        if packed and not self.places.recurrent:
            for i, text in enumerate(forwarded):
                self._begin(text, result.logits[i], likeliest.get(i, []))

    def _forward(self, texts: Sequence[Text], likeliest: dict[int, list[int]]) -> prefill.Prefilled:
        """Through the model's own forward; of a conversation only what is new. Rows get their losses, and in fp32
        `likeliest` the likeliest tokens from the end of each prompt on."""
        first, start = texts[0], 0
        before: list[tuple[Tensor, Tensor]] = []
        if not self.exact and not self.places.recurrent:
            m, start = self.places.find(first.adapter, first.prompt[:-1], any_reader=True)
            caches = self.places.caches
            pairs = zip(caches.keys, caches.values, strict=True) if start else ()
            before = [(keys[m : m + 1, :, :start], values[m : m + 1, :, :start]) for keys, values in pairs]
        rows = [text.row for text in texts if text.row is not None]
        with self.using(first.adapter):
            head = loss.head_of(self.lm) if rows else None
            each = partial(self._score, texts, head, likeliest)
            prompts = [text.prompt[start:] for text in texts]
            result = prefill.forward(self.lm, prompts, rows, head, each, before, caches=not self.places.recurrent)
        self.factor = result.factor
        return result

    @staticmethod
    def _score(
        texts: Sequence[Text], head: loss.Head | None, likeliest: dict[int, list[int]], hidden: Tensor, batch: Batch
    ) -> None:
        """Losses of rows from the body's hidden states (T, D), and what is likeliest after their prompts."""
        assert head is not None
        starts = batch["cu_seq_lens_q"].tolist()[:-1]
        each = zip(texts, starts, loss.labels_of_texts(batch), loss.weights_of_texts(batch), strict=True)
        for i, (text, start, labels, weights) in enumerate(each):
            keep, targets = batch["keep"][labels], batch["targets"][labels]
            text.loss = float(loss.head_loss(hidden[keep], targets, head, counts=weights))
            if hidden.dtype == torch.float32 and text.row is not None:  # rounded logits tie
                states = hidden[start + len(text.prompt) - 1 : start + len(text.row.input_ids)]
                logits = (loss.head_logits(some, head) for some in states.split(_LOGITS_AT_ONCE))
                likeliest[i] = [token for some in logits for token in some.argmax(-1).tolist()]

    def _read_by_tape(self, texts: Sequence[Text]) -> None:
        """All but the last token of prompts, several side by side; what was read before is copied."""
        jobs: list[tuple[int, Sequence[int], int, int]] = []
        for i, text in enumerate(texts):
            prompt, reader = text.prompt[:-1], not self.exact
            source, n = self.places.find(text.adapter, prompt, any_reader=reader)
            if jobs and max(same_beginning(tokens, prompt) for _, tokens, *_ in jobs) >= n + prefill.VECTORS:
                self._run_reader(jobs)  # what the others begin with is worth waiting for
                source, n = self.places.find(text.adapter, prompt)
            mark = 0
            if self.places.recurrent:  # where it parts from others that were read, or will be
                others = [same_beginning(other.prompt[:-1], prompt) for other in texts[i + 1 :]]
                mark = max(self.places.same(text.adapter, prompt, any_reader=reader) + others)
            m = self.places.take(text)
            self.places.copy(source, m, n)
            jobs.append((m, prompt, n, mark if mark >= n + prefill.VECTORS else 0))
        self._run_reader(jobs)

    def _run_reader(self, jobs: list[tuple[int, Sequence[int], int, int]]) -> None:
        """Jobs: place, tokens, how many of them are there, after how many the states are marked (0: never)."""
        if not jobs:
            return
        try:
            self._reader = self._reader or prefill.TapeReader(self.lm, self.places.caches)
        except Unsupported as why:
            raise FastPathUnavailable(str(why)) from why
        self._reader.factor = self.factor
        marked = [(m, tokens[:mark], start) for m, tokens, start, mark in jobs if mark]
        self._reader.read(marked)
        for m, tokens, _ in marked:
            self.places.mark(m, len(tokens))
        self._reader.read([(m, tokens, max(start, mark)) for m, tokens, start, mark in jobs])
        for m, tokens, *_ in jobs:
            text = self.places.texts[m]
            assert text is not None
            self.places.contents[m] = text.adapter, list(tokens), True
        jobs.clear()

    def _prove(self, choices: Sequence[Sequence[Text]], result: prefill.Prefilled, *, read: bool) -> None:
        """The prompts' last tokens by the tape, beside the model's own logits. What other texts compute here they
        compute again."""
        with self.places.kept_states():
            decoder, _ = self._run(whole=False)
        largest = decoder.logits.amax(1)
        fast = decoder.whole()
        if not torch.equal(largest, decoder.logits.amax(1)):
            raise FastPathUnavailable("the tape's largest logit is not that of the whole head")
        pairs = [(self.places.texts.index(text), i) for i, same in enumerate(choices) for text in same]
        places, numbers = zip(*pairs, strict=True)
        self.apart = check(fast[list(places)], result.logits[list(numbers)], len(self.layers), read=read)

    def _begin(self, text: Text, logits: Tensor, likeliest: Sequence[int]) -> None:
        """The first token of a text; and those after it, as far as each is what its row expects."""
        m, start = self.places.texts.index(text), len(text.prompt)
        self.places.lengths[m] = start
        if not likeliest or not text.sampler.greedy:
            text.take(logits)
        else:
            assert text.row is not None
            expected = text.row.input_ids[start:]
            for n, token in enumerate(likeliest):
                text.add(token)
                self.places.lengths[m] = start + n
                if text.ended or expected[n : n + 1] != (token,):
                    break
        if text.ended:
            self.remove(text)

    # ----------------------------------------------------------------- writing
    def next_logits(self) -> list[tuple[Text, Tensor]]:
        self.places.compact()
        texts = [(m, text) for m, text in enumerate(self.places.texts) if text is not None]
        _, logits = self._run(whole=not all(text.sampler.greedy for _, text in texts))
        for m, _ in texts:
            self.places.lengths[m] += 1
        return [(text, logits[m]) for m, text in texts]

    def _run(self, *, whole: bool) -> tuple[Decoder, Tensor]:
        """Logits (M, V) after the last token of each text; without `whole` only the largest of each is exact."""
        places = self.places
        used = max(places.active) + 1
        decoder = places.decoder(used)
        tokens = torch.tensor([0 if text is None else text.last for text in places.texts[: decoder.tape.m]])
        embedded = self.embedding(tokens)
        decoder.tape.used = used
        embedded = embedded.float() * self.factor if self.factor != 1.0 else embedded
        return decoder, decoder.step(embedded, places.lengths[: decoder.tape.m], self.streamed, whole=whole)

    def remove(self, text: Text) -> None:
        if text in self.places.texts:
            self.places.leave(self.places.texts.index(text))
