"""Words as they grow, what ends a text, and how a token is drawn, against definitions written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.serving.models import Named
from halfbyte.serving.text import Piece, Text, Wish, Words, _nucleus
from tests import tiny_run


def model(stops: frozenset[int] = frozenset({2})) -> Named:
    return Named("m", None, tiny_run.tokenizer(), stops, 20)


@given(st.text(max_size=40))
def test_words_are_those_of_all_tokens_at_once(text: str) -> None:
    ids = tiny_run.tokenizer()(text)["input_ids"]
    words = Words(tiny_run.tokenizer())
    parts = [words.add(token) for token in ids]
    assert "".join(parts) + words.rest() == tiny_run.tokenizer().decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in part for part in parts) or "\ufffd" in text


def said(text: Text, tokens: list[int]) -> list[Piece]:
    """What a text says whose logits ask for these tokens."""
    made = []
    for token in tokens:
        logits = torch.zeros(tiny_run.VOCAB)
        logits[token] = 9.0
        piece = text.take(logits)
        made += [piece] if piece is not None else []
        if piece is not None and piece.finish is not None:
            break
    return made


@given(st.text("ab c", max_size=12), st.lists(st.text("ab ", min_size=1, max_size=3), max_size=3))
def test_a_text_ends_before_what_stops_it_and_nothing_of_that_was_sent(text: str, stops: list[str]) -> None:
    ids = list(tiny_run.tokenizer()(text)["input_ids"])
    pieces = said(Text.begun(model(), Wish(50, stops=tuple(stops)), 0, None), [*ids, 2])
    whole = tiny_run.tokenizer().decode(ids)
    ends = [n for n in range(len(whole) + 1) if any(whole[:n].endswith(stop) for stop in stops)]
    found = "".join(piece.text for piece in pieces)
    assert pieces[-1].finish == "stop"
    if not ends:
        assert found == whole
    else:  # of stops that are there when the first one is whole, the earliest; a token may bring more of them
        assert whole.startswith(found) and not any(stop in found for stop in stops)
        assert any(whole[len(found) :].startswith(stop) for stop in stops)


def test_most_tokens_and_tokens_that_end() -> None:
    ids = list(tiny_run.tokenizer()("red green blue cup box tree")["input_ids"])
    pieces = said(Text.begun(model(), Wish(3), 4, None), ids)
    assert pieces[-1].finish == "length" and pieces[-1].tokens == 3 and pieces[-1].index == 4
    pieces = said(Text.begun(model(frozenset({ids[2]})), Wish(9), 0, None), ids)
    assert pieces[-1].finish == "stop" and pieces[-1].tokens == 3


def test_logits_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(FloatingPointError):
        Text.begun(model(), Wish(3), 0, None).take(torch.full((tiny_run.VOCAB,), torch.nan))


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("size", [5, 3000])
def test_the_nucleus_is_that_of_its_definition(top_p: float, size: int) -> None:
    torch.manual_seed(size)
    chances = torch.softmax(torch.randn(size, dtype=torch.float64) * 0.3, -1)
    kept, total = set(), 0.0
    for token in sorted(range(size), key=lambda i: -float(chances[i])):
        kept.add(token)
        total += float(chances[token])
        if total >= top_p:
            break
    assert set(_nucleus(chances, top_p).nonzero().flatten().tolist()) == kept


def test_draws_have_the_chances_of_the_temperature() -> None:
    text: Any = Text.begun(model(), Wish(10**6, temperature=0.5, seed=1), 0, None)
    logits = torch.tensor([0.0, 0.5, 1.0])
    count = 4000
    drawn = torch.bincount(torch.tensor([text._choose(logits) for _ in range(count)]), minlength=3) / count
    wanted = torch.softmax(logits / 0.5, -1)
    # 5 standard deviations of a share
    assert bool(((drawn - wanted).abs() < 5 * (wanted * (1 - wanted) / count).sqrt()).all())
