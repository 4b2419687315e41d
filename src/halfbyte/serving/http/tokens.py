"""vLLM's `/tokenize` and `/detokenize`: a text or a conversation as tokens, and back."""

from functools import partial
from typing import Annotated

from pydantic import Field
from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.routing import Route

from halfbyte.serving.http import wire
from halfbyte.serving.http.chat import token_ids
from halfbyte.serving.http.refusal import Json, Refusal
from halfbyte.serving.http.service import Service
from halfbyte.serving.http.wire import ChatRequest, Message, Tool
from halfbyte.types import Document


class TokenizeRequest(wire.Strict):
    model: str = ""
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: Document | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(wire.Strict):
    model: str = ""
    tokens: list[int]


def routes(service: Service) -> list[Route]:
    return [
        Route("/tokenize", partial(tokenize, service), methods=["POST"]),
        Route("/detokenize", partial(detokenize, service), methods=["POST"]),
    ]


async def tokenize(service: Service, http: Http) -> Response:
    asked, models = wire.read(TokenizeRequest, await http.body()), service.engine.models
    model = service.model_named(asked.model or models.base)
    if asked.messages is not None:
        talk = ChatRequest(model=model.name, messages=asked.messages, tools=asked.tools,
                           chat_template_kwargs=asked.chat_template_kwargs)  # fmt: skip
        tokens, _ = await service.prompt(talk, model)
    elif asked.prompt is not None:
        service.check_length(model, len(asked.prompt))
        tokens = await service.aside(partial(token_ids, model, asked.prompt, special=asked.add_special_tokens))
    else:
        raise Refusal(400, "prompt or messages: one of them is needed.", code="invalid_value", param="prompt")
    strings = model.tokenizer.convert_ids_to_tokens(tokens) if asked.return_token_strs else None
    counts = {"count": len(tokens), "max_model_len": models.context.tokens}
    return Json(counts | {"tokens": tokens, "token_strs": strings})


async def detokenize(service: Service, http: Http) -> Response:
    asked, models = wire.read(DetokenizeRequest, await http.body()), service.engine.models
    model = service.model_named(asked.model or models.base)
    if any(not 0 <= token < models.vocabulary for token in asked.tokens):
        raise Refusal(400, "tokens: one is none of the model's.", code="invalid_value", param="tokens")
    return Json({"prompt": str(await service.aside(partial(model.tokenizer.decode, asked.tokens)))})
