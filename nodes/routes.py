"""The pack's routes.

[Note: who may unload]
Models are loaded and run by the host's worker, in one thread. A route that took one off the device meanwhile would pull
memory from under it. So it holds the lock with which the worker takes a prompt from the queue, and goes away where one
is running. What is left is the host's own "Free model and node cache" in the moment in which the worker carries it out:
while that is still waiting, nothing is unloaded here either.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import comfy.model_management as mm
from aiohttp import web

from ..streaming import open_vram_reader
from . import status
from .devices import unload
from .patcher import StreamedModelPatcher
from .usage import sampler
from .version import VERSION
from .watching import LEASE_SECONDS, SCHEMA, Watch

if TYPE_CHECKING:
    from server import PromptServer

    from .streamed_model import StreamedModel

STATUS_ROUTE = "/weightstream/v1/status"
WATCH_ROUTE = "/weightstream/v1/watch"
UNLOAD_ROUTE = "/weightstream/v1/unload"

MODEL, PINNED = "model", "pinned"


class BusyError(Exception):
    """Nothing can be unloaded now; the text says why."""


def full_status() -> dict[str, Any]:
    """Devices, host memory, models and notices: plain values, sizes in bytes."""
    with open_vram_reader() as reader:
        now = sampler.sample(reader)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "time": time.time(),
        **now.as_dict(),
        "models": status.describe_models(status.watched()),
        "notices": status.describe_notices(),
    }


def free(models: list[StreamedModel], what: str) -> dict[str, int]:
    """Take models off their devices, or free their page-locked memory; gives the bytes that came free, of each kind."""
    before = _held(models)
    if what == PINNED:
        for model in models:
            model.streamer.give_up_masters(model.streamer.snapshot().pinned_bytes)
    else:
        for loaded in list(mm.current_loaded_models):
            if isinstance(patcher := loaded.model, StreamedModelPatcher) and patcher.streamed in models:
                unload(patcher)
    after = _held(models)
    return {"freed_device": before[0] - after[0], "freed_pinned": before[1] - after[1]}


def _held(models: list[StreamedModel]) -> tuple[int, int]:
    snapshots = [model.streamer.snapshot() for model in models]
    return sum(snapshot.device_bytes for snapshot in snapshots), sum(snapshot.pinned_bytes for snapshot in snapshots)


def free_between_prompts(server: PromptServer, models: list[StreamedModel], what: str) -> dict[str, int]:
    """:func:`free`, while no prompt runs (Note: who may unload).

    Raises:
        BusyError: one does.
    """
    queue = server.prompt_queue
    with queue.mutex:
        if queue.currently_running:
            raise BusyError("a prompt is running; interrupt it, or try again when it is done")
        if queue.flags:
            raise BusyError("ComfyUI is about to free models itself; try again in a moment")
        return free(models, what)


def add_routes() -> None:
    """Register the routes. Without a server there is nothing to do."""
    server = status.find_server()
    if server is None:
        return
    watch = Watch(server)

    @server.routes.get(STATUS_ROUTE)
    async def get_status(_request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(full_status))

    @server.routes.post(WATCH_ROUTE)
    async def post_watch(request: web.Request) -> web.Response:
        client_id = (await _body(request)).get("client_id")
        if not isinstance(client_id, str) or not watch.renew(client_id):
            return _refused(400, "client_id must be that of a page that is open")
        return web.json_response({"seconds": LEASE_SECONDS})

    @server.routes.post(UNLOAD_ROUTE)
    async def post_unload(request: web.Request) -> web.Response:
        body = await _body(request)
        if body.get("what") not in (MODEL, PINNED):
            return _refused(400, f'what must be "{MODEL}" or "{PINNED}"')
        models = [model for model in status.watched() if str(model.number) == body.get("model")]
        if not models:
            return _refused(404, f"there is no model {body.get('model')!r}; it may be gone already")
        try:
            return web.json_response(await asyncio.to_thread(free_between_prompts, server, models, body["what"]))
        except BusyError as error:
            return _refused(409, str(error))


async def _body(request: web.Request) -> dict[str, Any]:
    """The JSON object that was sent; an empty one where it is something else."""
    try:
        body = await request.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _refused(code: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=code)
