"""Greedy answers to many prompts: up to 16 at once on a tape; a text that ends leaves, and the next takes its place.

Why: at a batch of 16 a token reads the base once for all, so an evaluation takes a fraction of the time of one answer
after another; and one that waits for its longest answer would leave most of the batch idle.
What: prompts go through the model's own forward, several end to end without padding, from long to short; where losses
are wanted too, the whole rows that they begin, so that a row is read once. Their caches are put into the slots of
`layers/decoding`, and the first token is that of the model's own logits. The first ones are also run through the tape,
and the two logits compared (`decode.py`). When no prompt waits, a smaller tape takes over the texts that are left.
Where rows are read in fp32, what is expected is in them: as long as the model's own likeliest token is the expected
one, the next is known already, and an answer goes on from where they part (speculative decoding, arXiv:2211.17192,
whose draft it is). Where no losses are wanted, in fp32 only the first prompts go through a forward: the others are read
by a tape too, what all begin with once. Its logits are not exact enough for a loss.
Cost: a prompt's forward dequantises the base once for all that it takes together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import groupby, islice
from typing import TYPE_CHECKING

import torch

from halfbyte.base import stream
from halfbyte.inference import decode, prefill
from halfbyte.inference.generate import Sampling, generate, say, stop_ids
from halfbyte.layers import loss, packing
from halfbyte.layers.decoding import llama
from halfbyte.layers.decoding.linears import Unsupported
from halfbyte.layers.decoding.reader import Reader
from halfbyte.models import structure

if TYPE_CHECKING:
    from torch import Tensor

    from halfbyte.data.encoding.examples import Example
    from halfbyte.types import Batch, Model, Tokenizer

SIZES = (1, 2, 4, 8, 16)
# Of a model's generation_config: what changes logits, and is left to transformers' own code.
PROCESSORS = (
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "exponential_decay_length_penalty", "guidance_scale",
    "watermarking_config",
)  # fmt: skip
_LETTER_TOKENS = 8
_FIRST = 2  # prompts that go through a forward where the others need not
_LOGITS_AT_ONCE = 64  # tokens
Progress = Callable[[int, int], None]


def answers(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    most: Sequence[int],
    *,
    at_once: int = 16,
    tokens_at_once: int = 2048,
    stops: Sequence[str] = (),
    ends: Collection[int] | None = None,
    rows: Sequence[Example] = (),
    losses: dict[int, float] | None = None,
    progress: Progress = lambda done, of: None,
) -> list[str]:
    """What the model writes to each prompt (token ids), greedily, up to `most` tokens each.

    Args:
        at_once: most texts in one batch. tokens_at_once: most tokens of prompts in one forward, but for a longer one.
        stops: texts that end an answer, and are no part of it. ends: tokens that do; None for those of `stop_ids`.
        rows: what the prompts are the beginnings of; then one forward reads a whole row, and `losses` gets the summed
            loss of its labelled tokens, by its number. It stays empty where the model's own loop answers.
    """
    if not prompts:
        return []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            queue = _Queue(model, tokenizer, prompts, most, at_once, tokens_at_once, progress)
            queue.ending = tuple(stops)
            if losses is not None and all(r.input_ids[: len(r.prompt_ids)] == r.prompt_ids for r in rows):
                queue.read(rows, losses)
            queue.stops = frozenset(stop_ids(model, tokenizer) if ends is None else ends)
            texts = queue.run()
    except decode.Slower as why:
        say(f"answers are not written in one queue: {why}")
        if losses:
            losses.clear()
        texts = _in_groups(model, tokenizer, prompts, most, at_once, progress)
    finally:
        model.train(was_training)
    return [_before(stops, text) for text in texts]


def _before(stops: Sequence[str], text: str) -> str:
    """The text up to the first of what ends it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _in_groups(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    most: Sequence[int],
    at_once: int,
    progress: Progress,
) -> list[str]:
    """From short to long, so that a batch pads little; each group until its longest answer ends."""
    order = sorted(range(len(prompts)), key=lambda i: (most[i], len(prompts[i])))
    written: dict[int, str] = {}
    for new_tokens, same in groupby(order, key=lambda i: most[i]):
        while chunk := list(islice(same, at_once)):
            texts = generate(model, tokenizer, [prompts[i] for i in chunk], Sampling(new_tokens))
            written.update(zip(chunk, texts, strict=True))
            progress(len(written), len(order))
    return [written[i] for i in range(len(prompts))]


