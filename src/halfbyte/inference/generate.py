"""Text from a base or from base and adapter: prompts of a conversation, a few answers, streams of them.

What: greedy unless a temperature is given, by `writing.Writer` where that is proven on the prompts; else by the model's
own forward, and the log says so.
Cost: each new token reads the base once for up to 16 texts; by the model's own forward it dequantises the base once.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from halfbyte.data.encoding.chatml import with_tools
from halfbyte.errors import DataError, HalfbyteError, first_line
from halfbyte.models.context import Context, context_of
from halfbyte.models.structure import evaluating
from halfbyte.system import limits
from halfbyte.types import Document, Model, Tokenizer
from halfbyte.writing.places import MAX_TEXTS, FastPathUnavailable
from halfbyte.writing.plain import PlainWriter
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import Detokenizer, Session, Text, TextWriter, sender
from halfbyte.writing.writer import Writer

_log = logging.getLogger(__name__)
_logged: set[str] = set()


def chat_ids(
    tokenizer: Tokenizer, messages: Sequence[Document], tools: Sequence[Document] | None = None,
    variables: Mapping[str, object] = MappingProxyType({}),
) -> list[int]:  # fmt: skip
    """Token ids of a conversation up to where the assistant speaks; the plain text where there is no chat template.

    Args:
        tools: as the template takes them, or a bundled one where the tokenizer's own takes none; None: none.
        variables: more of the template's.
    """
    called = any(m.get("tool_calls") or m["role"] == "tool" for m in messages)
    template = with_tools(tokenizer) if tools or called else None
    given = {
        **variables,
        **({"tools": list(tools)} if tools else {}),
        **({"chat_template": template} if template else {}),
    }
    if template or tokenizer.chat_template:
        try:
            with limits.template(template or tokenizer.chat_template):
                text = tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True, **given
                )
                text.encode()  # half a surrogate pair is no text, and no token
        except limits.TooMuch as error:
            raise DataError(f"{error}.", fix="use a model with another template") from None
        except Exception as error:  # a template may raise anything
            raise DataError(f"the chat template refuses the conversation: {first_line(error)}.") from None
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer("".join(m["content"] for m in messages))["input_ids"])


def check(asks: tuple[Sequence[Sequence[dict[str, str]]], int], tokenizer: Tokenizer, context: Context | None) -> None:
    """Refuse conversations that are too long with the tokens of an answer (DataError)."""
    talks, new_tokens = asks
    if context is not None:
        for talk in talks:
            context.check(len(chat_ids(tokenizer, talk)), new_tokens)


def stop_ids(model: Model, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer: the model's own, the tokenizer's, and the end of turn in its template."""
    ids: set[int | None] = {*eos_ids(model), tokenizer.eos_token_id}
    if tokenizer.chat_template:
        ids.add(end_of_turn_id(tokenizer))
    return sorted(i for i in ids if i is not None)


def eos_ids(model: Model) -> list[int]:
    """Tokens that end a text, as the model's generation_config has them."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def end_of_turn_id(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template puts after an assistant's words, or None."""
    probe = "halfbyte"
    messages = [{"role": "user", "content": probe}, {"role": "assistant", "content": probe}]
    try:
        with limits.template(tokenizer.chat_template):
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            text.encode()
    except Exception:  # a template may refuse any conversation in its own words; then it names no end of turn
        return None
    tail = tokenizer(text.rsplit(probe, 1)[-1], add_special_tokens=False)["input_ids"]
    return tail[0] if tail and tail[0] in set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder) else None


def generate(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], params: SamplingParams, *,
    emit: Callable[[str], None] | None = None, each: Callable[[], bool] | None = None, session: Session | None = None,
) -> list[str]:  # fmt: skip
    """Continue each prompt (token ids).

    Args:
        emit: takes new text as it comes; of one prompt only.
        each: called after each token; True ends the answers there, as far as they are.
        session: of one prompt: what was read in it before, with the same adapter, is not read again.

    Raises:
        DataError: prompt and answer are longer than what the model reads at once.
    """
    ids = generate_ids(model, tokenizer, prompts, params, sender(emit, each), session)
    return [str(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def generate_ids(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], params: SamplingParams,
    after_step: Callable[[Sequence[Text]], bool] = lambda texts: False, session: Session | None = None,
) -> list[list[int]]:  # fmt: skip
    """The tokens of `generate`, with the one that ends an answer. after_step: True ends all texts there."""
    if (context := context_of(model.config)) is not None:
        context.check(max(map(len, prompts)), params.max_tokens)
    ends = stop_ids(model, tokenizer)
    ids: list[list[int]] = []
    with evaluating(model):
        while len(ids) < len(prompts):
            texts = [Text(p, params, ends, detokenizer=Detokenizer(tokenizer)) for p in prompts[len(ids) :]]
            writer: TextWriter
            try:
                writer = _read(model, texts[:MAX_TEXTS], session)
                texts = texts[:MAX_TEXTS]
            except FastPathUnavailable as why:
                log_once(f"tokens come from the model's own forward, which is slower: {why}")
                writer = PlainWriter(model)
                writer.insert(texts, packed=True)
            try:
                ended = False
                while not (ended or all(text.ended for text in texts)):
                    writer.step()
                    ended = after_step(texts)
            finally:
                for text in texts:
                    writer.remove(text)
            if (error := next((text.error for text in texts if text.error is not None), None)) is not None:
                raise HalfbyteError(f"the answer has failed: {error}.") from error
            ids += [text.tokens for text in texts]
    return ids


def _read(model: Model, texts: Sequence[Text], session: Session | None) -> Writer:
    """The session's writer, or a new one, which has read these prompts, each by itself: so its bits are its own."""
    writer = None if session is None else session.writer
    if writer is None:
        length = max(len(text.prompt) + text.params.max_tokens for text in texts)
        writer = Writer(
            model, len(texts), length, rough=texts[0].sampler.greedy, exact=session is None or session.exact
        )
    if session is not None:
        session.writer = writer
    for text in sorted(texts, key=lambda text: -len(text.prompt)):
        writer.insert([text])
    return writer  # type: ignore[return-value]


def log_once(text: str) -> None:
    """A conversation would repeat it with each answer."""
    if text not in _logged:
        _logged.add(text)
        _log.info(text)
