"""The first signal is a request, a second one ends at once, and the handlers of before come back."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfbyte import finetune
from halfbyte.report import page
from halfbyte.training import events
from halfbyte.training.events import StopRequest, stop_on_signals, without_a_terminal
from tests import tiny_run

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def terminal() -> Iterator[None]:
    """A signal as a shell leaves it, also where the tests themselves were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in BOTH]


@pytest.mark.parametrize("number", BOTH)
def test_the_first_one_is_a_request(number: signal.Signals) -> None:
    before = handlers()
    with stop_on_signals() as stop:
        assert stop.signal is None and handlers() != before
        os.kill(os.getpid(), number)
        assert stop.signal is number
    assert handlers() == before


def test_a_signal_is_told_at_once_and_once() -> None:
    before, told = handlers(), list[signal.Signals]()
    with stop_on_signals(told.append):
        os.kill(os.getpid(), signal.SIGTERM)
        assert told == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert told == [signal.SIGTERM]
    assert handlers() == before


@pytest.mark.parametrize("second", BOTH)
def test_a_second_one_ends_at_once(second: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    before = handlers()
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # at once after it: told to the process and to its group
        monkeypatch.setattr(events, "SAME_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
        assert stop.signal == signal.SIGTERM
    assert handlers() == before


def test_a_lost_terminal_ends_nothing() -> None:
    """In a process of its own, whose output is a terminal that goes away."""
    code = (
        "import os, signal\n"
        "from halfbyte.training.events import without_a_terminal\n"
        "with without_a_terminal():\n"
        "    print('begins', flush=True)\n"
        "    signal.sigwait([signal.SIGUSR1])\n"
        "    print('into nowhere', flush=True)\n"
        "    os.write(FD, b'went on')\n"
    )
    ours, theirs = pty.openpty()
    read, write = os.pipe()
    code = code.replace("FD", str(write))
    blocked = lambda: (signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]), os.setsid())  # noqa: E731
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, pass_fds=[write], preexec_fn=blocked
    )
    os.close(theirs)
    seen = b""
    while not seen.endswith(b"\n"):  # a terminal that goes away in the middle of a line fails the print itself
        seen += os.read(ours, 100)
    assert seen == b"begins\r\n"
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    os.close(write)
    assert process.wait(60) == 0 and os.read(read, 100) == b"went on"
    os.close(read)


def test_who_asked_for_nohup_keeps_it() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with without_a_terminal():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    with without_a_terminal():
        assert signal.getsignal(signal.SIGHUP) not in (signal.SIG_DFL, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGHUP) is before


def test_signals_are_ours_until_the_page_of_a_run_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM's default would end the process in the middle of it, and leave a temporary file."""
    seen = []
    monkeypatch.setattr(page, "write", lambda *args, **kwargs: seen.append(handlers()))
    before = handlers()
    finetune.train(tiny_run.recipe(tmp_path))
    assert len(seen) == 1 and all(mine != own for mine, own in zip(seen[0], before, strict=True))
    assert handlers() == before


def test_in_another_thread_signals_are_left_alone() -> None:
    before, seen = handlers(), []

    def work() -> None:
        with stop_on_signals() as stop:
            seen.append((stop, handlers()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(StopRequest(), before)]
