"""Text from a base or from base and adapter: batches, streams, and the tokens that end a turn.

Source: transformers' `generate`; left padding with an attention mask, greedy unless a temperature is given. Its loop is
ours (`decode.py`) where that is proven on the prompts; else the model's own, and the log says so.
Cost: each new token reads the base once for up to 16 texts; by the model's own loop it dequantises the base once.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import StoppingCriteria, TextStreamer

from halfbyte.errors import DataError, first_line
from halfbyte.inference import decode
from halfbyte.layers.decoding.tape import MAX_VECTORS
from halfbyte.models.context import Context, context_of
from halfbyte.system import limits
from halfbyte.types import Document, Model, Tokenizer

_log = logging.getLogger(__name__)
_said: set[str] = set()


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. `temperature` 0 is greedy; `seed` makes sampling repeatable."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None


class _Stream(TextStreamer):
    def __init__(self, tokenizer: Tokenizer, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.emit(text)


class _Each(StoppingCriteria):
    """Asked after each token; a forward that an exception leaves in the middle would leave PEFT's hooks behind."""

    def __init__(self, ends: Callable[[], bool]) -> None:
        self.ends = ends

    def __call__(self, input_ids: torch.Tensor, scores: object, **more: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self.ends(), dtype=torch.bool, device=input_ids.device)


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Document], tools: Sequence[Document] | None = None) -> list[int]:
    """Token ids of a conversation up to where the assistant speaks; the plain text where there is no chat template.

    Args:
        tools: as the template takes them; None: none.
    """
    given: Document = {"tools": list(tools)} if tools else {}
    if tokenizer.chat_template:
        try:
            with limits.template(tokenizer.chat_template):
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
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        ids.add(end_of_turn_id(tokenizer))
    return sorted(i for i in ids if i is not None)


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
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    emit: Callable[[str], None] | None = None,
    each: Callable[[], bool] | None = None,
    kept: decode.Kept | None = None,
) -> list[str]:
    """Continue each prompt (token ids).

    Args:
        emit: takes new text as it comes; of one prompt only.
        each: called after each token; True ends the answers there, as far as they are.
        kept: of one prompt: what of it was read by the call before, with the same adapter; then what this one read.

    Raises:
        DataError: prompt and answer are longer than what the model reads at once.
    """
    if (context := context_of(model.config)) is not None:
        context.check(max(map(len, prompts)), sampling.max_new_tokens)
    if sampling.temperature > 0 and sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    writer = _Writer(model, tokenizer, sampling, emit, each, kept)
    was_training, texts = model.training, []
    model.eval()
    try:
        for start in range(0, len(prompts), MAX_VECTORS):
            state = torch.get_rng_state()
            try:
                texts += writer.write(prompts[start : start + MAX_VECTORS], fast=True)
            except decode.Slower as why:
                say(f"tokens come from the model's own forward, which is slower: {why}")
                torch.set_rng_state(state)
                texts += writer.write(prompts[start:], fast=False)
                break
    finally:
        model.train(was_training)
    return texts


def say(text: str) -> None:
    """To the log, once: a conversation would repeat it with each answer."""
    if text not in _said:
        _said.add(text)
        _log.info(text)


@dataclass(frozen=True)
class _Writer:
    model: Model
    tokenizer: Tokenizer
    sampling: Sampling
    emit: Callable[[str], None] | None
    each: Callable[[], bool] | None = None
    kept: decode.Kept | None = None

    def write(self, prompts: Sequence[Sequence[int]], *, fast: bool) -> list[str]:
        """Texts of these prompts as one batch, by our loop or by the model's own."""
        model, tokenizer, sampling = self.model, self.tokenizer, self.sampling
        width, device = max(map(len, prompts)), next(model.parameters()).device
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        ids = torch.full((len(prompts), width), pad, device=device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(list(prompt), device=device)
            mask[row, width - len(prompt) :] = 1
        chosen: Document = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}
        streamer = _Stream(tokenizer, self.emit) if self.emit is not None else None
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=stop_ids(model, tokenizer),
                pad_token_id=pad,
                use_cache=True,
                streamer=streamer,
                stopping_criteria=None if self.each is None else [_Each(self.each)],
                custom_generate=decode.Loop(streamer, self.kept) if fast else None,
                **chosen,
            )
        return [str(text) for text in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]
