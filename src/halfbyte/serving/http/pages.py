"""What a server of ours needs beside its answers: the files of its page, under a policy that lets nothing from
elsewhere in; and uvicorn around it, until a signal. No torch."""

import signal
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import uvicorn
from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from halfbyte.serving.http.guard import Guard
from halfbyte.serving.settings import Settings
from halfbyte.web import files as web

TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
WEB = Path(__file__).parent / "web"
# of a server that answers, and of a studio that passes on what is asked
TALK = {"": WEB / "index.html", "page.js": WEB / "page.js"} | {n: web.FOLDER / n for n in ("parts.js", "style.css")}


def routes(files: Mapping[str, Path], below: str = "/", policy: str = POLICY) -> list[Route]:
    """A route for each file, by its name below a path."""
    return [Route(f"{below}{name}", partial(_file, path, policy)) for name, path in files.items()]


async def _file(path: Path, policy: str, http: Http) -> Response:
    headers = {"Content-Security-Policy": policy}
    return Response(web.content(path), media_type=TYPES[path.suffix], headers=headers)


def config(app: ASGIApp, settings: Settings, lifespan: Literal["on", "off"] = "on") -> uvicorn.Config:
    return uvicorn.Config(
        Guard(app, settings), log_config=None, access_log=False, server_header=False, http="h11", ws="none",
        lifespan=lifespan, timeout_keep_alive=20, timeout_graceful_shutdown=int(settings.grace_s), proxy_headers=False,
        backlog=512,
    )  # fmt: skip


def run(server: uvicorn.Server, sock: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until a signal, or one that came before uvicorn listens. `ready` is called when connections are taken."""
    numbers = signal.SIGINT, signal.SIGTERM  # uvicorn raises them again when it has ended
    before = {number: signal.signal(number, lambda *_: setattr(server, "should_exit", True)) for number in numbers}
    sock.listen(512)
    ready()
    try:
        server.run(sockets=[sock])
    finally:
        sock.close()
        for number, handler in before.items():
            signal.signal(number, handler)
