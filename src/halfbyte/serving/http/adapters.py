"""vLLM's way to load and unload adapters while the server runs, with its names and status codes.

Source: vLLM's `/v1/load_lora_adapter`, `/v1/unload_lora_adapter` (docs, "Dynamically serving LoRA adapters").
"""

import asyncio
from functools import partial

from starlette.requests import Request as Http
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from halfbyte.errors import HalfbyteError
from halfbyte.serving import adapters
from halfbyte.serving.adapters import AdapterFolders
from halfbyte.serving.engine import Change, Stopping
from halfbyte.serving.http import wire
from halfbyte.serving.http.refusal import Refusal
from halfbyte.serving.http.service import Service, failed
from halfbyte.serving.models import Models
from halfbyte.writing.text import TextWriter

INVALID, NOT_FOUND = "InvalidUserInput", "NotFoundError"


class LoadRequest(wire.Strict):
    lora_name: str = ""
    lora_path: str = ""


class UnloadRequest(wire.Strict):
    lora_name: str = ""
    lora_int_id: int | None = None


def routes(service: Service, folders: AdapterFolders) -> list[Route]:
    return [
        Route("/v1/load_lora_adapter", partial(load, service, folders), methods=["POST"]),
        Route("/v1/unload_lora_adapter", partial(unload, service), methods=["POST"]),
    ]


async def load(service: Service, folders: AdapterFolders, http: Http) -> Response:
    asked = wire.read(LoadRequest, await http.body())
    name = asked.lora_name
    if not name or not asked.lora_path:
        raise Refusal(400, "Both 'lora_name' and 'lora_path' must be provided.", kind=INVALID)
    _check_new(service.engine.models, name)
    try:
        found = await service.aside(partial(folders.find, asked.lora_path))
    except HalfbyteError as error:
        raise Refusal(400, error.message, kind=INVALID) from None
    if found is None:
        raise Refusal(404, "lora_path: there is no adapter of this name below the folders of --allow-adapters.",
                      kind=NOT_FOUND, param="lora_path")  # fmt: skip

    def work(models: Models) -> tuple[Models, TextWriter, str]:
        _check_new(models, name)
        return adapters.put(models, name, found)

    await _changed(service, work)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload(service: Service, http: Http) -> Response:
    asked = wire.read(UnloadRequest, await http.body())
    if not asked.lora_name:
        raise Refusal(400, "'lora_name' needs to be provided to unload a LoRA adapter.", kind=INVALID)

    def work(models: Models) -> tuple[Models, TextWriter, str]:
        if models.by_name.get(asked.lora_name, models.by_name[models.base]).adapter is None:
            raise Refusal(404, f"The lora adapter '{asked.lora_name[:64]}' cannot be found.", kind=NOT_FOUND)
        return adapters.take(models, asked.lora_name)

    await _changed(service, work)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


def _check_new(models: Models, name: str) -> None:
    if name in models.by_name:
        raise Refusal(400, f"The lora adapter '{name[:64]}' has already been loaded.", kind=INVALID)


async def _changed(service: Service, work: Change) -> None:
    try:
        await asyncio.wrap_future(service.engine.change(work))
    except Stopping as error:
        raise failed(error) from None
    except HalfbyteError as error:
        raise Refusal(400, error.message, kind=INVALID) from None
