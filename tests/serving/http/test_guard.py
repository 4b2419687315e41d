"""The guard alone, in front of an application that writes down what reaches it. No model, no socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest

from halfbyte.serving.http import guard as guards
from halfbyte.serving.http.guard import Guard
from halfbyte.serving.settings import Settings

KEY, LIMIT = "k" * 24, 1_000
HOST = ("host", "127.0.0.1:8000")
JSON = ("content-type", "application/json")
HEADERS = {
    "x-content-type-options": "nosniff", "x-frame-options": "DENY", "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer", "cache-control": "no-store",
}  # fmt: skip


class Application:
    """What of a request's body has come, by its path. `open`: answers wait for it."""

    def __init__(self) -> None:
        self.reached: list[tuple[str, bytes]] = []
        self.parts = 0
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
            self.parts += 1
        self.reached.append((scope["path"], body))
        await self.open.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


class Answer:
    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    async def send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def code(self) -> str | None:
        body = json.loads(self.messages[1]["body"])
        return str(body["error"]["code"]) if body else None


async def asked(
    guard: Guard, *headers: tuple[str, str], method: str = "POST", path: str = "/v1/x",
    body: Iterable[bytes] = (b"{}",), rest_s: float = 0.0, kind: str = "http",
) -> Answer:  # fmt: skip
    """A request, its body part by part, each after a rest; a client that is gone once it has sent them."""
    parts = iter(body)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(rest_s)
        part = next(parts, None)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": part != b""}

    given = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    answer = Answer()
    scope = {"type": kind, "method": method, "path": path, "headers": given, "query_string": b""}
    await guard(scope, receive, answer.send)
    return answer


def tried(*headers: tuple[str, str], settings: Settings | None = None, **more: Any) -> tuple[Answer, Application]:
    async def go() -> tuple[Answer, Application]:
        app = Application()
        guard = Guard(app, settings or Settings(body_bytes=LIMIT))
        return await asked(guard, *headers, **{"body": (b"{}", b""), **more}), app

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("hosts", "reaches"),
    [
        (["127.0.0.1:8000"], True),
        (["localhost:8000"], True),
        (["LOCALHOST."], True),
        (["[::1]:8000"], True),
        (["[::1]"], True),
        (["192.168.1.7"], True),
        (["my.host:1"], True),
        (["My.Host"], True),
        ([], False),
        ([""], False),
        (["127.0.0.1:8000", "evil.example"], False),
        (["evil.example", "127.0.0.1:8000"], False),
        (["evil.example"], False),
        (["localhost.evil.example"], False),
        (["127.0.0.1.evil.example:8000"], False),
        (["evil.my.host"], False),
        (["my.host.evil.example"], False),
        (["notlocalhost"], False),
        (["[::1].evil.example"], False),
    ],
)
def test_one_host_that_is_an_address_or_a_name_of_ours(hosts: list[str], reaches: bool) -> None:
    settings = Settings(hosts=frozenset({"my.host"}))
    answer, app = tried(JSON, *(("host", host) for host in hosts), settings=settings)
    assert (answer.status, answer.code) == ((200, None) if reaches else (421, "wrong_host"))
    assert bool(app.reached) == reaches


def test_a_studios_paths_are_not_ollamas() -> None:
    answer, _ = tried(JSON, ("host", "evil.example"), path="/api/page", settings=Settings(uploads="/api/data/"))
    assert (answer.status, answer.code) == (421, "wrong_host")


@pytest.mark.parametrize(
    ("origin", "reaches"),
    [
        (None, True),
        ("http://127.0.0.1:8000", True),
        ("https://127.0.0.1:8000", True),
        ("http://127.0.0.1:8001", False),
        ("http://127.0.0.1", False),
        ("http://localhost:8000", False),
        ("null", False),
        ("", False),
        ("http://127.0.0.1:8000.evil.example", False),
        ("http://evil.example/http://127.0.0.1:8000", False),
        ("file://127.0.0.1:8000", False),
    ],
)
def test_an_origin_is_the_page_of_this_very_server(origin: str | None, reaches: bool) -> None:
    for method in ("GET", "POST", "PUT", "DELETE"):
        answer, app = tried(HOST, JSON, *([] if origin is None else [("origin", origin)]), method=method)
        assert (answer.status, answer.code) == ((200, None) if reaches else (403, "wrong_origin"))
        assert bool(app.reached) == reaches


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        KEY,
        "Bearer",
        "Bearer ",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"bearer {KEY}",
        f"Basic {KEY}",
        "Bearer ä",
    ],
)
def test_everything_but_pages_needs_the_key(given: str | None) -> None:
    settings, headers = Settings(key=KEY), [HOST, JSON, *([] if given is None else [("authorization", given)])]
    for path in ("/v1/models", "/api/jobs", "/metrics", "/ask/x-1/v1/models", "/ask/x-1/", "/ask/a/b/", "/health/x",
                 "/style.css/x", "//", "/x/style.css", "/api/style.css", "/style.css\n"):  # fmt: skip
        answer, app = tried(*headers, settings=settings, path=path)
        is_page = path == "/ask/x-1/"
        assert (answer.status, bool(app.reached)) == ((200, True) if is_page else (401, False)), path
        assert is_page or answer.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/style.css", "/studio.js", "/parts.js", "/health", "/ask/x-1/page.js"):
        assert tried(*headers, settings=settings, path=path, method="GET")[0].status == 200, path
    assert tried(HOST, JSON, ("authorization", f"Bearer {KEY}"), settings=settings)[0].status == 200


