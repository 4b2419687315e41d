"""Vectors, labels and rankings over HTTP: OpenAI's `/v1/embeddings`, `/classify` and `/rerank` as vLLM and TEI have
them. A run of task embed ranks by the cosine of its vectors, one of task regress by the number that it gives a pair.

Source: the `openai` package, 3.57, types/embedding; vLLM's pooling protocols; text-embeddings-inference's API.
"""

import asyncio
import base64
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Literal

import numpy as np
from pydantic import Discriminator, Field, Tag
from starlette.applications import Starlette
from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.routing import Route

from halfbyte.errors import DataError
from halfbyte.inference import labels
from halfbyte.inference.vectors import unit
from halfbyte.recipe.task import CLASSIFY, EMBED, REGRESS
from halfbyte.scoring.labels import probabilities
from halfbyte.serving.http import wire
from halfbyte.serving.http.refusal import HANDLERS, Json, Refusal, check_tokens
from halfbyte.serving.http.service import failed
from halfbyte.serving.reader import TextReader, Texts, Values
from halfbyte.types import Document

MOST = 2048  # texts of a request, as OpenAI has it
Words = Annotated[str, Field(min_length=1)]
Several = Annotated[list[Words], Field(min_length=1, max_length=MOST)]
Ids = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]


def _shape(given: object) -> str:
    """What `input` seems to be, by its first item, so that what is wrong is told of that alone."""
    if isinstance(given, list):
        return {int: "tokens", bool: "tokens", list: "lists"}.get(type(given[0]) if given else str, "texts")
    return "text" if isinstance(given, str) else "unknown"


def _one_of(what: str) -> Discriminator:
    return Discriminator(_shape, custom_error_type="input", custom_error_message=f"{what} is needed")


OneText = Annotated[Words, Tag("text")]
SeveralTexts = Annotated[Several, Tag("texts")]
Tokens = Annotated[Ids, Tag("tokens")]
SeveralTokens = Annotated[list[Ids], Field(min_length=1, max_length=MOST), Tag("lists")]
Answer = Document | list[Document]  # a list is TEI's
Way = Callable[[TextReader, bytes], Awaitable[Answer]]


class TextsRequest(wire.Unused):
    model: str = ""


class EmbeddingRequest(TextsRequest):
    """`prompt_name`, as sentence-transformers and TEI call it: what is put in front of each text."""

    input: Annotated[
        OneText | SeveralTexts | Tokens | SeveralTokens,
        _one_of(f"a text, a list of tokens, or a list of 1 to {MOST:,} of either"),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, strict=True)] | None = None
    prompt_name: Literal["query", "document"] | None = None


class ClassificationRequest(TextsRequest):
    input: Annotated[OneText | SeveralTexts, _one_of(f"a text, or a list of 1 to {MOST:,} texts,")]


class RerankRequest(TextsRequest):
    """`documents` and `top_n` are vLLM's, `texts` and `return_text` TEI's, answered in its own form; scores are raw."""

    query: Words
    documents: Several | None = None
    texts: Several | None = None
    top_n: Annotated[int, Field(ge=0, strict=True)] = 0
    return_text: bool = False
    raw_scores: Literal[True] = True


def application(reader: TextReader) -> Starlette:
    async def answer(way: Way, http: Http) -> Response:
        return await asyncio.to_thread(Json, await way(reader, await http.body()))

    async def models(http: Http) -> Response:
        one = {"id": reader.name, "object": "model", "created": 0, "owned_by": "halfbyte"}
        return Json({"object": "list", "data": [one | {"max_model_len": reader.most_tokens}]})

    async def health(http: Http) -> Response:
        return Json({"status": "ok"})

    ways: dict[str, Way] = {
        "/v1/embeddings": embeddings,
        "/classify": classify,
        "/rerank": rerank,
        "/v1/rerank": rerank,
    }
    routes = [Route(path, partial(answer, way), methods=["POST"]) for path, way in ways.items()]
    routes += [Route("/v1/models", models), Route("/health", health)]
    return Starlette(routes=routes, exception_handlers=HANDLERS)