class _Slots:
    """A tape and what is in each of its M places: the number of a prompt, or None."""

    def __init__(self, lm: Model, size: int, room: int) -> None:
        try:
            self.made = llama.decoder(lm, size, room, largest=stream.of(decode.layers_of(lm)[0]) is None)
        except Unsupported as why:
            raise decode.Slower(str(why)) from why
        self.size, self.room = size, room
        self.text: list[int | None] = [None] * size
        self.idle = 0  # the position that a place without a text writes to
        self.token, self.before = [0] * size, [0] * size

    @property
    def free(self) -> list[int]:
        return [m for m, text in enumerate(self.text) if text is None]

    @property
    def active(self) -> list[int]:
        return [m for m, text in enumerate(self.text) if text is not None]

    def put(self, m: int, text: int, token: int, prefilled: prefill.Prefilled, i: int) -> None:
        """Prompt i of those in a forward as text `text` with its first token, into place m."""
        prefilled.put(i, self.made, m)
        self.text[m], self.token[m], self.before[m] = text, token, prefilled.lengths[i]

    def leave(self, m: int) -> None:
        self.text[m], self.token[m], self.before[m] = None, 0, self.idle

    def spare(self, shared: int) -> None:
        """From now on the first tokens of a place without a text are left alone."""
        self.idle = shared
        for m in self.free:
            self.leave(m)

    def smaller(self, lm: Model, size: int) -> _Slots:
        """The texts that are left, on a tape of `size` places."""
        made = _Slots(lm, size, self.room)
        for to, m in enumerate(self.active):
            n = self.before[m]
            for number, (keys, values) in enumerate(zip(self.made.keys, self.made.values, strict=True)):
                made.made.keys[number][to, :, :n] = keys[m, :, :n]
                made.made.values[number][to, :, :n] = values[m, :, :n]
            made.text[to], made.token[to], made.before[to] = self.text[m], self.token[m], n
        return made


