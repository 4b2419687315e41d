"""Machines that are network namespaces of this one, joined by a program that carries their packets.

What: each namespace has a card of its own (a TUN device, whose other end is a file); a process reads what each sends,
and hands it on at the rate of the link, later by its delay, without a share of it that is lost. A machine can be cut
off: nothing that it sends or is sent arrives, and no connection is closed. The kernel needs neither `netem` nor `tbf`.
Use: `with Machines(2, Link(125e6, 0.001)) as machines`, then start processes by `machines.inside(n)`. Root only; `ip`.
Source: Documentation/networking/tuntap.rst of Linux.
Cost: a third of a core at 1 Gb/s with packets of 65,000 bytes, or at 100 Mb/s with packets of 1,500.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import BinaryIO

QUEUE_S = (
    0.05  # a sender's queue holds what the link carries in this time; beyond it packets are dropped, as in a switch
)
TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000
CUT, HEAL = b"-", b"+"


@dataclass(frozen=True)
class Link:
    """Of each machine: bytes a second that it can send; seconds to each other machine, one way; the share of packets
    that is lost; bytes of the largest packet."""

    bytes_s: float
    delay_s: float = 0.0
    loss: float = 0.0
    mtu: int = 65_000


def address(machine: int) -> str:
    return f"10.77.0.{machine + 1}"


def enter(space: str) -> None:
    """This thread, and what it starts, goes into a network namespace."""
    with open(f"/run/netns/{space}") as file:
        _set(file.fileno(), space)


def _set(number: int, name: str) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(number, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns to {name}")


def card(space: str) -> BinaryIO:
    """The file of a new card in a namespace; this process stays where it is."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    enter(space)
    file = open("/dev/net/tun", "r+b", buffering=0)  # noqa: SIM115  # stays open
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", space.encode(), IFF_TUN | IFF_NO_PI))
    os.set_blocking(file.fileno(), False)
    _set(own, "its own")
    os.close(own)
    return file


def carry(spaces: list[str], link: Link) -> None:
    """The relay's process, until its standard input ends; that says whom to cut off (`-1`) and to heal (`+1`)."""
    files = [card(space) for space in spaces]
    machines = {socket.inet_aton(address(n)): n for n in range(len(spaces))}
    free, cut = [0.0] * len(spaces), set[int]()
    waiting: list[tuple[float, int, int, bytes]] = []  # when it arrives, number, machine, packet
    draw, number, told = random.Random(0).random, 0, sys.stdin.buffer.raw  # type: ignore[union-attr]
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable = select.select([told, *files], [], [], pause)[0]
        now = time.monotonic()
        for source, file in enumerate(files):
            if file not in readable:
                continue
            packet = file.read(link.mtu + 100)
            target = machines.get(packet[16:20]) if packet and packet[0] >> 4 == 4 else None
            behind = max(0.0, free[source] - now)
            if target is None or behind > QUEUE_S or cut & {source, target}:
                continue
            free[source] = now + behind + len(packet) / link.bytes_s
            if draw() >= link.loss:
                number += 1
                heapq.heappush(waiting, (free[source] + link.delay_s, number, target, packet))
        while waiting and waiting[0][0] <= now:
            _, _, target, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # its card is down
                files[target].write(packet)
        if told in readable:
            words = told.read(64)
            if not words:
                return
            for word in words.split():
                (cut.add if word[:1] == CUT else cut.discard)(int(word[1:]))


class Machines:
    """So many namespaces, named after this process, and their relay."""

    def __init__(self, count: int, link: Link) -> None:
        self.spaces = [f"hb{os.getpid()}-{n}" for n in range(count)]
        self._link = link

    def __enter__(self) -> Machines:
        try:
            for space in self.spaces:
                _ip("netns", "add", space)
            link = self._link
            words = [link.bytes_s, link.delay_s, link.loss, link.mtu, *self.spaces]
            line = [sys.executable, __file__, *map(str, words)]
            self._relay = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
            assert self._relay.stdout is not None and self._relay.stdout.readline() == b"ready\n"
            for n, space in enumerate(self.spaces):
                _ip("-n", space, "addr", "add", f"{address(n)}/24", "dev", space)
                _ip("-n", space, "link", "set", space, "mtu", str(link.mtu), "up")
                _ip("-n", space, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_relay"):
            self._relay.kill()
            self._relay.wait()
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], check=False)

    def inside(self, machine: int) -> list[str]:
        """What stands before a command that runs on a machine."""
        return ["ip", "netns", "exec", self.spaces[machine]]

    def env(self, machine: int) -> dict[str, str]:
        """For the processes of a machine: where all meet, and by which card."""
        return {"MASTER_ADDR": address(0), "GLOO_SOCKET_IFNAME": self.spaces[machine]}

    def cut(self, machine: int) -> None:
        """From now on nothing arrives that the machine sends or is sent."""
        self._tell(CUT, machine)

    def heal(self, machine: int) -> None:
        self._tell(HEAL, machine)

    def _tell(self, what: bytes, machine: int) -> None:
        assert self._relay.stdin is not None
        self._relay.stdin.write(what + b"%d\n" % machine)
        self._relay.stdin.flush()

    def pids(self, machine: int) -> list[int]:
        """Every process on a machine."""
        said = subprocess.run(["ip", "netns", "pids", self.spaces[machine]], capture_output=True, text=True, check=True)
        return [int(word) for word in said.stdout.split()]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


if __name__ == "__main__":
    carry(sys.argv[5:], Link(*map(float, sys.argv[1:4]), mtu=int(sys.argv[4])))