async def embeddings(reader: TextReader, body: bytes) -> Document:
    asked = wire.read(EmbeddingRequest, body)
    data, given = reader.opened.recipe.data, asked.input
    prompt = {"query": data.query_prompt, "document": data.passage_prompt, None: ""}[asked.prompt_name]
    every = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    texts: Texts = [(prompt + one,) if isinstance(one, str) else list(one) for one in every]
    tokens = (token for text in texts if isinstance(text, list) for token in text)
    check_tokens("input", tokens, reader.vocabulary)
    vectors, about = await _read(reader, asked, texts, EMBED)
    if (most := asked.dimensions or vectors.shape[1]) > vectors.shape[1]:
        what = f"dimensions: a vector has {vectors.shape[1]:,} numbers."
        raise Refusal(400, what, code="invalid_value", param="dimensions")

    def written() -> Document:
        numbers = unit(vectors[:, :most]).astype("<f4")
        if asked.encoding_format == "float":
            every = numbers.tolist()
        else:
            every = [base64.b64encode(row.tobytes()).decode() for row in numbers]
        rows = [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(every)]
        return {"object": "list", "data": rows, **about}

    return await asyncio.to_thread(written)  # of two thousand vectors a second, for which others would wait


async def classify(reader: TextReader, body: bytes) -> Document:
    asked = wire.read(ClassificationRequest, body)
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    scores, about = await _read(reader, asked, [(text,) for text in texts], CLASSIFY)
    every = probabilities(scores.astype(float), several=reader.labels.several)
    names = [labels.answer_of(reader.labels, p)["prediction"] for p in every]
    data = [
        {"index": i, "label": name, "probs": p.tolist(), "num_classes": len(p)}
        for i, (name, p) in enumerate(zip(names, every, strict=True))
    ]
    return {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "data": data, **about}


async def rerank(reader: TextReader, body: bytes) -> Answer:
    asked = wire.read(RerankRequest, body)
    if (asked.documents is None) == (asked.texts is None):
        raise Refusal(400, "documents or texts: one of them is needed.", code="invalid_value", param="documents")
    passages, data = asked.documents or asked.texts or [], reader.opened.recipe.data
    pairs: Texts = [(asked.query, one) for one in passages]
    if reader.opened.recipe.task == EMBED:
        pairs = [(data.query_prompt + asked.query,), *((data.passage_prompt + one,) for one in passages)]
    values, about = await _read(reader, asked, pairs, EMBED, REGRESS)
    scores = values[1:] @ values[0] if reader.opened.recipe.task == EMBED else values[:, 0]
    order = [(i, float(scores[i]), passages[i]) for i in np.argsort(-scores, kind="stable").tolist()]
    if asked.texts is not None:
        return [
            {"index": i, "score": score} | ({"text": text} if asked.return_text else {}) for i, score, text in order
        ]
    results = [{"index": i, "document": {"text": text}, "relevance_score": score} for i, score, text in order]
    return {"id": f"rerank-{uuid.uuid4().hex}", "results": results[: asked.top_n or None], **about}


async def _read(reader: TextReader, asked: TextsRequest, texts: Texts, *tasks: str) -> tuple[Values, Document]:
    """What is read of texts, and what every answer says."""
    if asked.model not in ("", reader.name):
        what = f"there is no model {asked.model[:200]!r}; there is {reader.name}."
        raise Refusal(404, what, code="model_not_found", param="model")
    if (task := reader.opened.recipe.task) not in tasks:
        raise Refusal(400, f"{reader.name} is of task {task}; this is of {', '.join(tasks)}.", code="unsupported_task")
    try:
        values, tokens = await reader.read(texts)
    except DataError as error:
        raise Refusal(400, error.message, code="context_length_exceeded", param="input") from None
    except Exception as error:
        raise failed(error) from None
    return values, {"model": reader.name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
