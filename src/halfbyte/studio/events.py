"""What changes, as events: the folder's state, a run's metrics, a command's log.

Why: files are the only state, and a look at their dates and sizes costs microseconds: a page takes nothing from a run.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from halfbyte.runs.folder import RunFolder, json_rows
from halfbyte.system import files
from halfbyte.types import Document

LOOK_S, STATE_LOOKS = 0.7, 3  # the folder's state is looked at each third time, and where what is followed ends
MAX_BYTES = 4_000_000  # of metrics, at each look
COLUMNS = frozenset({"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "rss_bytes"})


@dataclass
class MetricsTail:
    """The metrics of a run as they grow. A file that was replaced (a run goes on from an earlier step) is read anew."""

    metrics: Path
    inode: int = 0
    read: int = 0

    def news(self) -> Document:
        """`curves` where they begin, and new `rows`."""
        news = Document()
        if not self.metrics.is_file():
            return news
        stat = os.stat(self.metrics)
        if stat.st_ino != self.inode or stat.st_size < self.read:
            self.inode, self.read = stat.st_ino, 0
            news["curves"] = {}
        if stat.st_size > self.read:
            with self.metrics.open("rb") as file:
                file.seek(self.read)
                whole, end, _ = file.read(MAX_BYTES).rpartition(b"\n")
            self.read += len(whole + end)
            rows = json_rows(whole.split(b"\n"))
            news["rows"] = [{n: v for n, v in r.items() if n in COLUMNS or n.startswith("eval_")} for r in rows]
        return news


async def events(
    state: Callable[[], Document], run: Path | None, job: Callable[[], Document] | None, goes_on: Callable[[], object]
) -> AsyncIterator[dict[str, str]]:
    """For a page, until it goes: an event a look. state: of the folder. run: whose curves. job: whose log is shown,
    `goes_on` whether it runs, and whether its end is known."""
    follower = None if run is None else MetricsTail(run / "metrics.jsonl")
    last, since = Document(), STATE_LOOKS

    def look(since: int) -> tuple[Document, int]:
        news = Document() if follower is None else follower.news()
        running = (goes_on(), run and RunFolder(run).writer())
        if since < STATE_LOOKS - bool(news) and running == last.get("running"):
            return news, since + 1
        last["running"] = running
        now = {"state": state()} | ({} if job is None else {"job": job()})
        news |= {name: value for name, value in now.items() if value != last.get(name)}
        last.update(now)
        return news, 1

    while True:
        news, since = await asyncio.to_thread(look, since)
        if news:
            yield {"data": json.dumps(files.finite(news))}
        await asyncio.sleep(LOOK_S)
