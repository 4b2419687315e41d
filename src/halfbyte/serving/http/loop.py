"""uvicorn around an application and its guard, on a socket, until a signal. No torch."""

import signal
import socket
from collections.abc import Callable
from typing import Literal

import uvicorn
from starlette.types import ASGIApp

from halfbyte.serving.http.guard import Guard
from halfbyte.serving.settings import Settings


def config(app: ASGIApp, settings: Settings, lifespan: Literal["on", "off"] = "on") -> uvicorn.Config:
    return uvicorn.Config(
        Guard(app, settings), log_config=None, access_log=False, server_header=False, http="h11", ws="none",
        lifespan=lifespan, timeout_keep_alive=20, timeout_graceful_shutdown=int(settings.grace_s), proxy_headers=False,
        backlog=512,
    )  # fmt: skip


def run(server: uvicorn.Server, sock: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until a signal. `ready` is called when connections are taken."""
    # uvicorn raises a signal again when it has ended
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    sock.listen(512)
    ready()
    try:
        server.run(sockets=[sock])
    finally:
        sock.close()
        for number, handler in before.items():
            signal.signal(number, handler)
