"""Serving until a signal, also where it comes before the server has begun to listen to signals."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, socket, uvicorn
from starlette.applications import Starlette
from halfbyte.serving.http import pages
from halfbyte.serving.settings import Settings

before = signal.getsignal(signal.{name})
sock = socket.socket()
sock.bind(("127.0.0.1", 0))
server = uvicorn.Server(pages.config(Starlette(), Settings()))
pages.run(server, sock, lambda: os.kill(os.getpid(), signal.{name}))
print("ended", signal.getsignal(signal.{name}) == before)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_as_soon_as_the_address_is_said_ends_it(name: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(name=name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "ended True\n"), done.stderr
