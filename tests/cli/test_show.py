"""Labels are padded to one column, and long lines on a terminal go on under their beginning."""

from __future__ import annotations

import signal

import pytest
from rich.console import Console

from halfbyte.cli import progress, show
from halfbyte.system.words import duration


def printed(patch: pytest.MonkeyPatch, label: str, value: str, *, columns: int | None = None, width: int = 10) -> str:
    console = Console(width=columns, force_terminal=columns is not None, color_system=None, soft_wrap=True)
    patch.setattr(show, "out", console)
    with console.capture() as captured:
        show.field(label, value, width=width)
    return captured.get()


def test_a_label_and_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(monkeypatch, "data", "16 rows") == "data      16 rows\n"
    assert printed(monkeypatch, "recompute", "full", width=21) == "recompute            full\n"
    assert printed(monkeypatch, "note", "") == "note      \n"
    assert printed(monkeypatch, "note", "[bold] is text") == "note      [bold] is text\n", "no markup"


def test_the_label_stands_before_the_first_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(monkeypatch, "note", "one\n  two") == "note      one\n  two\n"


def test_a_pipe_is_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    long = " ".join(["word"] * 100)
    assert printed(monkeypatch, "note", long) == f"note      {long}\n"


def test_a_terminal_wraps_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    said = printed(monkeypatch, "note", "one two three four five", columns=20)
    assert said == "note      one two\n          three four\n          five\n"
    narrow = printed(monkeypatch, "note", "one two three", columns=12)
    assert narrow == "note\n  one two\n  three\n", "no room for a column of labels"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGINT, "SIGINT: finishing this micro-batch; Ctrl-C again to stop now\n"),
        (signal.SIGTERM, "SIGTERM: finishing this micro-batch; Ctrl-C to stop now\n"),
    ],
)
def test_a_signal_is_acknowledged(number: signal.Signals, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    for silent, quiet in ((True, True), (False, True), (False, False)):
        with progress.training(quiet=quiet, silent=silent) as listener:
            listener.stopping(number)
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("interval", "words"), [([0.25, 1.0], "0.5000 [0.2500, 1.0000]"), (None, "0.5000"), ([None, None], "0.5000")]
)
def test_a_value_and_its_interval(interval: list[float] | None, words: str) -> None:
    assert show.estimate(0.5, interval) == words
