"""What a command shows while it works: a run's steps, a build, a wait, a count. On a terminal a bar or a line that
changes, elsewhere plain lines; with --json nothing but a word about a signal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT, Signals
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from halfbyte.cli import show
from halfbyte.system.words import duration
from halfbyte.training.events import Listener

if TYPE_CHECKING:
    from halfbyte.base.store import supply
    from halfbyte.base.store.build import Progress
    from halfbyte.types import Document

# A build prints a line at most this often; with --quiet this often, and steps no less often.
LINE_SECONDS, QUIET_SECONDS = 5.0, 60.0
SCORING_SECONDS = 15.0  # alike, of rows that are scored
_nowhere = Console(quiet=True, force_terminal=False)


class SilentListener(Listener):
    """Says only that a signal was received."""

    evaluates = False

    def step(self, row: Document) -> None:
        self.evaluates = False

    def evaluating(self) -> None:
        self.evaluates = True

    def evaluated(self, row: Document) -> None:
        self.evaluates = False

    def stopping(self, signal: Signals) -> None:
        doing = "leaving this evaluation" if self.evaluates else "finishing this micro-batch"
        show.err.print(f"{signal.name}: {doing}; Ctrl-C {'again ' * (signal == SIGINT)}to stop now")


class PlainListener(SilentListener):
    """A line for each event; for steps every `log_every`, or ten in a run when quiet."""

    def __init__(self, *, quiet: bool, build: Callable[[Progress], None] | None = None) -> None:
        self.quiet, self.build = quiet, build
        self.first = self.total = 0  # steps
        self.every = 1
        self.started = self.printed = time.monotonic()

    def building(self, progress: Progress) -> None:
        if self.build is not None:
            self.build(progress)

    def note(self, label: str, text: str) -> None:
        if not self.quiet:
            show.field(label, text)

    def warn(self, text: str) -> None:
        show.warning(text)

    def begin(self, total_steps: int, done_steps: int, log_every: int) -> None:
        if done_steps:
            show.out.print(f"going on from step {done_steps}/{total_steps}")
        self.first, self.total = done_steps, total_steps
        self.started = time.monotonic()
        self.every = max(1, total_steps // 10) if self.quiet else log_every
        if self.quiet:
            show.out.print(f"training: {total_steps - done_steps} steps")
            self.printed = time.monotonic()

    def reached(self, row: Document, memory: str = "") -> str:
        done = row["step"] - self.first
        left = (time.monotonic() - self.started) / done * (self.total - row["step"]) if done > 0 else 0.0
        left = max(0.0, row.get("left_s", left))
        return (
            f"reward {row['reward']:.4f}  " if "reward" in row else f"loss {row['loss']:.4f}  "
        ) + f"{row['tokens_per_second']:.0f} tokens/s  {memory}{show.gb(row.get('rss_bytes', 0))}  ETA {duration(left)}"

    def step(self, row: Document) -> None:
        super().step(row)
        waited = self.quiet and time.monotonic() - self.printed >= QUIET_SECONDS
        if row["step"] % self.every == 0 or row["step"] == self.total or waited:
            self.printed = time.monotonic()
            show.out.print(f"step {row['step']}/{self.total}  {self.reached(row, 'memory ')}")

    def evaluated(self, row: Document) -> None:
        super().evaluated(row)
        best = "  (best so far)" if row.get("best") else ""
        if row.get("worse"):
            best = f"  ({'best so far, but ' if best else ''}{row['worse']})"
        counts = ("labelled_tokens", "tokens")
        scores = {n.removeprefix("eval_"): v for n, v in row.items() if n.startswith("eval_") and isinstance(v, float)}
        shown = (f"{n} {v:.{3 if n == 'perplexity' else 4}f}" for n, v in scores.items() if n not in counts)
        show.text(f"eval at step {row['step']}: {'  '.join(shown)}{best}")

    def saved(self, path: Path, reason: str) -> None:
        if not self.quiet:
            show.out.print(f"checkpoint {path}{f' ({reason})' if reason else ''}")

    def end(self) -> None: ...


class LiveListener(PlainListener):
    """A bar with step, loss, tokens/s, memory and ETA; notes and evaluations scroll above it."""

    def __init__(self, *, quiet: bool, build: Callable[[Progress], None] | None = None) -> None:
        super().__init__(quiet=quiet, build=build)
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        title, reached = TextColumn("[bold]training"), TextColumn("{task.description}")
        self.bar = Bar(title, BarColumn(bar_width=None), MofNCompleteColumn(), reached, console=show.out)

    def begin(self, total_steps: int, done_steps: int, log_every: int) -> None:
        super().begin(total_steps, done_steps, log_every)
        self.bar.add_task("", total=total_steps, completed=done_steps)
        self.bar.start()

    def step(self, row: Document) -> None:
        SilentListener.step(self, row)
        self.bar.update(self.bar.task_ids[0], completed=row["step"], description=self.reached(row))

    def end(self) -> None:
        self.bar.stop()


@contextmanager
def training(*, quiet: bool, silent: bool) -> Iterator[Listener]:
    """The listener that fits: silent with --json, a live bar on a terminal, plain lines otherwise."""
    if silent:
        yield SilentListener()
        return
    with _building(show.out, quiet=quiet) as build:
        kind = LiveListener if show.out.is_terminal and not quiet else PlainListener
        listener = kind(quiet=quiet, build=build)
        try:
            yield listener
        finally:
            listener.end()


@contextmanager
def _building(console: Console, *, quiet: bool = False) -> Iterator[Callable[[Progress], None]]:
    """A function that shows how a store's build goes: on a terminal a bar, which goes away at the end; elsewhere a line
    every few seconds, none for a short build."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    every_s = QUIET_SECONDS if quiet else LINE_SECONDS
    eta, due = TimeRemainingColumn(compact=True), every_s
    columns = (BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TextColumn("ETA"), eta)
    bar = Bar(TextColumn("[bold]quantising"), *columns, console=console, transient=True)

    def tell(now: Progress) -> None:
        nonlocal due
        if console.is_terminal and not quiet:
            if not bar.tasks:
                bar.add_task("", total=now.total_bytes)
                bar.start()
            bar.update(bar.task_ids[0], completed=now.done_bytes)
            if now.done_bytes >= now.total_bytes:
                bar.stop()
        elif now.seconds >= due:
            due = now.seconds // every_s * every_s + every_s
            console.print(escape(line(now)))

    try:
        yield tell
    finally:
        if bar.tasks:  # a bar that was never drawn prints an empty line when it is stopped
            bar.stop()


