"""The processes that train one run together: this one alone, or a group of torch.distributed.

Why: what a launcher started finds each other once, before a library opens a group of its own; from then on every wait
also looks whether somebody has failed, so that all end together, with the first one's reason.
Source: `torch.distributed` (rendezvous, process groups, TCPStore). DistributedDataParallel is not used: it copies a
mapped base, and reduces nothing where the decoder is called without its wrapper.
Cost: none for a process that is alone: torch.distributed is not imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from halfbyte.distributed import launch
from halfbyte.distributed.watch import EVERY_S, FAILED, Fault, Heartbeat, Interrupted, interrupt, wait_for
from halfbyte.errors import HalfbyteError, RankLost, WorldError, first_line

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup, TCPStore, Work

    from halfbyte.system.device import Device

T = TypeVar("T")
MEET = timedelta(minutes=10)  # for all to be there
CONNECT = timedelta(seconds=5)
LONGEST = timedelta(days=2)  # of a wait in a collective: who is gone is found by the watch
# seconds: to wait for the first process's word; of it for the others; to leave in order; of a call that does not end
SAID_S, HEARD_S = 8.0, 3.0
LAST_S, STUCK_S = 10.0, 10.0
POLL_S = 0.0005
SAID = "said"


class World:
    """One process, alone. Collectives do nothing, and what is gathered is its own."""

    rank, size = 0, 1
    local_rank, local_size = 0, 1
    machines = 1
    names: tuple[str, ...] = ("this process",)
    agents: tuple[str, ...] = ()
    group: ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that locks, writes and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def gather(self, value: T) -> list[T]:
        """The value (JSON) of each process, by rank, in all of them."""
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` (JSON) returns in the first process, in all of them; only there it is called."""
        return make()

    def sum_(self, flat: Tensor) -> None:
        """Add the tensors of all processes, in place."""

    def broadcast_(self, flat: Tensor) -> None:
        """The first process's tensor into all, in place."""

    def gather_into_(self, flat: Tensor, part: Tensor) -> None:
        """The parts of all processes, by rank, into one tensor."""
        flat.copy_(part)

    def goes_on(self, run: Path, asked: bool) -> bool:
        """Whether a run is to go on: asked, or begun by the launch that has now restarted its workers."""
        agents = list(self.agents)
        return self.from_first(lambda: asked or (bool(agents) and launch.began(run, agents)))

    @property
    def env(self) -> Mapping[str, str]:
        """The environment, without torchrun's OMP_NUM_THREADS=1 where the user did not set it."""
        env = dict(os.environ)
        if self.sharing is not None and launch.is_launchers_one_thread(env):
            del env["OMP_NUM_THREADS"]
        return env

    def node_first(self) -> contextlib.AbstractContextManager[None]:
        """One process of each machine goes first: what it builds or downloads, the others find."""
        return contextlib.nullcontext()

    def share(self, machine: Device) -> Device:
        """What of a machine is this process's."""
        return machine

    def await_failure(self) -> None:
        """Wait for another process to publish why it ends."""

    @property
    def sharing(self) -> int | None:
        """How many processes share this machine's cores; None where this one has them alone."""
        return None


