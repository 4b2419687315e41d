"""Greedy answers to many prompts: up to 16 at once; a text that ends leaves, and the next takes its place.

Why: at a batch of 16 a token reads the base once for all, so an evaluation takes a fraction of the time of one answer
after another; and one that waits for its longest answer would leave most of the batch idle.
What: prompts go from long to short through `writing.Writer`; where losses are wanted too, the whole rows that they
begin, so that a row is read once. Where the model's own forward writes, in groups by length.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby, islice

from halfbyte.data.encoding.examples import Example
from halfbyte.inference.generate import log_once, stop_ids
from halfbyte.layers import loss
from halfbyte.models import structure
from halfbyte.types import Model, Tokenizer
from halfbyte.writing.places import SIZES, FastPathUnavailable
from halfbyte.writing.plain import PlainWriter
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import Detokenizer, Text, before_stop
from halfbyte.writing.writer import Writer

Progress = Callable[[int, int], None]


def answers(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int], *,
    at_once: int = SIZES[-1], tokens_at_once: int = 2048, stops: Sequence[str] = (),
    ends: Collection[int] | None = None, rows: Sequence[Example] = (), losses: dict[int, float] | None = None,
    progress: Progress = lambda done, total: None,
) -> list[str]:  # fmt: skip
    """What the model writes to each prompt (token ids), greedily, up to so many tokens each.

    Args:
        at_once: most texts in one batch. tokens_at_once: most tokens of prompts in one forward, but for a longer one.
        stops: strings that end an answer, and are no part of it. ends: tokens that do; None for those of `stop_ids`.
        rows: what the prompts are the beginnings of; then one forward reads a whole row, and `losses` gets the summed
            loss of its labelled tokens, by its number. It stays empty where the model's own forward answers.
    """
    if not prompts:
        return []
    begin = all(row.input_ids[: len(row.prompt_ids)] == row.prompt_ids for row in rows)
    scored = losses is not None and begin and loss.head_of(structure.causal_lm(model)) is not None
    ends = stop_ids(model, tokenizer) if ends is None else ends

    def begun(*, by_tape: bool) -> list[Text]:
        return [
            Text(
                prompt, SamplingParams(count, stop=tuple(stops)), ends, row=rows[i] if scored and by_tape else None,
                # a stop string may be a special token
                detokenizer=Detokenizer(tokenizer, skip_special_tokens=False) if stops else None,
            )
            for i, (prompt, count) in enumerate(zip(prompts, max_tokens, strict=True))
        ]  # fmt: skip

    texts = write(model, begun, at_once=at_once, tokens_at_once=tokens_at_once, progress=progress)
    if losses is not None:
        losses.update((i, text.loss) for i, text in enumerate(texts) if text.loss is not None)
    written = tokenizer.batch_decode([text.tokens for text in texts], skip_special_tokens=True)
    return [before_stop(str(text), stops) for text in written]


def write(
    model: Model, begun: Callable[..., list[Text]], *, at_once: int, tokens_at_once: int = 2048, packed: bool = True,
    progress: Progress = lambda done, total: None,
) -> list[Text]:  # fmt: skip
    """Texts, each until it ends. `begun` makes them, to be written `by_tape` or not; `packed`: as of
    `TextWriter.insert`; `progress` is told after each token, and may raise."""
    with structure.evaluating(model):
        texts = begun(by_tape=True)
        try:
            for done in _queue(model, texts, at_once, tokens_at_once, packed=packed):
                progress(done, len(texts))
        except FastPathUnavailable as why:
            log_once(f"answers come from the model's own forward, which is slower: {why}")
            texts = begun(by_tape=False)
            for done in _groups(PlainWriter(model), texts, at_once):
                progress(done, len(texts))
    return texts


def _queue(
    model: Model, texts: Sequence[Text], at_once: int, tokens_at_once: int, *, packed: bool = True
) -> Iterator[int]:
    """From long to short, as many as there are places; how many are done, after each token."""
    size = next(size for size in SIZES if size >= min(at_once, len(texts), SIZES[-1]))
    length = max(max(len(t.prompt) + t.params.max_tokens, len(t.row.input_ids) if t.row else 0) for t in texts)
    # the plan counts half a cache more for one that grows; here it is that of a forward
    tokens = min(tokens_at_once, size * length // 2)
    writer = Writer(model, size, length, forward_tokens=tokens, rough=texts[0].sampler.greedy)
    waiting, done = deque(sorted(texts, key=lambda text: -len(text.prompt))), 0
    while waiting or writer.free < size:
        if waiting and writer.free >= max(1, size // 8):
            count = writer.together(list(islice(waiting, writer.free)), packed=packed)
            some = [waiting.popleft() for _ in range(count)]
            writer.insert(some, packed=packed)
        else:
            some = writer.step()
        done += sum(text.ended for text in some)
        yield done


def _groups(writer: PlainWriter, texts: Sequence[Text], at_once: int) -> Iterator[int]:
    """From short to long, so that a batch pads little; each group until its longest answer ends."""
    order = sorted(texts, key=lambda text: (text.params.max_tokens, len(text.prompt)))
    for _, same in groupby(order, key=lambda text: text.params.max_tokens):
        while group := list(islice(same, at_once)):
            writer.insert(group, packed=True)
            while not all(text.ended for text in group):
                writer.step()
                yield sum(text.ended for text in order)