class _Queue:
    """Prompts that wait, texts that are being written, and those that are done."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        most: Sequence[int],
        at_once: int,
        tokens_at_once: int,
        progress: Progress,
    ) -> None:
        self.lm, self.tokenizer = structure.causal_lm(model), tokenizer
        self.prompts, self.most, self.progress = prompts, most, progress
        self.stops: frozenset[int] = frozenset()
        self.ending: tuple[str, ...] = ()
        self.head: loss.Head | None = None
        self.rows: Sequence[Example] = ()
        self.losses: dict[int, float] = {}
        self.known: dict[int, list[int]] = {}  # of a row: the likeliest tokens from its prompt's end on
        self.waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        self.written: list[list[int]] = [[] for _ in prompts]
        self.done, self.factor, self.proven = 0, 1.0, False
        self.reader: Reader | None = None
        config = self.lm.generation_config
        for name in PROCESSORS:
            if getattr(config, name, None) not in (None, 0, 1, False, [], {}):
                raise decode.Slower(f"the model's generation_config has {name} {getattr(config, name)}")
        self.layers = decode.layers_of(self.lm)
        self.size = next(size for size in SIZES if size >= min(at_once, len(prompts), SIZES[-1]))
        self.room = max(len(p) + n for p, n in zip(prompts, most, strict=True))
        # the plan counts half a cache more for one that grows; here it is that of a forward
        self.tokens_at_once = min(tokens_at_once, self.size * self.room // 2)

    def read(self, rows: Sequence[Example], losses: dict[int, float]) -> None:
        """Read whole rows, whose losses are wanted, where their prompts are read."""
        self.head = loss.head_of(self.lm)
        if self.head is not None:
            self.rows, self.losses = rows, losses
            self.room = max(self.room, max(len(row.input_ids) for row in rows))

    def run(self) -> list[str]:
        slots = _Slots(self.lm, self.size, self.room)
        while self.waiting or slots.active:
            free = slots.free
            if self.waiting and (len(free) == slots.size or len(free) >= max(1, slots.size // 8)):
                self._admit(slots, free)
                continue
            if not self.waiting and 2 * len(slots.active) <= slots.size:
                slots = slots.smaller(self.lm, next(n for n in SIZES if n >= len(slots.active)))
            logits = slots.made.step(self._embed(slots.token), slots.before, stream.of(self.layers[0]))
            chosen = logits.argmax(-1).tolist()
            for m in slots.active:
                slots.before[m] += 1
                self._take(slots, m, chosen[m])
        return [str(t) for t in self.tokenizer.batch_decode(self.written, skip_special_tokens=True)]

    def _take(self, slots: _Slots, m: int, token: int) -> None:
        """A new token of the text in place m, which ends there or goes on."""
        text = slots.text[m]
        assert text is not None
        own = self.written[text]
        own.append(token)
        slots.token[m] = token
        if token in self.stops or len(own) >= self.most[text] or self._ends(own):
            slots.leave(m)
            self.done += 1
            self.progress(self.done, len(self.prompts))

    def _ends(self, tokens: list[int]) -> bool:
        """Whether what was written last has a text in it that ends an answer; a token may be a part of a letter."""
        if not self.ending:
            return False
        last = self.tokenizer.decode(tokens[-(max(map(len, self.ending)) + _LETTER_TOKENS) :])
        return any(stop in last for stop in self.ending)

    def _admit(self, slots: _Slots, free: list[int]) -> None:
        """The next prompts, as many as have a place and go through one forward."""
        if self.reader is not None:
            chosen, self.waiting = self.waiting[: len(free)], self.waiting[len(free) :]
            self._read(self.reader, slots, dict(zip(free, chosen, strict=False)))
            return
        together = packing.installed(self.lm) == "cu_seq_lens"
        most = _FIRST if slots.made.tape.isa == "avx2" and not self.proven and not self.rows else len(free)
        chosen = list[int]()
        for i in self.waiting[: min(most, len(free)) if together else 1]:
            if chosen and sum(self._tokens(j) for j in (*chosen, i)) > self.tokens_at_once:
                break
            chosen.append(i)
        self.waiting = self.waiting[len(chosen) :]
        made = self._prefilled(chosen)
        self.factor = made.factor
        first = made.logits.argmax(-1).tolist()
        for i, (m, text) in enumerate(zip(free, chosen, strict=False)):
            slots.put(m, text, first[i], made, i)
        if not self.proven:
            self._prove(slots, free[: len(chosen)], chosen, made.logits)
            self._take_reader(slots, free[0], chosen[0], made.logits[:1])
        for m, text, token in zip(free, chosen, first, strict=False):
            self._take_known(slots, m, text, self.known.pop(text, [token]))

    def _take_known(self, slots: _Slots, m: int, text: int, tokens: list[int]) -> None:
        """The likeliest tokens of the text in place m, as far as those before them are its own."""
        start = len(self.prompts[text])
        expected = self.rows[text].input_ids[start:] if self.rows else ()
        for n, token in enumerate(tokens):
            slots.before[m] = start + n
            self._take(slots, m, token)
            if slots.text[m] is None or expected[n : n + 1] != (token,):
                return

    def _take_reader(self, slots: _Slots, m: int, i: int, own: Tensor) -> None:
        """Have what waits read by a tape, if that gives the logits that prompt i in place m has by the model's own."""
        head = loss.head_of(self.lm)
        if slots.made.tape.isa != "avx2" or self.rows or not self.waiting or stream.of(self.layers[0]) is not None:
            return
        if head is None:
            return
        try:
            reader = Reader(self.lm, slots.made, self.factor)
            (hidden,) = reader.read([(m, self.prompts[i])])
            decode.check(loss.head_logits(hidden[-1:], head), own.float(), len(self.layers))
        except (Unsupported, decode.Slower) as why:
            say(f"prompts are read by the model's own forward: {why}")
            return
        reader.share(m, self._shared())
        slots.spare(reader.shared)
        self.reader, self.head = reader, head

    def _shared(self) -> int:
        """Tokens that all prompts begin with, all of which have one more."""
        least, most = min(map(tuple, self.prompts)), max(map(tuple, self.prompts))
        same = next((n for n, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))
        return min(same, *(len(p) - 1 for p in self.prompts))

    def _read(self, reader: Reader, slots: _Slots, places: dict[int, int]) -> None:
        """Prompts by their places: their first tokens."""
        assert self.head is not None
        hidden = reader.read([(m, self.prompts[i]) for m, i in places.items()])
        first = loss.head_logits(torch.stack([states[-1] for states in hidden]), self.head).argmax(-1).tolist()
        for (m, i), token in zip(places.items(), first, strict=True):
            slots.text[m] = i
            self._take_known(slots, m, i, [token])

    def _prove(self, slots: _Slots, places: list[int], chosen: list[int], own: Tensor) -> None:
        """The prompts' last tokens once more, by the tape; raises Slower where its logits are not the model's."""
        last = [0] * slots.size
        before = [0] * slots.size
        for m, i in zip(places, chosen, strict=True):
            last[m], before[m] = self.prompts[i][-1], len(self.prompts[i]) - 1
        slots.made.step(self._embed(last), before, stream.of(self.layers[0]))
        decode.prove(slots.made, own, places, len(self.layers))
        self.proven = True

    def _embed(self, tokens: list[int]) -> Tensor:
        made: Tensor = self.lm.get_input_embeddings()(torch.tensor(tokens))
        return made.float() * self.factor if self.factor != 1.0 else made

    def _tokens(self, i: int) -> int:
        return len(self.rows[i].input_ids) if self.rows else len(self.prompts[i])

    def _prefilled(self, chosen: list[int]) -> prefill.Prefilled:
        """Prompts, or the rows that begin with them, through the model's own forward."""
        rows = [self.rows[i] for i in chosen] if self.rows else ()
        prompts = [self.prompts[i] for i in chosen]
        return prefill.read(self.lm, prompts, rows, self.head, partial(self._lose, chosen))

    def _lose(self, chosen: list[int], hidden: Tensor, batch: Batch) -> None:
        """Note the losses of rows from the body's hidden states (T, D), and what is likeliest after their prompts."""
        assert self.head is not None
        starts = batch["cu_seq_lens_q"].tolist()[:-1]
        for i, start, (first, end) in zip(chosen, starts, loss.labels_of_texts(batch), strict=True):
            keep, targets = batch["keep"][first:end], batch["targets"][first:end]
            self.losses[i] = float(loss.head_loss(hidden[keep], targets, self.head))
            if hidden.dtype != torch.float32:  # rounded logits tie
                continue
            own = hidden[start + len(self.prompts[i]) - 1 : start + len(self.rows[i].input_ids)]
            self.known[i] = [
                token
                for some in own.split(_LOGITS_AT_ONCE)
                for token in loss.head_logits(some, self.head).argmax(-1).tolist()
            ]
