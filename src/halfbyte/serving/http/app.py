"""The HTTP application: the routes of each API, models, health, metrics, and a small page.

The first SIGTERM or SIGINT ends the server when what is being written is written; what waits gets a 503. The second one
ends it at once.
"""

import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from types import FrameType

import uvicorn
from sse_starlette.sse import AppStatus
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.routing import Route

from halfbyte.serving.engine import Engine
from halfbyte.serving.folders import AdapterFolders
from halfbyte.serving.http import chat, ollama, pages, reading, responses, vllm
from halfbyte.serving.http.refusal import HANDLERS, Json, Refusal, not_there
from halfbyte.serving.http.service import Gauges, Gone, Service
from halfbyte.serving.models import ServedModel
from halfbyte.serving.reader import TextReader
from halfbyte.serving.settings import Settings
from halfbyte.types import Document


def application(service: Service, folders: AdapterFolders) -> Starlette:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            service.engine.end()
            service.words.shutdown(cancel_futures=True)

    async def refused(http: Http, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        service.gauges.refused(error)
        return Json.of(error, http.url.path)

    async def unknown(http: Http, error: Exception) -> Response:
        return Json.of(not_there(http, error), http.url.path)

    async def gone(http: Http, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    routes = [
        *chat.routes(service),
        *responses.routes(service),
        *ollama.routes(service),
        *vllm.routes(service, folders),
        Route("/v1/models", partial(_models, service)),
        Route("/v1/models/{name:path}", partial(_model, service)),
        Route("/health", partial(_health, service)),
        Route("/metrics", partial(_metrics, service)),
        *pages.routes(pages.TALK),
    ]
    handlers = {**HANDLERS, Refusal: refused, HTTPException: unknown, Gone: gone}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


async def _models(service: Service, http: Http) -> Response:
    data = [_described(service, one) for one in service.engine.models.by_name.values()]
    return Json({"object": "list", "data": data})


async def _model(service: Service, http: Http) -> Response:
    return Json(_described(service, service.model_named(http.path_params["name"])))


def _described(service: Service, one: ServedModel) -> Document:
    models = service.engine.models
    parent = None if one.adapter is None else models.base
    owner = {"id": one.name, "object": "model", "created": 0, "owned_by": "halfbyte"}
    return owner | {"parent": parent, "max_model_len": models.context.tokens}


async def _health(service: Service, http: Http) -> Response:
    alive = service.engine.alive
    return Json({"status": "ok" if alive else "failed"}, 200 if alive else 503)


async def _metrics(service: Service, http: Http) -> Response:
    return Response(service.gauges.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


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
    return _Server(pages.config(application(service, folders), settings), engine)


def build_reader(reader: TextReader, settings: Settings) -> uvicorn.Server:
    """The same of a run that reads texts and writes none."""
    return _Server(pages.config(reading.application(reader), settings), reader)


def serve(
    engine: Engine, settings: Settings, sock: socket.socket, ready: Callable[[], None] = lambda: None,
    folders: AdapterFolders = _NONE,
) -> None:  # fmt: skip
    """Serve until a signal. `ready` is called when connections are taken."""
    pages.run(build(engine, settings, folders), sock, ready)
