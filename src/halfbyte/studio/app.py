"""The HTTP application of a studio: what a page asks becomes a command, which it is told.

Routes: the page's files; `/api/...`; `/ask/JOB/`, the page of `serve` for a run that a command serves, whose questions
are passed on to it. `guard.py` is before all of them.
"""

import http.client
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import yaml
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as Http
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from halfbyte.data.reading import read
from halfbyte.errors import HalfbyteError
from halfbyte.recipe.adapter_folder import is_run
from halfbyte.recipe.file import load_recipe
from halfbyte.runs import listing
from halfbyte.runs.folder import RunFolder
from halfbyte.serving.http import pages
from halfbyte.serving.http.refusal import HANDLERS, Json, Refusal
from halfbyte.studio.events import events
from halfbyte.studio.jobs import Jobs, Worker
from halfbyte.studio.workspace import SUFFIXES, Workspace
from halfbyte.types import Document
from halfbyte.web import files as web

WEB = Path(__file__).parent / "web"
PAGE = {"": WEB / "index.html", "studio.js": WEB / "studio.js"} | {
    name: web.FOLDER / name for name in ("parts.js", "tip.js", "style.css")
}
# bars have their width in a style attribute, as in a report, whose page is shown inside this one
POLICY = pages.POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
PASSED_ON = {"models": "GET", "chat/completions": "POST"}
SHORT = ("init", "data", "report", "compare", "store")
LONG = ("train", "eval", "serve", "merge", "export", "verify")
FLAGS = frozenset({
    "check", "list", "--json", "--row", "--output", "--resume", "--base", "--port", "--peft", "--ollama", "--gguf",
    "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0",
})  # fmt: skip
HOW_READ = re.compile(r"--set=data\.(fields\.[a-z_]+|format)=.*|--for=\w+")  # said of `init`
ANSWER_S = 600


@dataclass(frozen=True)
class Studio:
    workspace: Workspace
    jobs: Jobs
    worker: Worker

    def state(self) -> Document:
        there, folder = self.workspace.listing(), self.workspace.folder / "runs"
        paths = [folder / name for name in there["runs"]]
        runs = [_summary(path, _stamp(path)) for path in paths if is_run(path)]
        runs.sort(key=lambda run: -run["changed"])
        return {**there, "names": there["runs"], "runs": runs, "jobs": self.jobs.listing()}

    def recipe(self, name: str) -> Document:
        path = self.workspace.folder / self.workspace.path("recipes", name)
        load_recipe(path)  # tells in words what is wrong with it
        text, changed = path.read_text(encoding="utf-8"), path.stat().st_mtime
        return {"values": yaml.safe_load(text), "text": text, "changed": changed}

    def columns(self, name: str) -> Document:
        """The columns of a dropped file, by its first row."""
        return {"columns": read.columns(str(self.workspace.folder / self.workspace.path("data", name)))}

    def change(self, asked: Document, name: str) -> Document:
        self.workspace.change(name, asked)
        return self.recipe(name)

    def words(self, asked: Document, commands: Sequence[str]) -> list[str]:
        """The words of a command, each one that a page may say: a name in the folder, a flag, a number."""
        words, space = asked.get("words"), self.workspace
        if not isinstance(words, list) or not words or words[0] not in commands:
            raise Refusal(400, f"words: a command, one of {', '.join(commands)}.", code="words")
        for before, word in pairwise(map(str, words)):
            (option, _, value), (kind, _, name) = word.partition("="), word.partition("/")
            if option == "--model":
                space.base(value)
            elif option == "--data":
                space.rows(value)
            elif kind in SUFFIXES:
                space.path(kind, name, new=before in ("init", "--output"))
            elif word not in FLAGS and not word.isdigit() and not (words[0] == "init" and HOW_READ.fullmatch(word)):
                raise Refusal(400, f"{word[:80]!r} is not said from here.", code="words")
        return list(map(str, words))

    def run(self, asked: Document) -> Document:
        """A short command's JSON."""
        return self.worker.run(*self.words(asked, SHORT))

    def start(self, asked: Document) -> Document:
        """A command that goes on by itself; one that runs already is not started twice."""
        words = self.words(asked, LONG)
        running = (job for job in self.jobs.listing() if job["state"] == "running" and job["words"] == words)
        if words[0] != "serve":
            self.worker.end()  # its memory is for what begins
        return next(running, None) or self.jobs.start(words)


