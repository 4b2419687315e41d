"""Several processes of one run on this machine, forked from a server that has imported everything once."""

from __future__ import annotations

import io
import multiprocessing as mp
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

from halfbyte.distributed import launch


@dataclass(frozen=True)
class Ended:
    """How a process ended: what its function returned, its exit code, and what it printed. -9: it was killed."""

    value: Any
    code: int
    out: str
    err: str


@cache
def server() -> Any:
    """What forks them."""
    before, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
    forks = mp.get_context("forkserver")
    forks.set_forkserver_preload(["halfbyte.finetune", "halfbyte.distributed.step", "tests.distributed.together"])
    process = forks.Process(target=int)
    process.start()
    process.join()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    return forks


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _child(pipe: Connection, env: dict[str, str], call: Callable[..., Any], args: tuple[Any, ...]) -> None:
    for name in launch.OPENS:
        os.environ.pop(name, None)
    os.environ.update(env)
    out, err, value, code = io.StringIO(), io.StringIO(), None, 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            value = call(*args)
        except SystemExit as left:
            code = int(left.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 99
    pipe.send((value, code, out.getvalue(), err.getvalue()))
    pipe.close()
    os._exit(code)


class Processes:
    """`size` of them, each calling `call(*args)`, or rank r `call(*args_of(r))`."""

    def __init__(
        self,
        size: int,
        call: Callable[..., Any],
        *args: Any,
        each: Callable[[int], tuple[Any, ...]] | None = None,
        **env: str,
    ) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        forks, address = server(), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())}
        for rank in range(size):
            here, there = forks.Pipe(duplex=False)
            own = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
            given = args if each is None else each(rank)
            variables = {name: str(value) for name, value in own.items()} | address | env
            process = forks.Process(target=_child, args=(there, variables, call, given))
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self._processes[rank].pid, number)

    def codes(self, ranks: list[int], seconds: float) -> list[int]:
        """The exit codes of some of them; afterwards all are gone."""
        until = time.monotonic() + seconds
        try:
            for rank in ranks:
                self._processes[rank].join(max(0.0, until - time.monotonic()))
            return [self._processes[rank].exitcode for rank in ranks]
        finally:
            for process in self._processes:
                process.kill() if process.is_alive() else None
                process.join()

    def over(self) -> bool:
        return all(process.exitcode is not None for process in self._processes)

    def times(self, seconds: float) -> tuple[list[int | None], list[float]]:
        """The exit code of each, None where it did not end by itself, and when; afterwards all are gone."""
        until, codes, at = time.monotonic() + seconds, dict[int, int](), dict[int, float]()
        while len(codes) < len(self._processes) and time.monotonic() < until:
            for rank, process in enumerate(self._processes):
                if rank not in codes and process.exitcode is not None:
                    codes[rank], at[rank] = process.exitcode, time.monotonic()
            time.sleep(0.05)
        self.codes([], 0)
        return [codes.get(rank) for rank in range(len(self._processes))], [
            at.get(n, until) for n in range(len(self._pipes))
        ]

    def end(self, seconds: float = 120) -> list[Ended]:
        """Wait for all; those that are not back in time are killed, and an AssertionError says so."""
        ended: list[Ended] = []
        until = time.monotonic() + seconds
        try:
            for pipe, process in zip(self._pipes, self._processes, strict=True):
                assert pipe.poll(max(0.0, until - time.monotonic())), f"not back after {seconds} s"
                try:
                    ended.append(Ended(*pipe.recv()))
                except EOFError:
                    process.join(5)
                    ended.append(Ended(None, process.exitcode, "", ""))
            return ended
        finally:
            for process in self._processes:
                process.kill() if process.is_alive() else None
                process.join()


def run(size: int, call: Callable[..., Any], *args: Any, **env: str) -> list[Any]:
    """What each of them returns; an AssertionError with what it printed where one failed."""
    ended = Processes(size, call, *args, each=None, **env).end()
    for rank, each in enumerate(ended):
        assert each.code == 0, f"rank {rank} ended with {each.code}:\n{each.out}\n{each.err}"
    return [each.value for each in ended]
