"""How stores look on the command line: a build's bar with bytes, rate and time left, and what lies on the shelf.

Only `main.py` and `show.py` import it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from halfbyte.base.store import supply
    from halfbyte.base.store.build import Progress
    from halfbyte.base.store.shelf import Shelved

LABEL_WIDTH = 10
# Plain lines of a build come at most this often.
LINE_SECONDS = 5.0


def line(progress: Progress) -> str:
    """`quantising  45%  6.1 of 13.5 GB  1.21 GB/s  ETA 0:06`"""
    done, total = progress.done_bytes, progress.total_bytes
    share = f"{100 * done // total if total else 100:3d}%"
    left = progress.eta_seconds
    eta = "-" if left is None else f"{round(left) // 60}:{round(left) % 60:02d}"
    return (
        f"quantising {share}  {done / 1e9:.2f} of {total / 1e9:.2f} GB  "
        f"{progress.bytes_per_second / 1e9:.2f} GB/s  ETA {eta}"
    )


class PlainBuild:
    """A line now and then; none for a build that is over before the first is due."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write, self.lines = write, 0

    def __call__(self, progress: Progress) -> None:
        if progress.seconds >= LINE_SECONDS * (self.lines + 1):
            self.lines = int(progress.seconds / LINE_SECONDS)
            self.write(line(progress))

    def end(self) -> None: ...


class LiveBuild:
    """A bar that goes away when the store is built."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("[bold]quantising[/bold]"),
            BarColumn(bar_width=None),
            DownloadColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self.task: Any = None

    def __call__(self, progress: Progress) -> None:
        if self.task is None:
            self.task = self.bar.add_task("", total=progress.total_bytes, rate="")
            self.bar.start()
        rate = f"{progress.bytes_per_second / 1e9:.2f} GB/s"
        self.bar.update(self.task, completed=progress.done_bytes, rate=rate)
        if progress.done_bytes >= progress.total_bytes:
            self.end()

    def end(self) -> None:
        self.bar.stop()


@contextmanager
def building(console: Console, *, silent: bool) -> Iterator[supply.Tell]:
    """Whom to tell how a build goes: a bar on a terminal, lines elsewhere."""
    from halfbyte.base.store import supply

    if silent:
        yield supply.Tell()
        return

    def say(text: str) -> None:
        console.print(escape(text))

    def note(label: str, text: str) -> None:
        say(f"{label:<{LABEL_WIDTH}}{text}")

    bar = LiveBuild(console) if console.is_terminal else PlainBuild(say)
    try:
        yield supply.Tell(progress=bar, note=note)
    finally:
        bar.end()


def built(value: Any) -> str:
    """What `halfbyte quantize` has made, or found."""
    made = value.manifest
    what = f"built in {value.seconds:.1f} s" if value.built else "was there already"
    return (
        f"store    {value.path}\n"
        f"         {made.source['id']} in {made.quant['type']}: {value.manifest.nbytes / 1e9:.3f} GB for "
        f"{made.parameters:,} parameters; {what}"
    )


def shelf(console: Console, folder: Path, entries: list[Shelved]) -> None:
    """What lies on the shelf: key, source, bytes, state and last use."""
    if not entries:
        console.print(f"no stores in {folder}")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("store", "source", "GB", "state", "last used"):
        table.add_column(column, justify="right" if column == "GB" else "left", overflow="fold")
    for entry in entries:
        source = entry.manifest.source if entry.manifest else {}
        revision = f"@{source['revision'][:8]}" if source.get("revision") else ""
        state = f"{entry.state}, in use" if entry.in_use else entry.state
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        table.add_row(entry.key, escape(f"{source.get('id', '-')}{revision}"), f"{entry.nbytes / 1e9:.2f}", state, used)
    console.print(table)
    console.print(f"{len(entries)} in {folder}, {sum(entry.nbytes for entry in entries) / 1e9:.2f} GB")