class Group(World):
    """Several processes. Every one calls the same methods in the same order."""

    def __init__(self, place: launch.Place, say: Callable[[HalfbyteError], None] | None) -> None:
        import torch.distributed as dist

        self._dist: Any = dist
        self._place, self._say = place, say
        self.rank, self.size = place.rank, place.size
        self._store: TCPStore | None = None
        self._group: ProcessGroup | None = None
        self._heartbeat: Heartbeat | None = None
        self._calls, self._left = 0, threading.Event()
        self._thread = threading.get_ident()
        self.names = (f"rank {self.rank} of {self.size} on {socket.gethostname()}",)

    def open(self) -> None:
        """Find the others, watch them, and open the process group."""
        place, host = self._place, socket.gethostname()
        self._meet()
        places = self.gather({"host": host, "boot": launch.boot(), "agent": launch.agent()})
        processes = self.gather(launch.process())
        self.names = tuple(f"rank {rank} of {self.size} on {p['host']}" for rank, p in enumerate(places))
        self.agents = tuple(p["agent"] for p in places)
        beside = [rank for rank, p in enumerate(places) if p["boot"] == places[self.rank]["boot"]]
        self.machines = len({p["boot"] for p in places})
        self.local_rank = beside.index(self.rank) if place.local_rank is None else place.local_rank
        self.local_size, self._beside = len(beside), beside
        near = {rank: processes[rank] for rank in beside}
        self._heartbeat = Heartbeat(self._second, self.rank, list(self.names), self._on_fault, near)
        self._heartbeat.start()
        self._open()

    def _meet(self) -> None:
        """Find each other through the launcher's address, and open a store of our own in the first process."""
        self._given = self._dist.is_initialized()  # Ray's TorchTrainer has opened a group already
        address = os.environ.get("MASTER_ADDR") or socket.gethostname()
        os.environ.setdefault("MASTER_ADDR", address)
        os.environ.setdefault("MASTER_PORT", launch.PORT)
        store, key = None, f"halfbyte/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/port"
        try:
            if self._given:
                self.rank, self.size = self._dist.get_rank(), self._dist.get_world_size()
            else:
                store, self.rank, self.size = next(
                    iter(self._dist.rendezvous("env://", self.rank, self.size, timeout=MEET))
                )
            self._base = store  # kept: where the first process is its server, others read from it until they are here
            ports = [0]
            if self.rank == 0:
                server = self._dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=MEET)
                ports = [server.port]
            if self._given:
                self._dist.broadcast_object_list(ports, src=0)
            elif store is not None and self.rank == 0:
                store.set(key, str(ports[0]))

            def port() -> int:
                return ports[0] or int(store.get(key)) if store is not None else ports[0]

            self._store = server if self.rank == 0 else self._connect(address, port)
            self._second = self._connect(address, lambda: self._keys.port)  # the watch's own
        except (RuntimeError, ValueError, OSError) as error:
            raise WorldError(
                f"{self.names[0]} did not find the others at {address}:{os.environ['MASTER_PORT']}: "
                f"{first_line(error)}",
                fix="the same --nnodes and --rdzv-endpoint on every machine; GLOO_SOCKET_IFNAME names the network card",
            ) from error

    def _connect(self, address: str, port: Callable[[], int]) -> TCPStore:
        """A client of the first process's store. The launcher's store outlives a restart, so the port may be that of a
        first process that is gone: it is read again until somebody answers."""
        until = time.monotonic() + MEET.total_seconds()
        while True:
            try:
                store = self._dist.TCPStore(address, port(), is_master=False, wait_for_workers=False, timeout=CONNECT)
                store.set_timeout(MEET)
                return store
            except RuntimeError:
                if time.monotonic() >= until:
                    raise
                time.sleep(EVERY_S)

    def _open(self) -> None:
        import torch

        kind = torch.accelerator.current_accelerator(check_available=True)
        backend = "gloo"
        if kind is not None and kind.type not in ("cpu", "mps"):
            backend = f"cpu:gloo,{kind.type}:{self._dist.get_default_backend_for_device(kind)}"
            torch.accelerator.set_device_index(self.local_rank)
        try:
            if self._given:
                self._group = self._dist.new_group(backend=backend, timeout=LONGEST)
            else:
                many = {"rank": self.rank, "world_size": self.size, "timeout": LONGEST}
                # not the launcher's store: that knows the last attempt's ranks
                store = self._dist.PrefixStore("group", self._keys)
                self._dist.init_process_group(backend, store=store, **many)
            self.group = self._group or self._dist.group.WORLD
        except RuntimeError as error:
            raise self._lost(error) from error

    @property
    def _keys(self) -> TCPStore:
        if self._store is None:
            raise Interrupted
        return self._store

    @property
    def fault(self) -> Fault | None:
        return None if self._heartbeat is None else self._heartbeat.fault

    @property
    def _store_silent(self) -> bool:
        return self._heartbeat is not None and self._heartbeat.store_silent

    @property
    def sharing(self) -> int | None:
        return None if self.local_size == 1 else self.local_size

    def await_failure(self) -> None:
        wait_for(self._keys, FAILED, lambda: self.fault, LAST_S)
        raise Interrupted

    def gather(self, value: T) -> list[T]:
        self._calls += 1
        name = f"gather/{self._calls}"
        self._keys.set(f"{name}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            parts = []
            for rank in range(self.size):
                self._await(f"{name}/{rank}")
                parts.append(self._keys.get(f"{name}/{rank}").decode())
                self._keys.delete_key(f"{name}/{rank}")
            self._keys.set(name, f"[{', '.join(parts)}]")
        self._await(name)
        return json.loads(self._keys.get(name))

    def from_first(self, make: Callable[[], T]) -> T:
        self._calls += 1
        name = f"first/{self._calls}"
        if self.rank == 0:
            self._keys.set(name, json.dumps(make()))
        self._await(name)
        return json.loads(self._keys.get(name))

    def _await(self, key: str) -> None:
        if not wait_for(self._keys, key, lambda: self.fault, None if self._heartbeat else MEET.total_seconds()):
            raise Interrupted

    def sum_(self, flat: Tensor) -> None:
        self._finish(lambda: self._dist.all_reduce(flat, group=self._group, async_op=True))

    def broadcast_(self, flat: Tensor) -> None:
        self._finish(lambda: self._dist.broadcast(flat, 0, group=self._group, async_op=True))

    def gather_into_(self, flat: Tensor, part: Tensor) -> None:
        self._finish(lambda: self._dist.all_gather_into_tensor(flat, part, group=self._group, async_op=True))

    def _finish(self, start: Callable[[], Work]) -> None:
        """A collective, waited for in Python: a link that is silent would hold the thread otherwise."""
        try:
            work = start()
            while not work.is_completed():
                if self.fault is not None:
                    raise Interrupted
                time.sleep(POLL_S)
            work.wait()
        except RuntimeError as error:
            raise self._lost(error) from error

    @contextmanager
    def node_first(self) -> Iterator[None]:
        self._calls += 1
        key = f"turn/{self._calls}/{self._beside[0]}"
        if self.rank != self._beside[0]:
            self._await(key)
        yield
        if self.rank == self._beside[0]:
            self._keys.set(key, "")

    def share(self, machine: Device) -> Device:
        cards = machine.cards and (machine.cards[self.local_rank % len(machine.cards)],)
        return replace(
            machine,
            cores=max(1, machine.cores // self.local_size),
            ram_bytes=machine.ram_bytes // self.local_size,
            ram_available_bytes=machine.ram_available_bytes // self.local_size,
            cards=cards,
        )

    def _lost(self, error: BaseException) -> RankLost:
        """After a collective failed: the reason that the failed process has published, if it could."""
        if self._store_silent and self.fault is not None:
            return _lost(self.fault)
        with contextlib.suppress(RuntimeError):
            if self._store is not None and wait_for(self._store, FAILED, lambda: self.fault, 3 * EVERY_S):
                return _lost(Fault.of_json(self._store.get(FAILED)))
        if self.fault is not None:
            return _lost(self.fault)
        return RankLost(
            f"a process of this run is gone: {first_line(error, 160)}.", fix="look at the other processes' own words"
        )

    def _on_fault(self) -> None:
        """Called in the watching thread. If the main thread does not return, it is in a call that does not end."""
        if not self._left.is_set():
            interrupt(self._thread)
        if not self._left.wait(STUCK_S) and self.fault is not None and (self._say is not None or self._store_silent):
            if self._say is not None and (self.rank == 0 or self.fault.rank == 0):
                self._say(_lost(self.fault))
            os._exit(self.fault.exit_code)

    def failed(self, error: BaseException) -> BaseException:
        """Publish why this process ends, and report it once. Returns the error to end with."""
        self._left.set()
        while True:
            try:
                return self._failed(error)
            except Interrupted:  # the watch's, which had been on its way
                continue

    def _failed(self, error: BaseException) -> BaseException:
        if isinstance(error, Interrupted) or (self._store_silent and isinstance(error, RuntimeError)):
            error = self._lost(error)  # the second: a question to a stopped first process, ended by its end
        if isinstance(error, Exception) and not isinstance(error, HalfbyteError):
            from halfbyte.runs import crash

            error = crash.unforeseen(error)
        if not isinstance(error, RankLost) and self._store is not None:
            self._tell(error)
        if self._say is not None and isinstance(error, HalfbyteError):
            self._say_once(error, self._say)
        return error

    def _say_once(self, error: HalfbyteError, say: Callable[[HalfbyteError], None]) -> None:
        """The first process reports it and waits until the others know; another one only if the first does not."""
        if self._store is None or self.rank == 0 or self._store_silent:
            say(error)
        if self._store_silent:
            return
        with contextlib.suppress(RuntimeError):
            if self._store is not None and self.rank == 0:
                self._store.set(SAID, "")
                self._wait_for_ends(HEARD_S)
            elif self._store is not None:
                if not wait_for(self._store, SAID, lambda: None, SAID_S, leave=True):
                    say(error)
                self._store.set(f"end/{self.rank}", "")

    def _wait_for_ends(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for rank in range(1, self.size):
            wait_for(self._keys, f"end/{rank}", lambda: None, max(0.0, until - time.monotonic()))

    def _tell(self, error: BaseException) -> None:
        message, fix = (error.message, error.fix) if isinstance(error, HalfbyteError) else ("it was stopped", None)
        code = error.exit_code if isinstance(error, HalfbyteError) else 130
        fault = Fault(f"{self.names[self.rank if len(self.names) > 1 else 0]}: {message}", self.rank, fix, code)
        with contextlib.suppress(RuntimeError):
            self._keys.compare_set(FAILED, "", fault.to_json())
        self._close()

    def _close(self) -> None:
        """Connections are closed, so that those who wait for this process hear it at once."""
        with contextlib.suppress(RuntimeError, AttributeError, ValueError):
            if self._dist.is_initialized() and (self._group is not None or not self._given):
                self._dist.destroy_process_group(self._group)

    def end(self) -> None:
        """Leave in order: the first one last, since the store is its own."""
        self._left.set()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        with contextlib.suppress(RuntimeError):
            self._keys.set(f"end/{self.rank}", "")
            if self.rank == 0:
                self._wait_for_ends(LAST_S)
        self._close()


def _lost(fault: Fault) -> RankLost:
    return RankLost(fault.message, fix=fault.fix, exit_code=fault.exit_code)


@contextmanager
def open_world(
    say: Callable[[HalfbyteError], None] | None = None, env: Mapping[str, str] = os.environ
) -> Iterator[World]:
    """The world that a launcher has started this process in; alone where none has. `say`: prints an error. It is called
    in one process, the first if it can; then SystemExit ends all of them. None: every process raises the error. Raises
    HalfbyteError: what another process has failed with, or this one."""
    place = launch.place(env)
    if place is None:
        yield World()
        return
    if place.size == 1:
        with launch.hide_launcher():
            world = World()
            world.agents = (launch.agent(),)
            yield world
        return
    group = Group(place, say)
    try:
        group.open()
        with launch.hide_launcher():
            yield group
        group.end()
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        shown = group.failed(error)
        raise (
            SystemExit(shown.exit_code) if say is not None and isinstance(shown, HalfbyteError) else shown
        ) from error
