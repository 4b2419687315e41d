"""The run folder: create it, lock it, append metrics, find it again.

Who may write into a run folder: after `create` has made it whole, only the process that holds its `lock`, but for
`eval/` and `report.html`, which `eval` and `report` write without it. `merge` and
`export` add new folders, in the run where no other place is named; they replace nothing.
Why: a run never overwrites another, two processes never write one, and a crash at any moment leaves files that can be
read: the folder appears whole, JSON is replaced in one step, metrics grow by whole lines, a torn last one is cut away.
Where the disk is full, a write is tried again for some minutes (`DiskRetry`): the end of a run of hours must not be
lost for want of some megabytes that another program holds.
Source: `rename(2)` (atomic within a file system), `flock(2)` (released by the kernel when its process ends).
Cost: one small write a step.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

from halfbyte.errors import DiskFull, RunError, typed
from halfbyte.recipe.adapter_folder import is_run
from halfbyte.system import files
from halfbyte.types import Document

T = TypeVar("T")
ANOTHER = "give another output: (--output)"

EXPORT = "export.json"  # of a folder that `merge` or `export` has added
RETRY_FOR_S = 600.0
RETRY_EVERY_S = 1.0
VERIFIED_FROM_S = 60.0  # a second process looks at the adapter of a run of so many seconds


def check_writable(folder: Path, fix: str) -> None:
    """Raise a RunError if nothing can be written into a folder that is there or would be made."""
    if why := files.why_unwritable(folder.absolute()):
        raise RunError(f"{folder} cannot be written: {why}.", fix=fix)


@dataclass
class RunFolder:
    """A run on disk, with the paths of its files, whether they exist yet or not. Who may write: above.
    `unwritten`: rows of metrics for which the disk had no space yet."""

    path: Path
    unwritten: list[Document] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.recipe = self.path / "recipe.yaml"
        self.plan = self.path / "plan.json"
        self.metrics = self.path / "metrics.jsonl"
        self.report = self.path / "report.json"
        self.adapter = self.path / "adapter"
        self.held_out = self.path / "held_out.arrow"
        self.reference = self.path / "reference.json"
        self.checkpoints = self.path / "checkpoints"
        self.proof = self.path / "proof.json"
        self.started = self.path / "started.json"
        self.page = self.path / "report.html"

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise a RunError if something is at `path` already, or no folder can be made there."""
        if path.exists() or path.is_symlink():
            raise _busy(path) or _exists(path)
        above = next((p for p in path.absolute().parents if p.exists()), Path("/"))
        if not above.is_dir() or not os.access(above, os.W_OK):
            why = f"{above} is a file" if not above.is_dir() else f"{above} is not writable"
            raise RunError(f"the run folder {path} cannot be made: {why}.", fix=ANOTHER)
        if why := files.why_unwritable(above):  # whoever may write everywhere cannot write into /proc
            raise RunError(f"the run folder {path} cannot be made: {why}.", fix=ANOTHER)

    @classmethod
    def create(cls, path: Path, recipe_yaml: str, more: Mapping[str, bytes] | None = None) -> Self:
        """A run folder with its recipe and `more` files, whole or not at all. Raises RunError: it cannot be made."""
        cls.check_free(path)
        temporary = files.beside(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.clear_dead(path.parent, path.name)
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "checkpoints").mkdir(parents=True)
            files.write(temporary / "recipe.yaml", recipe_yaml.encode())
            for name, content in (more or {}).items():
                files.write(temporary / name, content)
            os.rename(temporary, path)  # refuses where another run has appeared
            files.sync(path.parent)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if path.exists():  # another process was faster
                raise _exists(path) from error
            if files.is_full(error):
                raise RunError(files.no_space(path, len(recipe_yaml)), fix=f"free some space, or {ANOTHER}") from error
            raise RunError(f"the run folder {path} cannot be made: {error.strerror}.", fix=ANOTHER) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path, *, need_adapter: bool = True) -> Self:
        """Find a run again; without `need_adapter` it may be unfinished. Raises RunError where it is none."""
        if not path.exists():
            fix = "give the `output:` of a run, such as runs/quickstart"
            raise RunError(f"there is no run folder {path}.", fix=fix)
        if not path.is_dir():
            raise RunError(f"{path} is a file, not a run folder.")
        run = cls(path)
        if not is_run(path):
            missing = [name for name in ("recipe.yaml", "checkpoints/") if not (path / name).exists()]
            is_adapter = (path / "adapter_config.json").is_file()
            hint = " It is an adapter: give the run folder that it lies in." if is_adapter else ""
            raise RunError(f"{path} is not a run folder: it has no {' and no '.join(missing)}.{hint}")
        if need_adapter and not (run.adapter / "adapter_config.json").is_file():
            writer = run.writer()
            fix = f"halfbyte train {typed(path)} --resume" if writer is None else f"wait for process {writer}"
            if saved := max(run.checkpoints.glob("step-*/adapter_config.json"), default=None):  # by six digits
                fix += f"; or give its checkpoint in the place of the run: {typed(saved.parent)}"
            raise RunError(f"the run {path} has no adapter yet: {run.progress()}.", fix=fix)
        return run

    def progress(self) -> str:
        """How far the run got, in words: the last step in the metrics and the newest checkpoint."""
        steps = [row["step"] for row in self.read_metrics() if isinstance(row.get("step"), int)]
        saved = self.saved_step()
        done = f"it got to step {max(steps)}" if steps else "it ended before its first step"
        return f"{done}, " + (f"with a checkpoint at step {saved}" if saved is not None else "without a checkpoint")

    def saved_step(self) -> int | None:
        """The step of the newest checkpoint."""
        names = (path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*"))
        return max((int(name) for name in names if name.isdigit()), default=None)

    # --- who may write ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[Self]:
        """Hold the run for writing, at most as long as this process lives. Raises RunError: names who holds it."""
        with (self.path / "lock").open("a+") as stream:
            while not files.lock(stream, wait=False):  # for some microseconds also who looks whether it is held has it
                if busy := _busy(self.path):
                    raise busy
            stream.truncate(0)
            stream.write(str(os.getpid()))
            stream.flush()
            files.clear_dead(self.path)
            files.clear_dead(self.checkpoints)
            yield self

    def check_idle(self) -> None:
        """Raise a RunError if another process is writing the run now."""
        if busy := _busy(self.path):
            raise busy

    def writer(self) -> str | None:
        """The process that is writing the run now; None where no one is."""
        with contextlib.suppress(OSError), (self.path / "lock").open("r+") as stream:
            if files.lock(stream, shared=True, wait=False):
                return None
            with contextlib.suppress(OSError):  # Windows lets nobody read what is locked
                return stream.read().strip() or "unknown"
            return "unknown"
        return None

    # --- metrics.jsonl ------------------------------------------------------------------------------------------------

    def append_metrics(self, row: Document) -> bool:
        """Add one row, after those still unwritten. False where the disk is full: the row is written later."""
        self.unwritten.append(row)
        return self.write_metrics()

    def write_metrics(self) -> bool:
        """Write the unwritten rows. A torn line that a crash or a full disk left at the end is cut away first."""
        lines = memoryview(b"".join((json.dumps(files.finite(row)) + "\n").encode() for row in self.unwritten))
        try:
            with self.metrics.open("a+b", buffering=0) as stream:
                if stream.tell():
                    stream.seek(-1, os.SEEK_END)
                    if stream.read(1) != b"\n":
                        stream.truncate(self.metrics.read_bytes().rfind(b"\n") + 1)
                start = stream.seek(0, os.SEEK_END)
                try:
                    while lines:  # a disk that is nearly full takes a part of them
                        lines = lines[stream.write(lines) :]
                except OSError:
                    with contextlib.suppress(OSError):
                        stream.truncate(start)
                    raise
        except OSError as error:
            if not files.is_full(error):
                raise
            return False
        self.unwritten.clear()
        return True

    def end_metrics(self) -> None:
        """Write the rows still unwritten. Raises DiskFull where there is no space for them."""
        if self.unwritten and not self.write_metrics():
            raise DiskFull(
                f"{len(self.unwritten)} rows of {self.metrics} could not be written: its disk is full.",
                fix="free some space; all else that the run made is kept",
            )

    def read_metrics(self) -> list[Document]:
        """Every whole row, in order, then the unwritten ones. Raises RunError for a line that is no JSON object."""
        if not self.metrics.is_file():
            return [*self.unwritten]
        rows: list[Document] = []
        *lines, _ = self.metrics.read_bytes().split(b"\n")  # `_`: nothing, or a write that was cut off
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
            except ValueError as error:
                raise RunError(f"{self.metrics}:{number}: {error}.", fix="remove that line") from error
            rows.append(row)
        return [*rows, *self.unwritten]

    def truncate_metrics(self, step: int) -> None:
        """Drop the rows after `step`: the resumed run writes them again."""
        rows = self.read_metrics()
        earlier = [row for row in rows if row.get("step", 0) <= step]
        if len(earlier) != len(rows):
            _write(self.metrics, "".join(json.dumps(row) + "\n" for row in earlier).encode())


def read_json(path: Path) -> Document:
    """A JSON object of a run; empty where the file is missing or cannot be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def json_rows(lines: Iterable[str | bytes]) -> Iterator[Document]:
    """The JSON objects of a file's lines; what cannot be read is passed over."""
    for line in lines:
        with contextlib.suppress(ValueError):
            if isinstance(row := json.loads(line), dict):
                yield row


def write_json(path: Path, value: Document) -> None:
    """Write or replace a JSON file of a run in one step. Raises DiskFull where no space is left."""
    _write(path, files.as_json(value))


def _write(path: Path, content: bytes) -> None:
    with space_for(path, len(content)):
        files.write(path, content)


@contextlib.contextmanager
def space_for(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn a full disk, while a file of a run of `size` bytes is written, into DiskFull."""
    try:
        yield
    except OSError as error:
        if not files.is_full(error):
            raise
        fix = f"free some space, then `halfbyte train {typed(path.parent)} --resume`"
        what = f"{path} could not be written: {files.no_room(path)}." if size is None else files.no_space(path, size)
        raise DiskFull(what, fix=fix) from error


@dataclass(frozen=True)
class DiskRetry:
    """Tries a write again while the disk is full."""

    warn: Callable[[str], None]  # gets one message for each wait
    stops: Callable[[], bool] = lambda: False  # whether the run is being stopped; then it does not wait
    wait_s: float = RETRY_FOR_S  # the longest wait

    def write(self, write: Callable[[], T]) -> T:
        """What `write` returns, which may be called several times. Raises DiskFull: the disk was full all the while."""
        until, warned = time.monotonic() + self.wait_s, False
        while True:
            try:
                return write()
            except DiskFull as error:
                if self.stops() or time.monotonic() >= until:
                    raise
                if not warned:
                    self.warn(f"{error.message} Waiting {self.wait_s / 60:.0f} minutes for room")
                    warned = True
                time.sleep(min(RETRY_EVERY_S, self.wait_s))


def _busy(path: Path) -> RunError | None:
    """The error for a run that another process is writing now; None where none is."""
    writer = RunFolder(path).writer()
    if writer is None:
        return None
    return RunError(f"the run {path} is being written by process {writer}.", fix=f"wait for it, stop it, or {ANOTHER}")


def _exists(path: Path) -> RunError:
    if not (path / "recipe.yaml").exists():
        what = "a folder that is no run" if path.is_dir() else "a file" if path.is_file() else "taken"
        return RunError(f"{path} is {what}, and a run needs a new folder.", fix=ANOTHER)
    return RunError(
        f"the run folder {path} exists already, and a run is never overwritten.",
        fix=f"continue it with halfbyte train {typed(path)} --resume, or {ANOTHER}",
    )
