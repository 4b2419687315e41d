"""What is refused, in OpenAI's form of an error, and JSON as an answer. No torch.

Source: the `openai` package, 3.57: its client's handling of errors.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from starlette.exceptions import HTTPException
from starlette.requests import Request as Http
from starlette.responses import Response

from halfbyte.types import Document


class Refusal(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        kind: str = "invalid_request_error", headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body: Document = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def check_tokens(param: str, tokens: Iterable[int], vocabulary: int) -> None:
    """Raise a Refusal for a token id that the model does not have: its ids are 0 to `vocabulary` - 1."""
    if (strange := next((token for token in tokens if not 0 <= token < vocabulary), None)) is not None:
        what = f"{param}: {strange} is none of the model's tokens, which are 0 to {vocabulary - 1:,}."
        raise Refusal(400, what, code="invalid_value", param=param)


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """A Refusal in the block names fields as its client knows them. `names`: ours -> theirs, the longest first."""
    try:
        yield
    except Refusal as refusal:
        error = refusal.body["error"]
        for key in ("message", "param"):
            text = error[key] or ""
            ours = next((name for name in names if re.match(rf"{re.escape(name)}(?=[:.]|$)", text)), None)
            error[key] = error[key] if ours is None else names[ours] + text.removeprefix(ours)
        refusal.args = (error["message"],)
        raise


class Json(Response):
    media_type = "application/json"

    def __init__(
        self, content: Document | list[Document], status_code: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(json.dumps(content).encode(), status_code, headers)

    @classmethod
    def of(cls, refusal: Refusal, path: str = "", *, close: bool = False) -> "Json":
        """In Ollama's form where a server of models was asked at a `path` of Ollama's."""
        headers = {**refusal.headers, **({"Connection": "close"} if close else {})}
        body = {"error": str(refusal)} if path.startswith("/api/") else refusal.body
        return cls(body, refusal.status, headers)


async def refused(http: Http, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return Json.of(error)


def not_there(http: Http, error: Exception) -> Refusal:
    assert isinstance(error, HTTPException)
    return Refusal(error.status_code, f"{http.method} {http.url.path[:200]}: {error.detail}")


async def unknown(http: Http, error: Exception) -> Response:
    return Json.of(not_there(http, error))


async def unforeseen(http: Http, error: Exception) -> Response:
    return Json.of(Refusal(500, "the server has failed; its log says why.", kind="server_error"))


HANDLERS = {Refusal: refused, HTTPException: unknown, Exception: unforeseen}
