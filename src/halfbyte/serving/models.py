"""A base with all adapters that are served on it, each with its own tokenizer and its own tokens that end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from halfbyte.adapters import lora
from halfbyte.base.store.supply import Tell
from halfbyte.errors import RecipeError
from halfbyte.inference import load
from halfbyte.inference.generate import stop_ids
from halfbyte.models import structure
from halfbyte.models.context import context_of
from halfbyte.models.sources.lookup import find_model
from halfbyte.plan import choose
from halfbyte.plan.memory import cache_bytes
from halfbyte.serving.names import Names
from halfbyte.system import device

if TYPE_CHECKING:
    from halfbyte.types import Model, Tokenizer

PLACES = (16, 8, 4, 2, 1)
ROOM = 4096  # tokens of a text, where neither the user nor the model says fewer
_CACHE_SHARE = 0.5  # of the memory that is free when the base is open


@dataclass(frozen=True)
class Named:
    """A model as a client names it.

    Args:
        adapter: PEFT's name, None for the base alone. stops: tokens that end an answer. longest: characters of the
            longest token, so that a text that cannot fit is refused before it is tokenised.
    """

    name: str
    adapter: str | None
    tokenizer: Tokenizer
    stops: frozenset[int]
    longest: int


@dataclass(frozen=True)
class Models:
    """All that one engine serves. room: tokens of a text, its prompt included; places: texts at once."""

    opened: load.Opened
    named: dict[str, Named]
    base: str
    room: int
    places: int
    cache_bytes: int
    vocabulary: int
    """Rows of the head: the length of logits."""
    adapters: tuple[str, ...] = field(default=())

    @property
    def model(self) -> Model:
        return self.opened.model

    def using(self, adapter: str | None) -> AbstractContextManager[None]:
        return lora.using(self.opened.model, adapter, self.opened.own_biases)


def open_all(
    names: Names,
    tell: Tell | None = None,
    *,
    room: int | None = None,
    places: int | None = None,
    force: bool = False,
) -> Models:
    """Open the base once, with every adapter on it.

    Args:
        room: most tokens of a text, prompt and answer; None: what the model reads, at most 4,096.
        places: most texts at once; fewer where their caches would not fit.

    Raises:
        AdapterError: one belongs to another base or tokenizer. RecipeError: the room is more than the model reads.
    """
    targets = list(names.adapters.items())
    internal = {name: "default" if i == 0 else f"adapter{i}" for i, (name, _) in enumerate(targets)}
    beside = {internal[name]: found for name, found in targets[1:]}
    opened = load.open_target(names.first, tell, beside=beside, force=force, lasting=True)
    checkpoint = find_model(names.first.recipe)
    named = {}
    for name, found in targets:
        tokenizer = opened.tokenizer if found is names.first else load.tokenizer_of(found, checkpoint)
        named[name] = _named(opened.model, name, internal[name], tokenizer)
    named[names.base] = _named(opened.model, names.base, None, opened.tokenizer)
    room, places, cache_bytes = _sized(opened, room, places)
    lm = structure.causal_lm(opened.model)
    head = lm.get_output_embeddings()
    vocabulary = int(head.weight.shape[0] if head is not None else lm.config.get_text_config().vocab_size)
    return Models(opened, named, names.base, room, places, cache_bytes, vocabulary, tuple(internal.values()))


def _named(model: Model, name: str, adapter: str | None, tokenizer: Tokenizer) -> Named:
    longest = max(map(len, tokenizer.get_vocab()), default=1)
    return Named(name, adapter, tokenizer, frozenset(stop_ids(model, tokenizer)), longest)


def _sized(opened: load.Opened, room: int | None, places: int | None) -> tuple[int, int, int]:
    """Tokens of a text, texts at once, and bytes of their caches, within half of what is free now."""
    reads = context_of(opened.model.config)
    if room is not None and reads is not None and room > reads.tokens:
        raise RecipeError(
            f"--context {room:,} is more than the model reads, {reads.tokens:,} ({reads.why}).",
            fix=f"--context {reads.tokens}",
        )
    room = room or min(ROOM, reads.tokens if reads is not None else ROOM)
    each = cache_bytes(opened.job, room)
    free = _CACHE_SHARE * choose.available_bytes(device.detect())
    fitting = [n for n in _sizes(places) if n * each <= free]
    if not fitting:
        raise RecipeError(
            f"the cache of one text of {room:,} tokens takes {each / 1e9:.1f} GB; {free / 1e9:.1f} GB may be used.",
            fix=f"--context {max(64, int(room * free / each) // 64 * 64)}",
        )
    return room, fitting[0], fitting[0] * each


def _sizes(places: int | None) -> Sequence[int]:
    return PLACES if places is None else [places, *(n for n in PLACES if n < places)]
