"""Short commands of a page, answered by one process that has its libraries in memory (`cli/worker.py`).

Why: a plan is asked for at each move of a slider, and a process of its own would take three seconds to begin.
What: one command at a time. The process is started when it is needed, and ends when nothing was asked for a while. A
command that takes it down, or takes too long, is an error of that command alone.
"""

import json
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from halfbyte.serving.http.refusal import Refusal
from halfbyte.types import Document

_WORKER = (sys.executable, "-P", "-m", "halfbyte.cli.worker")


@dataclass
class Worker:
    """`folder`: where they run."""

    folder: Path
    _process: subprocess.Popen[str] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, *words: str) -> Document:
        """The JSON document of a command; empty where it printed text. Raises Refusal: the command's error."""
        with self._lock:
            try:
                answer = self._ask(words)
            except (OSError, ValueError):
                raise Refusal(500, f"halfbyte {words[0]} was ended: by its time, or for want of memory.") from None
        document: Document = json.loads(answer["out"]) if answer["out"].startswith("{") else {}
        words_of_it = {"message": answer["err"].strip()} if answer["code"] and not document else None
        if error := document.get("error", words_of_it):
            raise Refusal(422, error["message"], code=error.get("kind"), param=error.get("fix"))
        return document

    def _ask(self, words: tuple[str, ...]) -> Document:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                _WORKER, cwd=self.folder, encoding="utf-8", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        answer: Document = json.loads(self._process.stdout.readline())
        return answer

    def end(self) -> None:
        """End the process, unless a command runs."""
        if self._lock.acquire(blocking=False):
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            self._lock.release()
