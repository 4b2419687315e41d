"""vLLM's own routes, with its names and status codes: `/tokenize` and `/detokenize`, a text or a conversation as tokens
and back; adapters loaded and unloaded while the server runs.

Source: vLLM's `/v1/load_lora_adapter`, `/v1/unload_lora_adapter` (docs, "Dynamically serving LoRA adapters").
"""

import asyncio
from functools import partial
from typing import Annotated

from pydantic import Field
from starlette.requests import Request as Http
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from halfbyte.errors import HalfbyteError
from halfbyte.serving.engine import Change, Stopping
from halfbyte.serving.folders import AdapterFolders
from halfbyte.serving.http import wire
from halfbyte.serving.http.chat import token_ids
from halfbyte.serving.http.refusal import Json, Refusal, check_tokens
from halfbyte.serving.http.service import Service, failed
from halfbyte.serving.models import Models, put_adapter, take_adapter
from halfbyte.types import Document
from halfbyte.writing.text import TextWriter


class TokenizeRequest(wire.Strict):
    model: str = ""
    prompt: str | None = None
    messages: Annotated[list[wire.Message], Field(min_length=1)] | None = None
    tools: list[wire.Tool] | None = None
    chat_template_kwargs: Document | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(wire.Strict):
    model: str = ""
    tokens: list[int]


def routes(service: Service, folders: AdapterFolders) -> list[Route]:
    """Those of adapters where folders are allowed."""
    posts = {"/tokenize": partial(tokenize, service), "/detokenize": partial(detokenize, service)}
    if folders.allowed:
        posts["/v1/load_lora_adapter"] = partial(load, service, folders)
        posts["/v1/unload_lora_adapter"] = partial(unload, service)
    return [Route(path, answer, methods=["POST"]) for path, answer in posts.items()]


async def tokenize(service: Service, http: Http) -> Response:
    asked, models = wire.read(TokenizeRequest, await http.body()), service.engine.models
    model = service.model_named(asked.model or models.base)
    if asked.messages is not None:
        talk = wire.ChatRequest(model=model.name, messages=asked.messages, tools=asked.tools,
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
    check_tokens("tokens", asked.tokens, models.vocabulary)
    return Json({"prompt": str(await service.aside(partial(model.tokenizer.decode, asked.tokens)))})


INVALID, NOT_FOUND = "InvalidUserInput", "NotFoundError"


class LoadRequest(wire.Strict):
    """`load_inplace`: take the place of an adapter of this name, if there is one."""

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


class UnloadRequest(wire.Strict):
    lora_name: str = ""
    lora_int_id: int | None = None


async def load(service: Service, folders: AdapterFolders, http: Http) -> Response:
    asked = wire.read(LoadRequest, await http.body())
    name = asked.lora_name
    if not name or not asked.lora_path:
        raise Refusal(400, "Both 'lora_name' and 'lora_path' must be provided.", kind=INVALID)
    _check_name(service.engine.models, name, replaces=asked.load_inplace)
    try:
        folder = await service.aside(partial(folders.find, asked.lora_path))
    except HalfbyteError as error:
        raise Refusal(400, error.message, kind=INVALID) from None
    if folder is None:
        raise Refusal(404, "lora_path: there is no adapter of this name below the folders of --allow-adapters.",
                      kind=NOT_FOUND, param="lora_path")  # fmt: skip

    def work(models: Models) -> tuple[Models, TextWriter, str]:
        _check_name(models, name, replaces=asked.load_inplace)
        return put_adapter(models, name, folder)

    await _changed(service, work)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload(service: Service, http: Http) -> Response:
    asked = wire.read(UnloadRequest, await http.body())
    if not asked.lora_name:
        raise Refusal(400, "'lora_name' needs to be provided to unload a LoRA adapter.", kind=INVALID)

    def work(models: Models) -> tuple[Models, TextWriter, str]:
        if models.by_name.get(asked.lora_name, models.by_name[models.base]).adapter is None:
            raise Refusal(404, f"The lora adapter '{asked.lora_name[:64]}' cannot be found.", kind=NOT_FOUND)
        return take_adapter(models, asked.lora_name)

    await _changed(service, work)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


def _check_name(models: Models, name: str, *, replaces: bool) -> None:
    there = models.by_name.get(name)
    if there is None or (replaces and there.adapter is not None):
        return
    more = "" if there.adapter is None else " If you want to load the adapter in place, set 'load_inplace' to True."
    raise Refusal(400, f"The lora adapter '{name[:64]}' has already been loaded.{more}", kind=INVALID)


async def _changed(service: Service, work: Change) -> None:
    try:
        await asyncio.wrap_future(service.engine.change(work))
    except Stopping as error:
        raise failed(error) from None
    except HalfbyteError as error:
        raise Refusal(400, error.message, kind=INVALID) from None
