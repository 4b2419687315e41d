"""The first signal is a request, a second SIGINT ends at once, and the handlers of before come back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from halfbyte.training.events import StopRequest, stop_on_signals

BOTH = (signal.SIGINT, signal.SIGTERM)


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


def test_a_second_interrupt_ends_at_once_and_a_second_termination_does_not() -> None:
    before = handlers()
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
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
