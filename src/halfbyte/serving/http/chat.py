"""OpenAI's chat and completions."""

from functools import partial

from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.routing import Route

from halfbyte.errors import DataError
from halfbyte.serving.engine import Ask
from halfbyte.serving.http import wire
from halfbyte.serving.http.answers import OpenAIReply
from halfbyte.serving.http.refusal import Refusal, check_tokens
from halfbyte.serving.http.service import Service, as_events
from halfbyte.serving.models import ServedModel

_STREAM = partial(as_events, last="[DONE]")


def routes(service: Service) -> list[Route]:
    return [
        Route("/v1/chat/completions", partial(chat, service), methods=["POST"]),
        Route("/v1/completions", partial(complete, service), methods=["POST"]),
    ]


async def chat(service: Service, http: Http) -> Response:
    asked = wire.read(wire.ChatRequest, await http.body())
    ask, form = await service.conversation(asked)
    reply = OpenAIReply([ask], chat=True, likely=ask.params.logprobs, form=form, usage=asked.with_usage)
    return await service.answer(http, [ask], reply, _STREAM if asked.stream else None)


async def complete(service: Service, http: Http) -> Response:
    asked = wire.read(wire.CompletionRequest, await http.body())
    model, models = service.model_named(asked.model), service.engine.models
    if len(asked.prompts) * (asked.n or 1) > models.places:
        raise Refusal(400, f"prompt: at most {models.places} texts in a request.", param="prompt", code="invalid_value")
    asks = []
    for given in asked.prompts:
        if isinstance(given, str):
            service.check_length(model, len(given))
            prompt = await service.aside(partial(token_ids, model, given))
        else:
            prompt = given
            check_tokens("prompt", prompt, models.vocabulary)
        params = service.params(asked, prompt, asked.max_tokens or 16, asked.logprobs)
        asks.append(Ask(model, prompt, params, asked.n or 1))
    reply = OpenAIReply(asks, chat=False, likely=asked.logprobs, usage=asked.with_usage)
    return await service.answer(http, asks, reply, _STREAM if asked.stream else None)


def token_ids(model: ServedModel, text: str, *, special: bool = True) -> list[int]:
    """Raises DataError: it is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("the prompt has half a surrogate pair, which is no text.") from None
    return list(model.tokenizer(text, add_special_tokens=special)["input_ids"])
