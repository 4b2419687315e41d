"""Texts being written side by side: each step gives every text its next logits.

`Tapes` reads the base once a step for all texts, whatever adapter each has (`layers/decoding/linears.py`).
There is a tape for 1, 2, 4, 8 and 16 texts, on one set of caches: a step takes the smallest that holds all texts, and
texts move together when half of it is empty. `Forward` is the model's own forward, one text after another: for what
is not built like Llama, for DoRA, whole modules, trained rows and biases, and for cards.
What a prompt begins with that has been read for another, with the same adapter, and is still there, is not read again.
Where every text takes its likeliest token and no more is asked of the logits, a step uses the head in 8 bits, which
gives the same token (`layers/decoding/head.py`).
Cost: of `Tapes`, a tape is a few tens of ms to write; an adapter that a text does not use costs a row of zeros.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from halfbyte.base import stream
from halfbyte.inference import batch, decode, prefill
from halfbyte.layers import loss, packing
from halfbyte.layers.decoding import llama, reader
from halfbyte.layers.decoding.linears import Unsupported
from halfbyte.layers.decoding.tape import TextAdapters
from halfbyte.models import structure
from halfbyte.serving.models import Models

if TYPE_CHECKING:
    from halfbyte.serving.text import Text


class Lane(Protocol):
    """Letters: n prompts, V tokens of the vocabulary."""

    together: bool
    """Whether several prompts go through one forward."""

    def begin(self, adapter: str | None, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[Text]]) -> None:
        """Read prompts, and give each of its texts a place; the next step has their first logits."""

    def step(self) -> list[tuple[Text, Tensor]]:
        """Each text with its logits (V,) after its last token; to be used before the next step."""

    def leave(self, text: Text) -> None:
        """Free its place, if it has one."""


class Tapes:
    """Raises decode.Slower where a tape cannot be used, or is not right."""

    def __init__(self, models: Models) -> None:
        self.models, self.lm = models, structure.causal_lm(models.model)
        self.layers = decode.layers_of(self.lm)
        self.table = self.lm.get_input_embeddings()
        self.together = packing.installed(self.lm) == "cu_seq_lens"
        self._check()
        self.mixed = TextAdapters(models.adapters, torch.zeros(len(models.adapters), models.places))
        sizes = [n for n in batch.SIZES if n < models.places]
        rough = stream.of(self.layers[0]) is None
        try:
            largest = llama.decoder(self.lm, models.places, models.room, adapters=self.mixed, largest=rough)
            smaller = [
                llama.decoder(self.lm, n, models.room, adapters=self.mixed, beside=largest, largest=rough)
                for n in sizes
            ]
        except Unsupported as why:
            raise decode.Slower(str(why)) from why
        self.tapes = dict(zip([*sizes, models.places], [*smaller, largest], strict=True))
        self.largest, self.factor = largest, 1.0
        self.reader = reader.Reader(self.lm, largest) if rough else None
        self.text: list[Text | None] = [None] * models.places
        self.before = [0] * models.places
        # By which adapter, and what: of a text its prompt, of one that has left all, but for the first token, in whose
        # place a place without a text computes.
        self.read: list[tuple[str | None, list[int]]] = [("", [])] * models.places
        self.proven: dict[str | None, int] = {}

    def _check(self) -> None:
        """Refuse what a tape of several adapters would leave out."""
        config = self.lm.generation_config
        if names := [n for n in batch.PROCESSORS if getattr(config, n, None) not in (None, 0, 1, False, [], {})]:
            raise decode.Slower(f"the model's generation_config has {names[0]} {getattr(config, names[0])}")
        if self.models.opened.own_biases:
            raise decode.Slower("the adapter has biases of its own")
        if type(self.table) is not nn.Embedding:
            raise decode.Slower(f"an adapter changes the embedding ({type(self.table).__name__})")

    @property
    def active(self) -> list[int]:
        return [m for m, text in enumerate(self.text) if text is not None]

    def begin(self, adapter: str | None, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[Text]]) -> None:
        longest, made = max(map(len, prompts)), None
        by_tape = [self.reader is not None and reader.worth(self.largest, len(prompt)) for prompt in prompts]
        if longest > self.proven.get(adapter, 0) or not all(by_tape):
            with self.models.using(adapter):
                made = prefill.read(self.lm, prompts)
            self.factor = made.factor
        places = list[list[int]]()
        for i, (prompt, own) in enumerate(zip(prompts, texts, strict=True)):
            source, n = self._begins(adapter, prompt) if by_tape[i] else (0, 0)
            first, *others = (self._place(text, prompt, adapter) for text in own)
            if self.reader is not None and by_tape[i]:
                self.reader.factor = self.factor
                self._copy(source, first, n)
                self.reader.read([(first, prompt[:-1])], n, first=True)
            elif made is not None:
                made.put(i, self.largest, first)
            for m in others:
                self._copy(first, m, len(prompt))
            places.append([first, *others])
            for m in places[-1]:
                self.read[m] = adapter, list(prompt)
        if made is not None and longest > self.proven.get(adapter, 0):
            self._prove(places, made.logits, read=any(by_tape))
            self.proven[adapter] = longest

    def _place(self, text: Text, prompt: Sequence[int], adapter: str | None) -> int:
        m = self.text.index(None)
        self.text[m], self.before[m], text.last = text, len(prompt) - 1, prompt[-1]
        self.read[m] = "", []  # until it has been read
        self.mixed.use(m, adapter)
        return m

    def _begins(self, adapter: str | None, prompt: Sequence[int]) -> tuple[int, int]:
        """A place where the first tokens of a prompt have been read by this adapter, and how many; 0: too few."""
        found = [0] * len(self.read)
        for m, (who, tokens) in enumerate(self.read):
            if who == adapter:
                there = len(tokens) if self.text[m] is None else min(len(tokens), self.before[m])
                found[m] = reader.same(tokens[:there], prompt[:-1])
        n = max(found)
        return found.index(n), n if n >= reader.LEAST_SHARED else 0

    def _copy(self, m: int, to: int, n: int) -> None:
        """The first n tokens that place m has read, to another place."""
        if n and m != to:
            for keys, values in zip(self.largest.keys, self.largest.values, strict=True):
                keys[to, :, :n] = keys[m, :, :n]
                values[to, :, :n] = values[m, :, :n]

    def _prove(self, places: list[list[int]], own: Tensor, *, read: bool) -> None:
        """The prompts' last tokens by the tape, beside the model's own logits (n, V). What other texts compute here
        they compute again."""
        taken, of = [m for some in places for m in some], [i for i, some in enumerate(places) for _ in some]
        made, _ = self._run(whole=False)
        try:
            decode.prove(made, own[of], taken, len(self.layers), read=read)
        except decode.Slower:
            for m in taken:
                self.text[m], self.before[m] = None, 0
            raise

    def step(self) -> list[tuple[Text, Tensor]]:
        self._together()
        _, rows = self._run(whole=not all(text.greedy for text in self.text if text is not None))
        for m in self.active:
            self.before[m] += 1
        return [(text, row) for text, row in zip(filter(None, self.text), rows, strict=True)]

    def _run(self, *, whole: bool) -> tuple[llama.Decoder, list[Tensor]]:
        """The logits of each text, in the order of their places; without `whole` only the largest are exact."""
        used = max(self.active) + 1
        size = next(n for n in self.tapes if n >= used)
        tokens = torch.tensor([0 if text is None else text.last for text in self.text[:size]])
        embedded = self.table(tokens)
        embedded = embedded.float() * self.factor if self.factor != 1.0 else embedded
        made = self.tapes[size]
        made.tape.used = used
        logits = made.step(embedded, self.before[:size], stream.of(self.layers[0]), whole=whole)
        return made, [logits[m] for m in self.active]

    def _together(self) -> None:
        """Move texts to the first places where that makes a smaller tape enough."""
        active = self.active
        size = next(n for n in self.tapes if n >= len(active))
        for m in active:
            if m >= size:
                to = self.text.index(None)
                self._copy(m, to, self.before[m])
                self.read[to], self.read[m] = self.read[m], ("", [])
                self.text[to], self.before[to], self.text[m], self.before[m] = self.text[m], self.before[m], None, 0
                self.mixed.uses[:, to] = self.mixed.uses[:, m]

    def leave(self, text: Text) -> None:
        if text in self.text:
            m = self.text.index(text)
            adapter, tokens = self.read[m]
            self.read[m] = adapter, [*tokens, *text.words.ids][: self.before[m]]
            self.text[m], self.before[m] = None, 0


class Forward:
    """The model's own forward, a text at a time, each with a cache of transformers."""

    together = False

    def __init__(self, models: Models) -> None:
        self.models, self.lm = models, structure.causal_lm(models.model)
        self.of: dict[Text, tuple[str | None, object, int]] = {}
        self.first: dict[Text, Tensor] = {}  # logits of prompts, until the next step
        names = inspect.signature(self.lm.forward).parameters
        self.cache = "cache" if "cache" in names else "past_key_values"
        self.keeps = {"logits_to_keep": 1} if loss.accepts(self.lm, "logits_to_keep") else {}
        self.with_positions = "position_ids" in names

    def begin(self, adapter: str | None, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[Text]]) -> None:
        from transformers import DynamicCache

        with self.models.using(adapter):
            for prompt, own in zip(prompts, texts, strict=True):
                cache = DynamicCache(config=self.lm.config)
                row = self._run(prompt, cache, 0)
                for number, text in enumerate(own):
                    held = cache if number == len(own) - 1 else copy.deepcopy(cache)
                    self.of[text], self.first[text] = (adapter, held, len(prompt)), row

    def step(self) -> list[tuple[Text, Tensor]]:
        made = []
        texts = sorted(self.of, key=lambda text: str(self.of[text][0]))
        for adapter, own in groupby(texts, key=lambda text: self.of[text][0]):
            with self.models.using(adapter):
                for text in own:
                    if text in self.first:
                        made.append((text, self.first.pop(text)))
                        continue
                    _, cache, before = self.of[text]
                    made.append((text, self._run([text.last], cache, before)))
                    self.of[text] = adapter, cache, before + 1
        return made

    def leave(self, text: Text) -> None:
        self.of.pop(text, None)
        self.first.pop(text, None)

    def _run(self, tokens: Sequence[int], cache: object, before: int) -> Tensor:
        where = self.lm.get_input_embeddings().weight.device
        options = {self.cache: cache, "use_cache": True, **self.keeps}
        options["attention_mask"] = torch.ones((1, before + len(tokens)), dtype=torch.int64, device=where)
        if self.with_positions:
            options["position_ids"] = torch.arange(before, before + len(tokens), device=where)[None]
        made = self.lm(input_ids=torch.tensor([list(tokens)], device=where), **options)
        return made.logits[0, -1].float().cpu()


