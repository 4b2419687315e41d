"""Commands of a page. Long ones go on without it and without the server: started, found again, stopped; short ones are
answered, one at a time, by a process that has its libraries in memory (`cli/worker.py`).

What: a folder a command: `job.json` (its words, when it began), `log`, `code` (how it ended, if a server was there) and
`lock`, which the process holds, however it ends: a server that comes later knows what still runs.
Source: flock(2): a lock belongs to the open file, which the process inherits.
"""

import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from halfbyte.runs.folder import read_json, write_json
from halfbyte.serving.http.refusal import Refusal
from halfbyte.studio.workspace import Workspace
from halfbyte.system import files
from halfbyte.system.platforms import calls
from halfbyte.types import Document

LOG_BYTES, SHOWN = 20_000, 20
_ID = re.compile(r"[\d-]{15}-[0-9a-f]{4}")
_ADDRESS = re.compile(r"at http://127\.0\.0\.1:(\d+)/v1")
_STOPPED = {code for asked in (signal.SIGINT, signal.SIGTERM) for code in (-asked, 128 + asked)}  # exit codes
_PYTHON = (sys.executable, "-P", "-m", "halfbyte")
_WORKER = (sys.executable, "-P", "-m", "halfbyte.cli.worker")  # a process for each would take three seconds to begin


@dataclass(frozen=True)
class Jobs:
    workspace: Workspace

    def start(self, words: Sequence[str]) -> Document:
        """Start a command, and say what became of it."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        folder = self.workspace.jobs / name
        folder.mkdir()
        write_json(folder / "job.json", {"words": list(words), "began": time.time()})
        plain = {**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
        with (folder / "log").open("wb") as log, (folder / "lock").open("w") as lock:
            files.lock(lock)  # for some microseconds who looks has it
            process = subprocess.Popen(
                [*_PYTHON, *words], cwd=self.workspace.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=plain, start_new_session=True, pass_fds=calls.handed_on(lock.fileno()),
            )  # fmt: skip
            lock.write(str(process.pid))
        ended = lambda: files.write(folder / "code", str(process.wait()).encode())  # noqa: E731
        threading.Thread(target=ended, daemon=True).start()
        return self.read(name)

    def read(self, name: str) -> Document:
        """What became of a command: running, done, failed, stopped (as asked); ended where that is not known.
        `port`: where it serves."""
        folder = self._folder(name)
        job, runs = read_json(folder / "job.json"), _runs(folder / "lock")
        with (folder / "log").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_BYTES))
            log = file.read().decode("utf-8", "replace")
        code = int((folder / "code").read_text()) if (folder / "code").is_file() else None
        failed = code or (code is None and re.search(r"^error: ", log, re.MULTILINE))
        ended = "stopped" if code in _STOPPED else "failed" if failed else "ended" if code is None else "done"
        state = "running" if runs else ended
        address = _ADDRESS.search(log) if runs and job["words"][0] == "serve" else None
        command, port = shlex.join(("halfbyte", *job["words"])), address and int(address[1])
        return {**job, "id": name, "command": command, "state": state, "code": code, "port": port, "log": log}

    def goes_on(self, name: str) -> tuple[bool, bool]:
        """Whether a command runs, and whether its exit code is known."""
        folder = self._folder(name)
        return _runs(folder / "lock"), (folder / "code").is_file()

    def listing(self) -> list[Document]:
        """The newest ones, without their logs."""
        names = sorted((p.name for p in self.workspace.jobs.iterdir() if _ID.fullmatch(p.name)), reverse=True)
        return [{**self.read(name), "log": None} for name in names[:SHOWN]]

    def stop(self, name: str) -> Document:
        """As Ctrl-C does: a run ends after its micro-batch, with a checkpoint; a second time at once."""
        if not self.goes_on(name)[0]:
            raise Refusal(409, "it does not run any more.", code="ended")
        os.kill(int((self._folder(name) / "lock").read_text(encoding="ascii")), signal.SIGTERM)
        return self.read(name)

    def _folder(self, name: str) -> Path:
        folder = self.workspace.jobs / name
        if not _ID.fullmatch(name) or not (folder / "lock").is_file():
            raise Refusal(404, "there is no such command.", code="missing")
        return folder


def _runs(lock: Path) -> bool:
    with lock.open("r+") as file:
        return not files.lock(file, shared=True, wait=False)


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