def test_every_answer_has_the_headers_that_keep_browsers_from_guessing() -> None:
    for headers in ([HOST, JSON], [HOST], [("host", "evil.example")], [HOST, JSON, ("origin", "null")]):
        answer, _ = tried(*headers)
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS, answer.status


@pytest.mark.parametrize("part", [b"x", b"x" * 100, b"x" * 5_000])
def test_a_body_is_bounded_also_where_it_does_not_end(part: bytes) -> None:
    read = 0

    def endless() -> Iterable[bytes]:
        nonlocal read
        while True:
            read += len(part)
            assert read < 100 * LIMIT
            yield part

    answer, app = tried(HOST, JSON, body=endless())
    assert (answer.status, answer.code, app.reached) == (413, "body_too_large", [])
    assert read <= guards._DRAINED * LIMIT + len(part)
    answer, app = tried(HOST, JSON, body=(b"x" * LIMIT, b"x", b""))
    assert (answer.status, app.reached) == (413, [])
    answer, app = tried(HOST, JSON, body=(b"x" * (LIMIT - 1), b"x", b""))
    assert (answer.status, app.reached) == (200, [("/v1/x", b"x" * LIMIT)])


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "BODY_S", 0.05)
    answer, app = tried(HOST, JSON, body=(b"x",) * 1_000, rest_s=0.01)
    assert (answer.status, answer.code, app.reached) == (408, "body_too_slow", [])


def test_who_is_gone_before_the_end_of_a_body_reaches_nothing() -> None:
    answer, app = tried(HOST, JSON, body=(b'{"words": ["train"]}',))
    assert (answer.status, app.reached) == (400, [])


def test_only_an_upload_is_passed_on_as_it_comes() -> None:
    settings, large = Settings(body_bytes=LIMIT, uploads="/api/data/"), (*[b"x" * LIMIT] * 20, b"")
    answer, app = tried(HOST, method="PUT", path="/api/data/a.csv", body=large, settings=settings)
    assert (answer.status, app.parts) == (200, 21) and len(app.reached[0][1]) == 20 * LIMIT
    for method, path in (("POST", "/api/data/a.csv"), ("DELETE", "/api/data/a.csv"), ("PUT", "/api/recipes/a.yaml")):
        answer, app = tried(HOST, JSON, method=method, path=path, body=large, settings=settings)
        assert (answer.status, app.reached) == (413, []), (method, path)
    assert tried(HOST, method="PUT", path="/api/data/a.csv", body=large)[0].status == 413  # nothing may be uploaded
    for more in (("origin", "null"), ("host", "evil.example")):
        answer, app = tried(HOST, more, method="PUT", path="/api/data/a.csv", body=large, settings=settings)
        assert (answer.status in (403, 421), app.parts) == (True, 0)


def test_no_more_requests_at_once_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "AT_ONCE", 3)

    async def go() -> None:
        app = Application()
        guard = Guard(app, Settings())
        app.open.clear()
        waiting = [asyncio.create_task(asked(guard, HOST, JSON, body=(b"{}", b""))) for _ in range(3)]
        while len(app.reached) < 3:
            await asyncio.sleep(0)
        full = await asked(guard, HOST, JSON)
        assert (full.status, full.code, full.headers["retry-after"]) == (429, "too_many_requests", "1")
        app.open.set()
        assert [(await each).status for each in waiting] == [200] * 3
        for _ in range(5):  # neither what was answered nor what was refused takes a place
            assert (await asked(guard, ("host", "evil.example"))).status == 421
            assert (await asked(guard, HOST, JSON, body=(b"{}", b""))).status == 200

    asyncio.run(go())


def test_there_are_no_websockets() -> None:
    answer, app = tried(HOST, kind="websocket")
    assert [message["type"] for message in answer.messages] == ["websocket.close"] and app.reached == []
