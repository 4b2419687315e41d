"""Characters as a text grows, what ends it, and how a token is drawn, against definitions written out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from halfbyte.writing.sampling import Sampler, SamplingParams, top_p_of
from halfbyte.writing.text import Detokenizer, Text, TextChunk, _stop_begun, token_bytes
from tests import tiny_run


def begun(params: SamplingParams, stop_ids: frozenset[int] = frozenset({2}), index: int = 0) -> Text:
    return Text([5], params, stop_ids, index=index, detokenizer=Detokenizer(tiny_run.tokenizer()))


@given(st.text(max_size=40), st.booleans())
def test_characters_are_those_of_all_tokens_at_once(text: str, fast: bool) -> None:
    ids = tiny_run.tokenizer()(text)["input_ids"]
    detokenizer = Detokenizer(tiny_run.tokenizer())
    detokenizer.stream = detokenizer.stream if fast else None
    parts = [detokenizer.add(token) for token in ids]
    assert "".join(parts) + detokenizer.rest() == tiny_run.tokenizer().decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in part for part in parts) or "\ufffd" in text


def chunks(text: Text, tokens: list[int]) -> list[TextChunk]:
    """What a text says whose logits ask for these tokens."""
    said = []
    for token in tokens:
        logits = torch.zeros(tiny_run.VOCAB)
        logits[token] = 9.0
        text.take(logits)
        if (chunk := text.chunk()) is not None:
            said.append(chunk)
        if text.ended:
            break
    return said


@given(st.text("ab c", max_size=12), st.lists(st.text("ab ", min_size=1, max_size=3), max_size=3))
def test_a_text_ends_before_what_stops_it_and_nothing_of_that_was_sent(text: str, stops: list[str]) -> None:
    ids = list(tiny_run.tokenizer()(text)["input_ids"])
    said = chunks(begun(SamplingParams(50, stop=tuple(stops))), [*ids, 2])
    whole = tiny_run.tokenizer().decode(ids)
    ends = [n for n in range(len(whole) + 1) if any(whole[:n].endswith(stop) for stop in stops)]
    sent = "".join(chunk.text for chunk in said)
    assert said[-1].finish == "stop"
    if not ends:
        assert sent == whole
    else:  # of stops that are there when the first one is whole, the earliest; a token may bring more of them
        assert whole.startswith(sent) and not any(stop in sent for stop in stops)
        assert any(whole[len(sent) :].startswith(stop) for stop in stops)


def test_max_tokens_and_tokens_that_end() -> None:
    ids = list(tiny_run.tokenizer()("red green blue cup box tree")["input_ids"])
    said = chunks(begun(SamplingParams(3), index=4), ids)
    assert said[-1].finish == "length" and said[-1].tokens == 3 and said[-1].index == 4
    said = chunks(begun(SamplingParams(9), frozenset({ids[2]})), ids)
    assert said[-1].finish == "stop" and said[-1].tokens == 3


def test_a_text_that_is_ended_early_says_what_it_has() -> None:
    text = begun(SamplingParams(9, stop=("cup of tea",)))
    ids = list(tiny_run.tokenizer()("red cup")["input_ids"])
    sent = "".join(chunk.text for chunk in chunks(text, ids))
    assert "red cup".startswith(sent) and sent != "red cup"  # it may become a stop
    text.end()
    last = text.chunk()
    assert text.ended and last is not None and sent + last.text == "red cup"


def test_logits_that_are_no_numbers_are_an_error_of_that_text() -> None:
    for temperature in (0.0, 1.0):
        text = begun(SamplingParams(3, temperature=temperature))
        text.take(torch.full((tiny_run.VOCAB,), torch.nan))
        assert isinstance(text.error, FloatingPointError | RuntimeError) and text.ended and text.tokens == []


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("size", [5, 3000])
def test_top_p_is_that_of_its_definition(top_p: float, size: int) -> None:
    torch.manual_seed(size)
    probabilities = torch.softmax(torch.randn(size, dtype=torch.float64) * 0.3, -1)
    nucleus, total = set(), 0.0
    for token in sorted(range(size), key=lambda i: -float(probabilities[i])):
        nucleus.add(token)
        total += float(probabilities[token])
        if total >= top_p:
            break
    assert set(top_p_of(probabilities, top_p).nonzero().flatten().tolist()) == nucleus


def test_draws_have_the_probabilities_of_the_temperature_and_repeat_with_the_seed() -> None:
    logits, count = torch.tensor([0.0, 0.5, 1.0]), 4000

    def drawn(seed: int, index: int = 0) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=0.5, seed=seed), index)
        return [sampler.choose(logits, (), ()) for _ in range(count)]

    share = torch.bincount(torch.tensor(drawn(1)), minlength=3) / count
    wanted = torch.softmax(logits / 0.5, -1)
    # 5 standard deviations of a share
    assert bool(((share - wanted).abs() < 5 * (wanted * (1 - wanted) / count).sqrt()).all())
    assert drawn(1) == drawn(1) != drawn(2) and drawn(1, 1) == drawn(2)


class Stop(str):
    """Counts the characters that are copied out of it."""

    copied = 0

    def __getitem__(self, part: Any) -> str:
        Stop.copied += len(piece := super().__getitem__(part))
        return piece


def test_a_long_stop_costs_a_token_no_more_than_the_text_is_long() -> None:
    text = "red cup " * 60
    assert _stop_begun(text, [Stop("red cup " * 12_500)]) == len(text)
    assert _stop_begun(text, [Stop("no" * 50_000)]) == 0
    assert Stop.copied <= 2 * len(text) ** 2


def test_the_bytes_of_a_token_are_those_of_its_text() -> None:
    tokenizer = tiny_run.tokenizer()
    for text in ("red cup", "\u00e9\U0001f600\n\t\x00\u00ad", "\u4e16"):
        assert b"".join(token_bytes(tokenizer, token) for token in tokenizer(text)["input_ids"]) == text.encode()
    word = SimpleNamespace(convert_ids_to_tokens=lambda token: "\u00e9", decode=lambda tokens: "\u00e9")
    assert token_bytes(word, 5) == "\u00e9".encode(), "of a tokenizer whose words are not of bytes"


def test_a_byte_that_is_no_letter_ends_no_answer() -> None:
    """With byte fallback a run of bytes that is no text changes what was sent of its beginning."""
    tokens = {token: number for number, token in enumerate(["▁a", *(f"<0x{n:02X}>" for n in range(256))])}
    backend = Tokenizer(models.BPE(vocab=tokens, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    detokenizer = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    pieces = [detokenizer.add(tokens[token]) for token in ("▁a", "<0x50>", "<0xE6>", "▁a", "▁a")]
    assert "".join(pieces) + detokenizer.rest() == " aP\ufffd a a"