def _stamp(run: Path) -> tuple[object, ...]:
    """What changes where a run's summary does."""
    paths = (run / part for part in ("metrics.jsonl", "report.json", "crash.txt", "adapter"))
    return RunFolder(run).writer(), *(path.stat().st_mtime_ns if path.exists() else 0 for path in paths)


@lru_cache(1_000)
def _summary(run: Path, stamp: tuple[object, ...]) -> Document:
    return {**listing.summary(run).to_json(), "run": run.name}


def application(studio: Studio) -> Starlette:
    space, jobs = studio.workspace, studio.jobs

    async def upload(http: Http) -> Response:
        size = int(http.headers.get("content-length") or 0)
        return Json({"name": (await space.upload(http.path_params["name"], size, http.stream())).name})

    async def listen(http: Http) -> Response:
        run, job = http.query_params.get("run"), http.query_params.get("job")
        followed = None if run is None else space.folder / space.path("runs", run)
        logged, goes_on = (None, lambda: None) if job is None else (lambda: jobs.read(job), lambda: jobs.goes_on(job))
        goes_on()  # raises Refusal where there is none
        told = events(studio.state, followed, logged, goes_on)
        return EventSourceResponse(told, ping=15, send_timeout=60, sep="\n")

    async def show(http: Http) -> Response:
        run, runs = http.query_params.get("run"), space.folder / "runs"
        page = runs / "compare.html" if run is None else space.folder / space.path("runs", run) / "report.html"
        if page.is_symlink():
            raise Refusal(400, f"{page} is a link, and links are not followed here.", code="link")
        return Response(page.read_bytes(), media_type="text/html")

    async def pass_on(http: Http) -> Response:
        method, port = PASSED_ON.get(http.path_params["path"]), jobs.read(http.path_params["job"])["port"]
        if method != http.method or port is None:
            raise Refusal(404, "nothing answers here; start `halfbyte serve RUN`.", code="missing")
        return await run_in_threadpool(_passed_on, port, http, await http.body())

    routes = [
        *pages.routes(PAGE, policy=POLICY),
        *pages.routes(pages.TALK, "/ask/{job}/"),
        Route("/ask/{job}/v1/{path:path}", pass_on, methods=["GET", "POST"]),
        Route("/api/events", listen),
        Route("/api/page", show),
        Route("/api/data/{name}", upload, methods=["PUT"]),
        _route("/api/data/{name}", "GET", lambda asked, name: studio.columns(name)),
        _route("/api/commands", "POST", studio.run),
        _route("/api/recipes/{name}", "GET", lambda asked, name: studio.recipe(name)),
        _route("/api/recipes/{name}", "PATCH", studio.change),
        _route("/api/jobs", "POST", studio.start),
        _route("/api/jobs/{name}/stop", "POST", lambda asked, name: jobs.stop(name)),
        _route("/api/{kind}/{name}", "DELETE", lambda asked, **what: space.delete(**what, said=asked.get("confirm"))),
    ]
    return Starlette(routes=routes, exception_handlers={**HANDLERS, HalfbyteError: _failed, OSError: _failed})


async def _failed(http: Http, error: Exception) -> Response:
    if isinstance(error, HalfbyteError):
        return Json.of(Refusal(422, error.message, code=type(error).__name__, param=error.fix))
    return Json.of(Refusal(507, f"the folder cannot be read or written: {error}.", code="disk"))


def _route(path: str, method: str, work: Callable[..., Document]) -> Route:
    """JSON in (of a GET its query) and out, in a thread."""

    async def answer(http: Http) -> Response:
        try:
            asked = dict(http.query_params) if method == "GET" else json.loads(await http.body() or b"{}")
        except ValueError:
            asked = None
        if not isinstance(asked, dict):
            raise Refusal(400, "the body has to be a JSON object.", code="json")
        return Json(await run_in_threadpool(work, asked, **http.path_params))

    return Route(path, answer, methods=[method])


def _passed_on(port: int, asked: Http, body: bytes) -> Response:
    """The answer of a server on this machine, as it comes."""

    def parts() -> Iterator[bytes]:
        with closing(connection):
            while part := answer.read1(65_536):
                yield part

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    given = {name: asked.headers[name] for name in ("authorization", "content-type") if name in asked.headers}
    connection.request(asked.method, f"/v1/{asked.path_params['path']}", body or None, given)
    answer = connection.getresponse()
    return StreamingResponse(parts(), answer.status, media_type=answer.getheader("content-type"))