def line(now: Progress) -> str:
    """`quantising  45%  6.10 of 13.50 GB  1.21 GB/s  ETA 0:06`"""
    done, total = now.done_bytes, now.total_bytes
    eta = "-" if now.eta_seconds is None else duration(now.eta_seconds)
    percent = 100 * done // total if total else 100
    size = f"{done / 1e9:.2f} of {show.gb(total)}"
    return f"quantising {percent:3d}%  {size}  {show.gb(now.bytes_per_second)}/s  ETA {eta}"


@contextmanager
def quantizing(*, silent: bool) -> Iterator[supply.Tell]:
    """While a store is built: what its progress and notes are given to."""
    from halfbyte.base.store import supply

    console = _nowhere if silent else show.err
    with _building(console) as tell:
        yield supply.Tell(
            progress=tell, note=lambda label, text: console.print(escape(f"{label:<{show.LABEL_WIDTH}}{text}"))
        )


@contextmanager
def waiting(what: str, *, silent: bool) -> Iterator[supply.Tell]:
    """While something is opened: the same for a store that is built on the way."""
    from halfbyte.base.store import supply

    console = _nowhere if silent else show.err
    with (console if console.is_terminal else _nowhere).status(what) as status, _building(console) as tell:
        yield supply.Tell(
            progress=(lambda now: status.update(f"{what}: {line(now)}")) if console.is_terminal else tell,
            note=lambda label, text: console.print(escape(text)),
        )


@contextmanager
def scoring(*, silent: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A function of (what, done, total): on a terminal a line that changes, elsewhere one every `SCORING_SECONDS`."""
    stage, first = "", 0
    began = printed = time.monotonic()
    with (show.err if show.err.is_terminal and not silent else _nowhere).status("scoring") as status:

        def tell(what: str, done: int, total: int) -> None:
            nonlocal stage, first, began, printed
            now = time.monotonic()
            if what != stage:
                stage, first = what, done - 1
                began = now
            left = (now - began) / max(1, done - first) * (total - done)
            line = f"{what}  {done:,} of {total:,}  ETA {duration(left)}"
            status.update(line)
            if now - printed >= SCORING_SECONDS and not silent and not show.err.is_terminal:
                printed = now
                show.err.print(line)

        yield tell


@contextmanager
def counting(what: str, *, silent: bool) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total); shown on a terminal only."""
    with (show.err if show.err.is_terminal and not silent else _nowhere).status(what) as status:
        yield lambda done, total: status.update(f"{done} of {total} {what}")
