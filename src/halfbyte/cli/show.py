"""How the command line looks: tables, live progress on a terminal, plain lines elsewhere. Only `main.py` imports it.

Cost: rich is imported when something is drawn.
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from halfbyte.cli import show_store
from halfbyte.cli.show_store import LABEL_WIDTH
from halfbyte.training.events import Listener

if TYPE_CHECKING:
    from halfbyte.base.store import supply
    from halfbyte.base.store.build import Progress
    from halfbyte.inference.evaluate import Score

# a pipe has no width: tables then take what they need
_WIDTH = None if sys.stdout.isatty() else 160
out = Console(highlight=False, soft_wrap=True, width=_WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def gb(count: float) -> str:
    """Bytes as GB (1e9) with two or three digits: `0.27 GB`."""
    return f"{count / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def text(value: str) -> None:
    out.print(escape(value))


def labelled(label: str, value: str, *, width: int = LABEL_WIDTH) -> None:
    """A label and what it says; on a terminal a long line is cut between words and goes on under its beginning."""
    indent = width if width <= out.width // 2 else 2
    first, *rest = value.splitlines() or [""]
    for line in (f"{label:<{width}}{first}", *rest):
        wrapped(line, indent=indent)


def wrapped(line: str, *, indent: int = 2) -> None:
    """A line; on a terminal a long one is cut between words."""
    if not out.is_terminal:
        text(line)
        return
    under = " " * indent
    text(textwrap.fill(line, out.width, subsequent_indent=under, break_long_words=False, break_on_hyphens=False))


def warning(value: str) -> None:
    err.print(f"[yellow]warning:[/yellow] {escape(value)}")


def aside(value: str) -> None:
    """What goes on now, beside the output."""
    err.print(f"[dim]{escape(value)}[/dim]")


def document(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def stream(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def ask() -> str:
    return out.input("[bold cyan]you>[/bold cyan] ").strip()


class PlainListener(Listener):
    """One line for each thing that happens; steps at the logging cadence, or ten in a run when quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet, self.total, self.every, self.started, self.first = quiet, 0, 1, 0.0, 0
        self.build: show_store.PlainBuild | show_store.LiveBuild = show_store.PlainBuild(self.build_line)

    def building(self, progress: Progress) -> None:
        self.build(progress)

    def build_line(self, line: str) -> None:
        if not self.quiet:
            wrapped(line)

    def note(self, label: str, text: str) -> None:
        if not self.quiet:
            labelled(label, text)

    def begin(self, total_steps: int, done_steps: int, log_every: int) -> None:
        self.total, self.first, self.started = total_steps, done_steps, time.monotonic()
        self.every = max(1, total_steps // 10) if self.quiet else log_every

    def eta(self, step: int) -> float:
        done = step - self.first
        return (time.monotonic() - self.started) / done * (self.total - step) if done > 0 else 0.0

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] % self.every == 0 or row["step"] == self.total:
            out.print(
                f"step {row['step']}/{self.total}  loss {row['loss']:.4f}  {row['tokens_per_second']:.0f} tokens/s  "
                f"memory {gb(row.get('rss_bytes', 0))}  ETA {duration(self.eta(row['step']))}"
            )

    def evaluated(self, row: dict[str, Any]) -> None:
        best = "  (best so far)" if row.get("best") else ""
        out.print(
            f"eval at step {row['step']}: loss {row['eval_loss']:.4f}  perplexity {row['eval_perplexity']:.3f}{best}"
        )

    def saved(self, path: Path, reason: str) -> None:
        if not self.quiet:
            out.print(f"checkpoint {path}{f' ({reason})' if reason else ''}")

    def end(self) -> None: ...


