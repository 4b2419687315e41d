"""What changes, as events: the folder's state, a run's metrics, a command's log.

Why: files are the only state, and a look at their dates and sizes costs microseconds: a page takes nothing from a run.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from halfbyte.runs.folder import json_rows
from halfbyte.system import files
from halfbyte.types import Document

LOOK_S, STATE_LOOKS = 0.25, 4  # the folder's state is looked at each fourth time
MAX_BYTES = 4_000_000  # of metrics, at each look
COLUMNS = frozenset({"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "rss_bytes"})


@dataclass
class MetricsTail:
    """The metrics of a run as they grow. A file that was replaced (a run goes on from an earlier step) is read anew."""

    metrics: Path
    inode: int = 0
    read: int = 0

    def news(self) -> Iterator[Document]:
        """`curves` where they begin, then new `rows`."""
        if not self.metrics.is_file():
            return
        stat = os.stat(self.metrics)
        if stat.st_ino != self.inode or stat.st_size < self.read:
            self.inode, self.read = stat.st_ino, 0
            yield {"curves": {}}
        if stat.st_size > self.read:
            with self.metrics.open("rb") as file:
                file.seek(self.read)
                whole, end, _ = file.read(MAX_BYTES).rpartition(b"\n")
            self.read += len(whole + end)
            rows = json_rows(whole.split(b"\n"))
            yield {"rows": [{n: v for n, v in r.items() if n in COLUMNS or n.startswith("eval_")} for r in rows]}


async def events(
    state: Callable[[], Document], run: Path | None, job: Callable[[], Document] | None
) -> AsyncIterator[dict[str, str]]:
    """For one page, until it goes. state: of the folder. run: whose curves. job: the command whose log is shown."""
    follower = None if run is None else MetricsTail(run / "metrics.jsonl")
    last: dict[str, Document] = {}

    def look(number: int) -> Iterator[Document]:
        yield from () if follower is None else follower.news()
        for name, whole in (("state", state), ("job", job)) if number % STATE_LOOKS == 0 else ():
            if whole is not None and (value := whole()) != last.get(name):
                last[name] = value
                yield {name: value}

    for number in count():
        for document in await asyncio.to_thread(list, look(number)):
            yield {"data": json.dumps(files.finite(document))}
        await asyncio.sleep(LOOK_S)
