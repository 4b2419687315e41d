"""uvicorn around the application: its socket, and how it ends.

The first SIGTERM or SIGINT ends the server when what is being written is written; what waits gets a 503. The second
one ends it at once.
"""

import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from sse_starlette.sse import AppStatus

from halfbyte.serving.adapters import AdapterFolders
from halfbyte.serving.engine import Engine
from halfbyte.serving.http import pages, reading
from halfbyte.serving.http.app import application
from halfbyte.serving.http.gauges import Gauges
from halfbyte.serving.http.service import Service
from halfbyte.serving.reader import TextReader
from halfbyte.serving.settings import Settings

_NONE = AdapterFolders()


class _Server(uvicorn.Server):
    """uvicorn's, which tells the engine when it shall end."""

    def __init__(self, config: uvicorn.Config, engine: Engine | TextReader) -> None:
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        # not here: a signal may come while this thread holds the engine's lock
        threading.Thread(target=self.engine.drain, daemon=True).start()


def build(engine: Engine, settings: Settings, folders: AdapterFolders = _NONE) -> uvicorn.Server:
    """The server, to be run with a socket; it ends when its `should_exit` is set."""
    AppStatus.disable_automatic_graceful_drain()  # or a stream would end in the middle of its answer
    service = Service(engine, Gauges(engine), settings.answer_s)
    config = pages.config(application(service, folders), settings)
    return _Server(config, engine)


def build_reader(reader: TextReader, settings: Settings) -> uvicorn.Server:
    """The same of a run that reads texts and writes none."""
    return _Server(pages.config(reading.application(reader), settings), reader)


def serve(
    engine: Engine, settings: Settings, sock: socket.socket, ready: Callable[[], None] = lambda: None,
    folders: AdapterFolders = _NONE,
) -> None:  # fmt: skip
    """Serve until a signal. `ready` is called when connections are taken."""
    pages.run(build(engine, settings, folders), sock, ready)