def lane_for(models: Models) -> tuple[Lane, str]:
    """The fast lane where it is proven for every model that is served, else the slow one; and why.

    Raises:
        decode.Slower: neither gives what a forward without a cache gives.
    """
    try:
        lane: Lane = Tapes(models)
        _probe(lane, models)
    except decode.Slower as why:
        lane = Forward(models)
        _probe(lane, models)
        return lane, f"answers come from the model's own forward, one after another: {why}"
    return lane, f"up to {models.places} texts a step"


def _probe(lane: Lane, models: Models) -> None:
    """A text for each model: what the lane gives after two tokens, and what a forward without a cache gives; another
    one beside it, most of which is not read again, too."""
    from halfbyte.serving.text import Text

    count = min(2, models.places) if isinstance(lane, Tapes) else 1
    lm = structure.causal_lm(models.model)
    where = lm.get_input_embeddings().weight.device
    with torch.no_grad():
        for one in models.named.values():
            ids = list(one.tokenizer("Why is the sky blue, and what are 7 cups of tea?")["input_ids"])[:32]
            texts, found = [Text.of_probe(one) for _ in range(count)], list[Tensor]()
            for text in texts:
                lane.begin(one.adapter, [ids[:-2]], [[text]])
                for last in ids[-2:]:
                    lane.step()
                    text.last = last
                found.append(dict(lane.step())[text].clone())
            for text in texts:
                lane.leave(text)
            with models.using(one.adapter):
                wanted = lm(input_ids=torch.tensor([ids], device=where), use_cache=False).logits[0, -1].float().cpu()
            layers, read = len(decode.layers_of(lm)), isinstance(lane, Tapes) and lane.reader is not None
            decode.check(torch.stack(found), wanted.expand(count, -1), layers, read=read)
