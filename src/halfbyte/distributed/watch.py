"""Whether all processes of a run are alive; all of them get the reason of the first one that fails.

Why: a collective waits for whoever is gone. A closed connection is an error at once; a machine or a link that went
silent is none, and torch's timeout has to be longer than the longest step. So each process counts a beat into torch's
key-value store, the first one watches all, and all watch the first and those of their machine; whoever fails writes
down why before it leaves. A silent process of the own machine is killed: it may be stopped (SIGSTOP), and a launcher
waits long for it to end (torch's agent 30 seconds, whatever its `--shutdown-timeout` says).
Source: `torch.distributed.TCPStore`.
Cost: a few small messages a second for each process; the first one reads one key for each.
"""

import ctypes
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.distributed import launch

if TYPE_CHECKING:
    from torch.distributed import TCPStore

EVERY_S = 1.0
SILENT_S = 20.0  # a process without a beat for so long is gone
STORE_S = 20.0  # so is the first one, if its store does not answer
FAILED = "failed"


class Interrupted(BaseException):
    """Raised in the main thread where it computes when another process has failed; never seen outside of this room."""


@dataclass(frozen=True)
class Fault:
    """Why a run ends. `rank`: of the process that failed, if known; `silent`: it does not answer, and may be alive."""

    message: str
    rank: int | None = None
    fix: str | None = None
    exit_code: int = 1
    silent: bool = False

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def of_json(cls, text: bytes) -> "Fault":
        return cls(**json.loads(text))


class Heartbeat:
    """A thread that beats and watches, and one that watches the first: a call to a store whose process is stopped, or
    whose link drops everything, does not return. `on_fault` is called once `fault` is set. `store_silent`: the store
    does not answer, and must not be called again.

    Args:
        beside: the ranks of this machine, each with its `launch.process`.
    """

    def __init__(
        self, store: "TCPStore", rank: int, names: list[str], on_fault: Callable[[], None],
        beside: Mapping[int, tuple[int, float]],
    ) -> None:  # fmt: skip
        self.fault: Fault | None = None
        self.store_silent = False
        self._answered_at, self._fault_lock = time.monotonic(), threading.Lock()
        self._store, self._rank, self._names = store, rank, names
        self._on_fault, self._beside = on_fault, beside
        self._ends = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._looked = 0.0
        self._thread = threading.Thread(target=self._run, name="halfbyte-watch", daemon=True)

    def start(self) -> None:
        self._store.set(_beat(self._rank), "0")
        self._answered_at = time.monotonic()
        self._thread.start()
        threading.Thread(target=self._time, name="halfbyte-watch-store", daemon=True).start()

    def stop(self) -> None:
        """Leave without being missed."""
        self._ends.set()
        self._thread.join(2 * EVERY_S)
        try:
            self._store.set(_beat(self._rank), "done")
        except RuntimeError:
            return

    def _run(self) -> None:
        count = 0
        while not self._ends.wait(EVERY_S):
            count += 1
            try:
                self._store.set(_beat(self._rank), str(count))
                fault = self._fault_of_others() or self._silent_process()
                self._answered_at = time.monotonic()
            except RuntimeError as error:  # torch.distributed's errors are of this kind
                if not is_closed(error):
                    continue
                fault = self._without_store()
            if fault is not None:
                self._end_by(fault)
                return

    def _time(self) -> None:
        before = time.monotonic()
        while not self._ends.wait(EVERY_S) and self.fault is None:
            now = time.monotonic()
            if now - before > SILENT_S / 2:  # this process was stopped itself
                self._answered_at = now
            before = now
            if now - self._answered_at > STORE_S:
                self.store_silent = True
                self._end_by(self._without_store(silent=True))

    def _without_store(self, silent: bool = False) -> Fault:
        return Fault(f"{self._names[0]} is gone: its store does not answer", 0, silent=silent)

    def _end_by(self, fault: Fault) -> None:
        with self._fault_lock:
            if self.fault is not None or self._ends.is_set():
                return
            self.fault = fault
        if fault.silent and fault.rank is not None and fault.rank in self._beside:
            launch.end(*self._beside[fault.rank])
        self._on_fault()

    def _fault_of_others(self) -> Fault | None:
        return Fault.of_json(self._store.get(FAILED)) if self._store.check([FAILED]) else None

    def _silent_process(self) -> Fault | None:
        """The first one looks at all, the others at the first and at those of their machine."""
        near = sorted({0, *self._beside} - {self._rank})
        now, looked_at = time.monotonic(), range(len(self._names)) if self._rank == 0 else near
        if now - self._looked > SILENT_S / 2:  # this process was stopped, perhaps the others too: their beats are old
            self._seen.clear()
        self._looked = now
        keys = [_beat(rank) for rank in looked_at]
        if not self._store.check(keys):
            return None  # some have not begun
        for rank, value in zip(looked_at, self._store.multi_get(keys), strict=True):
            before, at = self._seen.get(rank, (b"", now))
            self._seen[rank] = (value, now if value != before else at)
            if value == before != b"done" and now - at > SILENT_S:
                gone = Fault(f"{self._names[rank]} has not been heard of for {SILENT_S:.0f} seconds", rank, silent=True)
                if self._rank == 0:  # so that the others end now, and with the same words
                    self._store.compare_set(FAILED, "", gone.to_json())
                return gone
        return None


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def interrupt(thread: int) -> None:
    """Raise `Interrupted` in a thread as soon as it runs Python again."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Interrupted))


def is_closed(error: RuntimeError) -> bool:
    """Whether the process whose store was asked is gone, or its connection; it does not come back."""
    return any(word in str(error) for word in ("reset", "roken pipe", "likely closed"))


def wait_for(
    store: "TCPStore", key: str, fault: Callable[[], Fault | None], seconds: float | None = None, leave: bool = False
) -> bool:
    """Wait for a key of the store, as long as nobody has failed. False after so many seconds, or after a fault.
    `leave`: do not wait for the watch to say that the store is gone."""
    until, pause = None if seconds is None else time.monotonic() + seconds, 0.002
    while True:
        try:
            if store.check([key]):
                return True
        except RuntimeError as error:  # the watch says what is wrong
            if leave and is_closed(error):
                return False
            pause = EVERY_S / 4
        if fault() is not None or (until is not None and time.monotonic() >= until):
            return False
        time.sleep(pause)  # the store's own wait prints a line for each time that it is not over
        pause = min(2 * pause, EVERY_S / 4)
