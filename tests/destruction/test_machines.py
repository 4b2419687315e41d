"""The relay between machines that are namespaces: packets arrive late, and not at all where one is cut off."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.relay import Link, Machines, address

SERVER = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
    ours.bind(("", 5000))
    print("here", flush=True)
    while True:
        said, whom = ours.recvfrom(1000)
        ours.sendto(said, whom)
"""
CLIENT = f"""
import socket, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
    ours.settimeout(2)
    began = time.monotonic()
    ours.sendto(b"?", ("{address(1)}", 5000))
    ours.recv(10)
    print(time.monotonic() - began)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or not Path("/dev/net/tun").exists() or shutil.which("ip") is None,
    reason="root, /dev/net/tun and ip are needed",
)
def test_packets_are_late_and_lost_where_a_machine_is_cut_off() -> None:
    with Machines(2, Link(1e6, 0.05)) as machines:
        line = [*machines.inside(1), sys.executable, "-c", SERVER]
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None and server.stdout.readline() == "here\n"
            assert server.pid in machines.pids(1) and len(machines.pids(1)) == 1

            def asked() -> str:
                words = [*machines.inside(0), sys.executable, "-c", CLIENT]
                return subprocess.run(words, capture_output=True, text=True).stdout

            assert float(asked()) >= 0.1
            machines.cut(1)
            assert asked() == ""
            machines.heal(1)
            assert float(asked()) >= 0.1
            server.kill()
    assert not set(machines.spaces) & set(os.listdir("/run/netns"))
