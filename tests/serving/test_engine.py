"""What the engine sends, and when: an answer's first and last text at once, what is between in parts of a while."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.serving import engine
from halfbyte.serving.engine import Engine
from halfbyte.serving.text import Piece, Told


def gathering(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any], list[float]]:
    """An engine without a model, what it has sent, and a clock."""
    made, sent, now = Engine.__new__(Engine), list[Any](), [100.0]
    made._gathered, made._sent_at = [], 0.0
    monkeypatch.setattr(made, "_post", lambda some: sent.append(some))
    monkeypatch.setattr(engine.time, "monotonic", lambda: now[0])
    return made, sent, now


def test_pieces_of_a_while_are_sent_together_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    made, sent, now = gathering(monkeypatch)
    a, b = "one ask", "another"
    told = [Told(n, -0.5) for n in range(4)]
    made._gather([(a, Piece(0, "a", 1, (told[0],)))])
    assert sent == [[(a, Piece(0, "a", 1, (told[0],)))]]  # an answer's first text
    for n, text in enumerate("bc", 2):
        now[0] += 0.004
        made._gather([(a, Piece(0, text, n, (told[n],))), (b, Piece(1, text.upper(), n))])
    assert len(sent) == 1
    now[0] += engine.GATHERED_S
    made._gather([(a, Piece(1, "x", 4))])
    assert sent[1:] == [[(a, Piece(0, "bc", 3, (told[2], told[3]))), (b, Piece(1, "BC", 3)), (a, Piece(1, "x", 4))]]
    made._gather([(b, Piece(1, "d", 5))])
    made._gather([(b, Piece(1, "e", 6, finish="stop"))])
    assert sent[2:] == [[(b, Piece(1, "de", 6, finish="stop"))]]  # and its last


def test_an_error_comes_at_once_after_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    made, sent, _ = gathering(monkeypatch)
    made._sent_at = engine.time.monotonic()
    made._gather([("ask", Piece(0, "b", 2))])
    error = RuntimeError("of a step")
    made._gather([("ask", error)])
    assert sent == [[("ask", Piece(0, "b", 2)), ("ask", error)]]