class LiveListener(PlainListener):
    """A bar with step, loss, tokens/s, memory and ETA; notes and evaluations scroll above it."""

    def __init__(self) -> None:
        super().__init__(quiet=False)
        self.build = show_store.LiveBuild(out)
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn(
                "loss {task.fields[loss]}  {task.fields[rate]} tokens/s  {task.fields[memory]}  ETA {task.fields[eta]}"
            ),
            console=out,
        )
        self.task: Any = None

    def begin(self, total_steps: int, done_steps: int, log_every: int) -> None:
        super().begin(total_steps, done_steps, log_every)
        empty: dict[str, Any] = {"loss": "-", "rate": "-", "memory": "-", "eta": "-"}
        self.task = self.bar.add_task("training", total=total_steps, completed=done_steps, **empty)
        self.bar.start()

    def step(self, row: dict[str, Any]) -> None:
        self.bar.update(
            self.task,
            completed=row["step"],
            loss=f"{row['loss']:.4f}",
            rate=f"{row['tokens_per_second']:.0f}",
            memory=gb(row.get("rss_bytes", 0)),
            eta=duration(self.eta(row["step"])),
        )

    def end(self) -> None:
        self.bar.stop()


@contextmanager
def progress(*, quiet: bool, silent: bool) -> Iterator[Listener]:
    """The listener that fits: silent with --json, a live bar on a terminal, plain lines otherwise."""
    if silent:
        yield Listener()
        return
    listener = LiveListener() if out.is_terminal and not quiet else PlainListener(quiet=quiet)
    try:
        yield listener
    finally:
        listener.build.end()
        listener.end()


@contextmanager
def waiting(what: str, *, silent: bool) -> Iterator[supply.Tell]:
    """While something is opened: yields whom to tell how the building of a store goes."""
    from halfbyte.base.store import supply

    def say(text: str) -> None:
        err.print(escape(text))

    def note(label: str, text: str) -> None:
        say(text)

    if silent or not err.is_terminal:
        yield supply.Tell() if silent else supply.Tell(progress=show_store.PlainBuild(say), note=note)
        return
    with err.status(what) as status:
        yield supply.Tell(progress=lambda p: status.update(f"{what}: {show_store.line(p)}"), note=note)


@contextmanager
def counting(what: str, *, silent: bool) -> Iterator[Callable[[int, int], None]]:
    """A counter `(done, total)`; drawn on a terminal only."""
    if silent or not err.is_terminal:
        yield lambda done, total: None
        return
    with err.status(what) as status:
        yield lambda done, total: status.update(f"{done} of {total} {what}")


def report(outcome: Any) -> None:
    """The end of a run: what it reached, planned beside measured, and what to do next."""
    row = outcome.report
    loss = row["loss"]
    out.print()
    wrapped(
        f"{row['steps']} steps, {row['tokens']:,} tokens in {duration(row['train_seconds'])} "
        f"({row['tokens_per_second']:.0f} tokens/s)   loss {loss['first']:.4f} -> {loss['last']:.4f}"
        + (f"   eval loss {row['eval_loss']:.4f}" if row["eval_loss"] is not None else "")
    )
    out.print(f"peak memory {gb(row['measured']['peak_rss_bytes'])} (planned {gb(row['planned']['peak_rss_bytes'])})")
    text(
        f"adapter  {outcome.run}/adapter\n  next: halfbyte eval {outcome.run} --base   or   halfbyte chat {outcome.run}"
    )


def scores(values: dict[str, Score], samples: int) -> None:
    """Base and adapter side by side, then samples of each."""
    table = Table(header_style="bold")
    table.add_column("")
    for name in values:
        table.add_column(name, justify="right")
    table.add_row("completion loss", *(f"{s.loss:.4f}" for s in values.values()))
    table.add_row("perplexity", *(f"{s.perplexity:.3f}" for s in values.values()))
    table.add_row("exact match", *(f"{s.exact} of {s.rows} ({100 * s.exact_match:.1f}%)" for s in values.values()))
    out.print(table)
    first = next(iter(values.values()))
    for i in range(min(samples, len(first.samples))):
        sample = first.samples[i]
        out.print(f"\n[bold]{escape(sample.where)}[/bold]")
        out.print(escape(sample.prompt.strip()), style="dim")
        out.print(f"{'expected':>9}: {escape(sample.reference)}")
        for name, s in values.items():
            mark = "[green]exact[/green]" if s.samples[i].exact else "[red]differs[/red]"
            out.print(f"{name:>9}: {escape(s.samples[i].output.strip())}  {mark}")
