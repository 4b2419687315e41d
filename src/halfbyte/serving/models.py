"""A base with all adapters that are served on it, each with its own tokenizer and its own tokens that end an answer.

Adapters are put on it and taken away again between answers, since a server lasts longer than their choice. Only folders
below those that were allowed when it began are read (`folders.py`). The adapter has to belong to the base, as at the
start. A new writer, proven for each model, takes the place of the one before; if it cannot be, nothing changes.
"""

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from halfbyte.adapters import lora
from halfbyte.adapters.assembly import put_beside, take_away
from halfbyte.base.store.supply import Tell
from halfbyte.errors import AdapterError, RecipeError
from halfbyte.inference import load
from halfbyte.inference.generate import stop_ids
from halfbyte.inference.target import Target
from halfbyte.models import structure
from halfbyte.models.context import Context, context_of
from halfbyte.models.sources.lookup import find_model
from halfbyte.plan import choose
from halfbyte.plan.memory import cache_bytes
from halfbyte.serving.names import Names, check_same
from halfbyte.system import device
from halfbyte.types import Model, Tokenizer
from halfbyte.writing.places import SIZES, FastPathUnavailable
from halfbyte.writing.plain import PlainWriter
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import Text, TextWriter
from halfbyte.writing.writer import Writer, check, layers_of

MAX_LENGTH = 4096  # tokens of a text, where neither the user nor the model says fewer
_CACHE_SHARE = 0.5  # of the memory that is free when the base is open


@dataclass(frozen=True)
class ServedModel:
    """A model as a client names it."""

    name: str
    adapter: str | None  # PEFT's name, None for the base alone
    tokenizer: Tokenizer
    stop_ids: frozenset[int]  # tokens that end an answer
    longest_token: int  # its characters, so that a text that cannot fit is refused before it is tokenised


@dataclass(frozen=True)
class Models:
    """All that one engine serves. max_length: tokens of a text, its prompt included; places: texts at once."""

    opened: load.Opened
    by_name: dict[str, ServedModel]
    base: str
    max_length: int
    places: int
    cache_bytes: int
    vocabulary: int  # rows of the head: the length of logits
    first: Target  # with which others have to share the base

    @property
    def adapters(self) -> tuple[str, ...]:
        """PEFT's names of those that are served."""
        return tuple(one.adapter for one in self.by_name.values() if one.adapter is not None)

    @property
    def context(self) -> Context:
        """What decides whether a prompt and its answer fit: the caches, which are no longer than the model reads."""
        return Context(self.max_length, "--context")

    @property
    def model(self) -> Model:
        return self.opened.model

    def using(self, adapter: str | None) -> AbstractContextManager[None]:
        return lora.using(self.opened.model, adapter, self.opened.own_biases)


def open_all(
    names: Names, tell: Tell | None = None, *, max_length: int | None = None, places: int | None = None,
    force: bool = False,
) -> Models:  # fmt: skip
    """Open the base once, with every adapter on it.

    Args:
        max_length: of a text, prompt and answer, in tokens; None: what the model reads, at most 4,096.
        places: most texts at once; fewer where their caches would not fit.

    Raises:
        AdapterError: one belongs to another base or tokenizer. RecipeError: more tokens than the model reads.
    """
    targets = list(names.adapters.items())
    internal = {name: "default" if i == 0 else f"adapter{i}" for i, (name, _) in enumerate(targets)}
    beside = {internal[name]: target for name, target in targets[1:]}

    def check(tokenizer: Tokenizer, context: Context | None) -> None:
        if max_length is not None and context is not None and max_length > context.tokens:
            raise RecipeError(
                f"--context {max_length:,} is more than the model reads, {context.tokens:,} ({context.why}).",
                fix=f"--context {context.tokens}",
            )

    opened = load.open_target(names.first, tell, check, beside=beside, force=force, lasting=True)
    checkpoint = find_model(names.first.recipe)
    by_name = {}
    for name, one in targets:
        tokenizer = opened.tokenizer if one is names.first else load.tokenizer_of(one, checkpoint)
        by_name[name] = served(opened.model, name, internal[name], tokenizer)
    by_name[names.base] = served(opened.model, names.base, None, opened.tokenizer)
    max_length, places, cache_bytes = _sized(opened, max_length, places)
    lm = structure.causal_lm(opened.model)
    head = lm.get_output_embeddings()
    vocabulary = int(head.weight.shape[0] if head is not None else lm.config.get_text_config().vocab_size)
    return Models(opened, by_name, names.base, max_length, places, cache_bytes, vocabulary, names.first)


def served(model: Model, name: str, adapter: str | None, tokenizer: Tokenizer) -> ServedModel:
    longest = max(map(len, tokenizer.get_vocab()), default=1)
    return ServedModel(name, adapter, tokenizer, frozenset(stop_ids(model, tokenizer)), longest)


