"""Limits for what a stranger has written: JSON of a bounded size, and work of bounded time and memory.

Why: a file of some kilobytes can ask for terabytes (a list of lists, a template that doubles a text), or never end.
What: JSON is looked at before it is parsed. Work that cannot be looked at before it is done (a chat template, packed
columns) is done under `limited`: on Linux an allocation past the limit fails, and in the main thread, or any other that
runs Python code, an exception ends it when its time is over.
Source: setrlimit(2), RLIMIT_AS; `PyThreadState_SetAsyncExc` of Python's C interface.
Cost: two system calls and a look at /proc for each piece of work (8 us); one thread that sleeps.
"""

import ctypes
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# An empty list takes 3 bytes of JSON and 64 of memory: what this many bytes of JSON become stays below 0.7 GB.
MAX_JSON_BYTES = 30_000_000
MAX_CONFIG_BYTES, MAX_TEMPLATE_CHARACTERS = 5_000_000, 1_000_000
# Names of numbers that are counted up to when a config or a model is made, and the most that is allowed.
_COUNTED = (
    (re.compile(r"(^|_)(num|n)_?.*_?layers?(_|$)|^n_?layers?$|^layers$|_depth$|^depth$|_blocks$"), 2_000),
    (re.compile(r"num_labels|experts?$|_heads?$|_heads_"), 100_000),
    (re.compile(r"."), 2**53),
)
SECONDS, BYTES = 5.0, 1_000_000_000
_TICK_S = 0.05


class TooMuch(ValueError):
    """A stranger's file or template that takes more time or memory than it may."""


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> object:
    """The JSON in a file of UTF-8 text. Raises OSError. ValueError: it is too long, nested too deeply, not UTF-8 or not
    JSON."""
    with path.open("rb") as file:
        return parse_json(file.read(max_bytes + 1), max_bytes)


def parse_json(raw: bytes, max_bytes: int = MAX_JSON_BYTES) -> object:
    """As `read_json`, of bytes."""
    if len(raw) > max_bytes:
        raise TooMuch(f"it is longer than {max_bytes:,} bytes")
    try:
        return json.loads(raw)
    except RecursionError:
        raise TooMuch("it is nested too deeply") from None


def read_config(path: Path) -> object:
    """A `config.json`, whose numbers can be counted up to: a model is built layer by layer, a label is an entry each.
    Raises OSError. ValueError: as `read_json`; a number that no model has."""
    value = read_json(path, MAX_CONFIG_BYTES)
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            waiting += part.values()
            for name, number in part.items():
                if name == "model_type" and not isinstance(number, str | None):
                    raise TooMuch(f"its model_type is {str(number)[:40]}, not a name")
                largest = next((n for pattern, n in _COUNTED if pattern.search(name)), 2**63)
                if isinstance(number, int | float) and not -largest <= number <= largest:
                    raise TooMuch(f"its {name[:80]} is {str(number)[:40]}, more than any model has ({largest:,})")
    return value


@contextmanager
def limited(what: str, *, seconds: float = SECONDS, more_bytes: int = BYTES) -> Iterator[None]:
    """Do a piece of work in at most so many seconds and so many bytes above what this process has now. Raises TooMuch:
    names `what`, and the limit."""
    with _watch.limit(f"{what} takes longer than {seconds:.0f} s", seconds):
        before = _lower(more_bytes)
        try:
            yield
        except MemoryError:
            raise TooMuch(f"{what} takes more than {more_bytes / 1e9:.0f} GB of memory") from None
        finally:
            if before is not None:
                resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def template(text: object) -> Iterator[None]:
    """Render a chat template, in transformers' sandbox and in here. `text`: the template; what is no text (several of
    them by name) is not looked at before. Raises TooMuch: it takes more than it may, or calculates powers, which are
    one long operation that nothing can end."""
    if isinstance(text, str) and _has_powers(text):
        raise TooMuch("the chat template calculates powers (**), which can take for ever")
    with limited("the chat template"):
        yield


@cache
def _has_powers(text: str) -> bool:
    import jinja2

    if len(text) > MAX_TEMPLATE_CHARACTERS:
        raise TooMuch(f"the chat template is longer than {MAX_TEMPLATE_CHARACTERS:,} characters")
    try:
        parts = jinja2.Environment().lex(text)  # nothing is rendered  # nosec B701
        return any(kind == "operator" and value == "**" for _, kind, value in parts)
    except jinja2.TemplateError:
        return False  # whoever compiles it says what is wrong


def _lower(more_bytes: int) -> tuple[int, int] | None:
    """Limit this process's address space; what it was, None where that is not done."""
    if resource is None or sys.platform != "linux":
        return None
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + more_bytes
    if before[0] != resource.RLIM_INFINITY and before[0] <= limit:
        return None
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    return before


def _address_space() -> int:
    """Bytes that this process has mapped. Takes 5 us."""
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(file, 64).split()[0]) * resource.getpagesize()
    finally:
        os.close(file)


class _Late(BaseException):
    """Is raised in the thread whose time is over; a template cannot catch it."""


class Watch:
    """A thread that ends the work of others when their time is over."""

    def __init__(self) -> None:
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._deadlines: dict[int, tuple[int | None, float]] = {}  # by thread: on which clock, when
        self._fired: set[int] = set()
        self._thread: threading.Thread | None = None

    @contextmanager
    def limit(self, message: str, seconds: float) -> Iterator[None]:
        """Do a piece of work of this thread in at most so many seconds of a core, so that a busy or a stopped machine
        ends nothing. Raises TooMuch: with this message."""
        number = threading.get_ident()  # whose CPU time is looked at, where the system has a clock of it
        clock = time.pthread_getcpuclockid(number) if hasattr(time, "pthread_getcpuclockid") else None
        with self._lock:
            outer = self._deadlines.get(number)
            ends = _now(clock) + seconds
            self._deadlines[number] = (clock, ends if outer is None else min(outer[1], ends))
            if self._thread is None or not self._thread.is_alive():  # none yet, or this process is a fork
                self._thread = threading.Thread(target=self._run, name="limits", daemon=True)
                self._thread.start()
            self._wake.set()
        try:
            yield
        except _Late:
            raise TooMuch(message) from None
        finally:
            with self._lock:
                if outer is None:
                    self._deadlines.pop(number, None)
                else:
                    self._deadlines[number] = outer
                if number in self._fired:
                    self._fired.discard(number)
                    _raise_in(number, None)  # if it is still on its way

    def _run(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(_TICK_S)
            with self._lock:
                for number, (clock, deadline) in list(self._deadlines.items()):
                    if number not in self._fired and _is_over(clock, deadline):
                        self._fired.add(number)
                        _raise_in(number, _Late)
                if not self._deadlines:
                    self._wake.clear()


def _now(clock: int | None) -> float:
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _is_over(clock: int | None, deadline: float) -> bool:
    try:
        return _now(clock) > deadline
    except OSError:  # a thread of the process that this one is a fork of
        return False


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an error in another thread, or take back the one that is on its way."""
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


_watch = Watch()
