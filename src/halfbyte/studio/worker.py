"""Short commands of a page, one at a time, answered by a process that has its libraries in memory (`cli/worker.py`).

Why: a plan is asked for at each move of a slider, and a process of its own would take three seconds to begin.
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
        """The JSON document of a command, a list as its `entries`; empty where it printed text. Raises Refusal: the
        command's error."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                pipes = (subprocess.PIPE, subprocess.PIPE, subprocess.DEVNULL)
                self._process = subprocess.Popen(_WORKER, -1, None, *pipes, cwd=self.folder, encoding="utf-8")
            assert self._process.stdin is not None and self._process.stdout is not None
            try:
                self._process.stdin.write(json.dumps(words) + "\n")
                self._process.stdin.flush()
                answer = json.loads(self._process.stdout.readline())
            except (OSError, ValueError):
                raise Refusal(500, f"halfbyte {words[0]} was ended: by its time, or for want of memory.") from None
        printed = json.loads(answer["out"]) if answer["out"].startswith(("{", "[")) else {}
        document: Document = printed if isinstance(printed, dict) else {"entries": printed}
        failure = {"message": answer["err"].strip()} if answer["code"] and not document else None
        if error := document.get("error", failure):
            raise Refusal(422, error["message"], code=error.get("kind"), param=error.get("fix"))
        return document

    def end(self) -> None:
        """End the process, whose memory is wanted, unless a command runs."""
        if self._process is not None and self._lock.acquire(blocking=False):
            self._process.kill()
            self._process.wait()
            self._lock.release()