def _sized(opened: load.Opened, max_length: int | None, places: int | None) -> tuple[int, int, int]:
    """Tokens of a text, texts at once, and bytes of their caches, within half of what is free now."""
    context = context_of(opened.model.config)
    max_length = max_length or min(MAX_LENGTH, context.tokens if context is not None else MAX_LENGTH)
    each = cache_bytes(opened.job, max_length)
    free = _CACHE_SHARE * choose.available_bytes(device.detect())
    counts = [n for n in sorted({*SIZES, places or SIZES[-1]}, reverse=True) if n <= (places or SIZES[-1])]
    fitting = [n for n in counts if n * each <= free]
    if not fitting:
        raise RecipeError(
            f"the cache of one text of {max_length:,} tokens takes {each / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB may be used.",
            fix=f"--context {max(64, int(max_length * free / each) // 64 * 64)}",
        )
    return max_length, fitting[0], fitting[0] * each


def writer_for(models: Models) -> tuple[TextWriter, str]:
    """The fast writer where it is proven for every model that is served, else the model's own forward; and why. Raises
    FastPathUnavailable: neither gives what a forward without a cache gives."""
    try:
        if models.opened.own_biases:
            raise FastPathUnavailable("the adapter has biases of its own")
        writer = Writer(models.model, models.places, models.max_length, adapters=models.adapters, using=models.using)
        _prove(writer, models, min(2, models.places))
    except FastPathUnavailable as why:
        plain = PlainWriter(models.model, models.using)
        _prove(plain, models, 1)
        return plain, f"answers come from the model's own forward, one after another: {why}"
    return writer, f"up to {models.places} texts a step"


def _prove(writer: TextWriter, models: Models, count: int) -> None:
    """What a writer gives for each model after two tokens, beside what a forward without a cache gives; also of a
    second text, most of which is not read again."""
    lm = structure.causal_lm(models.model)
    layers, by_tape = len(layers_of(lm)), isinstance(writer, Writer) and writer.streamed is None
    for one in models.by_name.values():
        ids = list(one.tokenizer("Why is the sky blue, and what are 7 cups of tea?")["input_ids"])[:30]
        texts = [Text(tuple(ids), SamplingParams(9, logprobs=0), (), adapter=one.adapter) for _ in range(count)]
        for text in texts:
            writer.insert([text])
            writer.step()
            writer.step()
            logits = next((row.clone() for other, row in writer.next_logits() if other is text), None)
            with models.using(one.adapter):
                read = torch.tensor([[*ids, *text.tokens]], device=lm.get_input_embeddings().weight.device)
                expected = lm(input_ids=read, use_cache=False).logits[:, -1].float().cpu()
            if logits is None:
                raise FastPathUnavailable("its logits are not finite")
            check(logits[None].float().cpu(), expected, layers, read=by_tape)
        for text in texts:
            writer.remove(text)


_NAME = re.compile(r"[\w.:@+-]{1,64}")


def put_adapter(models: Models, name: str, one: Target) -> tuple[Models, TextWriter, str]:
    """One more adapter, or another one under its name, and who writes from then on. Raises AdapterError: it belongs to
    another base, does not fit, or would change its neighbours. Nothing has changed."""
    opened, first = models.opened, models.first
    before = models.by_name.get(name)
    assert one.adapter is not None and opened.base is not None
    if not _NAME.fullmatch(name):
        raise AdapterError(f"{name[:64]!r} is no name: letters, digits and .:@+-_ of at most 64 are.")
    check_same(first, one)
    if one.recipe.lora.bias != "none" or opened.own_biases:
        raise AdapterError("an adapter that has trained the base's biases (lora.bias) has to be served alone.")
    tokenizer = load.tokenizer_of(one, find_model(first.recipe))
    load.check_belongs(one, opened.base, tokenizer)
    numbers = [int(n.removeprefix("adapter")) for n in opened.model.peft_config if n.startswith("adapter")]
    internal = f"adapter{max(numbers, default=0) + 1}"
    with torch.enable_grad():  # for its proof
        put_beside(opened.model, opened.recipe, one.adapter, internal, packed=opened.job.packed)
    try:
        by_name = {**models.by_name, name: served(opened.model, name, internal, tokenizer)}
        changed = _with(replace(models, by_name=by_name))
    except Exception:
        take_away(opened.model, internal)
        raise
    if before is not None and before.adapter is not None:
        take_away(opened.model, before.adapter)
    return changed


def take_adapter(models: Models, name: str) -> tuple[Models, TextWriter, str]:
    """Without an adapter, and who writes from then on."""
    gone = models.by_name[name].adapter
    assert gone is not None
    by_name = {other: one for other, one in models.by_name.items() if other != name}
    changed = _with(replace(models, by_name=by_name))
    take_away(models.opened.model, gone)
    return changed


def _with(models: Models) -> tuple[Models, TextWriter, str]:
    return models, *writer_for(models)
