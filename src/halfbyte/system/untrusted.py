"""Limits for what a stranger has written: JSON of a bounded size, and work of bounded time and memory.

Why: a file of some kilobytes can ask for terabytes (a list of lists, a template that doubles a text), or never end.
What: JSON is looked at before it is parsed. Work that cannot be looked at before it is done (a chat template, packed
columns) is done under `limited`: on Linux an allocation past the limit fails, and in the main thread, or any other that
runs Python code, an exception ends it when its time is over.
Source: setrlimit(2), RLIMIT_AS; `PyThreadState_SetAsyncExc` of Python's C interface.
Cost: two system calls for each piece of work (3 us), a look at /proc every second; one thread that sleeps.
"""

from __future__ import annotations

import ctypes
import json
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
MOST_JSON_BYTES = 30_000_000
MOST_CONFIG_BYTES, MOST_TEMPLATE_CHARACTERS = 5_000_000, 1_000_000
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


def read_json(path: Path, most: int = MOST_JSON_BYTES) -> object:
    """The JSON in a file of UTF-8 text.

    Raises:
        OSError. ValueError: it is too long, nested too deeply, not UTF-8 or not JSON.
    """
    with path.open("rb") as file:
        return parse_json(file.read(most + 1), most)


def parse_json(raw: bytes, most: int = MOST_JSON_BYTES) -> object:
    """As `read_json`, of bytes."""
    if len(raw) > most:
        raise TooMuch(f"it is longer than {most:,} bytes")
    try:
        return json.loads(raw)
    except RecursionError:
        raise TooMuch("it is nested too deeply") from None


def read_config(path: Path) -> object:
    """A `config.json`, whose numbers can be counted up to: a model is built layer by layer, a label is an entry each.

    Raises:
        OSError. ValueError: as `read_json`; a number that no model has.
    """
    value = read_json(path, MOST_CONFIG_BYTES)
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
                most = next((n for pattern, n in _COUNTED if pattern.search(name)), 2**63)
                if isinstance(number, int | float) and not -most <= number <= most:
                    raise TooMuch(f"its {name[:80]} is {str(number)[:40]}, more than any model has ({most:,})")
    return value


@contextmanager
def limited(what: str, *, seconds: float = SECONDS, more_bytes: int = BYTES) -> Iterator[None]:
    """Do a piece of work in at most so many seconds and so many bytes above what this process has now.

    Raises:
        TooMuch: names `what`, and the limit.
    """
    with _watched(f"{what} takes longer than {seconds:.0f} s", seconds):
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
    """Render a chat template, in transformers' sandbox and in here.

    Args:
        text: the template; what is no text (several of them by name) is not looked at before.

    Raises:
        TooMuch: it takes more than it may, or calculates powers, which are one long operation that nothing can end.
    """
    if isinstance(text, str) and _has_powers(text):
        raise TooMuch("the chat template calculates powers (**), which can take for ever")
    with limited("the chat template"):
        yield


@cache
def _has_powers(text: str) -> bool:
    import jinja2

    if len(text) > MOST_TEMPLATE_CHARACTERS:
        raise TooMuch(f"the chat template is longer than {MOST_TEMPLATE_CHARACTERS:,} characters")
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


_seen: list[float] = [0.0, 0.0]


def _address_space() -> int:
    """Bytes that this process has mapped, as they were at most a second ago."""
    now = time.monotonic()
    if now > _seen[0] + 1.0:
        with open("/proc/self/statm", encoding="ascii") as file:
            _seen[:] = [now, int(file.read().split()[0]) * resource.getpagesize()]
    return int(_seen[1])


class _Watch:
    """A thread that ends the work of others when their time is over."""

    def __init__(self) -> None:
        self.lock, self.wake = threading.Lock(), threading.Event()
        self.until: dict[int, float] = {}
        self.fired: set[int] = set()
        self.thread: threading.Thread | None = None

    def run(self) -> None:
        while True:
            self.wake.wait()
            time.sleep(_TICK_S)
            with self.lock:
                now = time.monotonic()
                for number, until in list(self.until.items()):
                    if now > until and number not in self.fired:
                        self.fired.add(number)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(number), ctypes.py_object(_Late))
                if not self.until:
                    self.wake.clear()


class _Late(BaseException):
    """Is raised in the thread whose time is over; a template cannot catch it."""


_watch = _Watch()


@contextmanager
def _watched(said: str, seconds: float) -> Iterator[None]:
    number, watch = threading.get_ident(), _watch
    with watch.lock:
        outer = watch.until.get(number)
        watch.until[number] = min(outer or float("inf"), time.monotonic() + seconds)
        if watch.thread is None or not watch.thread.is_alive():  # none yet, or this process is a fork
            watch.thread = threading.Thread(target=watch.run, name="limits", daemon=True)
            watch.thread.start()
        watch.wake.set()
    try:
        yield
    except _Late:
        raise TooMuch(said) from None
    finally:
        with watch.lock:
            if outer is None:
                watch.until.pop(number, None)
            else:
                watch.until[number] = outer
            if number in watch.fired:
                watch.fired.discard(number)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(number), None)  # if it is still on its way
