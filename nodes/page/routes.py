"""The pack's routes.

[Note: who may unload]
The host's worker loads and runs models, in one thread. A route that took a model off its device meanwhile would free
memory that the worker uses. So the route holds the lock with which the worker takes a prompt from the queue, and fails
if a prompt runs. The host's page waits for that lock too. Freeing device memory takes no time. Unlocking RAM does, so
that is done in pieces, and others get the lock between. One gap is left: the host's own "Free model and node cache",
in the moment in which the worker carries it out. While that is still waiting, nothing is unloaded here either.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import comfy.model_management as mm
from aiohttp import web

from ..host.devices import unload
from ..model.patcher import StreamedModelPatcher
from ..model.streamed_model import StreamedModel, streamed_models
from ..tell import messages
from .converting import add_convert_route
from .estimating import add_estimate_route
from .status import StatusSource, own_status
from .timeline import describe_runs, describe_traces, trace_file, traces_of
from .watching import LEASE_SECONDS, Watch

if TYPE_CHECKING:
    from server import PromptServer

STATUS_ROUTE = "/weightstream/v1/status"
WATCH_ROUTE = "/weightstream/v1/watch"
UNLOAD_ROUTE = "/weightstream/v1/unload"
TIMELINE_ROUTE = "/weightstream/v1/timeline"
STEPS_ROUTE = "/weightstream/v1/steps"

# ?format=chrome
CHROME = "chrome"

MODEL, PINNED = "model", "pinned"
UNLOCKED_AT_ONCE = 1 << 30

BetweenPrompts = Callable[[], AbstractContextManager[None]]


class BusyError(Exception):
    """Nothing can be unloaded now; the text says why."""


def free(models: list[StreamedModel], what: str, between_prompts: BetweenPrompts) -> dict[str, int]:
    """Take models off their devices, or free their page-locked memory. Returns the freed bytes of each kind.

    Args:
        models: the parts of one model.
        what: :data:`MODEL` or :data:`PINNED`.
        between_prompts: a context in which no prompt runs (Note: who may unload).

    Raises:
        BusyError: they are in use.
    """
    before = _held(models)
    if what == PINNED:
        unlock(models, between_prompts)
    else:
        with between_prompts():
            take_off(models)
    after = _held(models)
    return {"freed_device": before.device - after.device, "freed_pinned": before.pinned - after.pinned}


def unlock(models: list[StreamedModel], between_prompts: BetweenPrompts) -> None:
    """Free the page-locked memory of models, until a prompt begins.

    Raises:
        BusyError: nothing of it could be freed.
    """
    freed, had = 0, _held(models).pinned
    for model in models:
        while left := model.streamer.snapshot().pinned_bytes:
            try:
                with between_prompts():
                    piece = model.streamer.give_up_masters(min(left, UNLOCKED_AT_ONCE))
            except BusyError:
                if not freed:
                    raise
                return
            freed += piece
            if not piece:
                break
    if had and not freed:
        raise BusyError("it is in use; interrupt the prompt, or try again when it is done")


def take_off(models: list[StreamedModel]) -> None:
    """Have the host take these models off their devices."""
    for loaded in list(mm.current_loaded_models):
        if isinstance(patcher := loaded.model, StreamedModelPatcher) and patcher.streamed in models:
            unload(patcher)


@contextlib.contextmanager
def idle(server: PromptServer) -> Iterator[None]:
    """Keep the host's worker from beginning a prompt inside of this context.

    Raises:
        BusyError: a prompt runs, or ComfyUI is about to free models.
    """
    queue = server.prompt_queue
    with queue.mutex:
        if queue.currently_running:
            raise BusyError("a prompt is running; interrupt it, or try again when it is done")
        if queue.flags:
            raise BusyError("ComfyUI is about to free models itself; try again in a moment")
        yield


class _Held(NamedTuple):
    device: int
    pinned: int


def _held(models: list[StreamedModel]) -> _Held:
    snapshots = [model.streamer.snapshot() for model in models]
    return _Held(sum(each.device_bytes for each in snapshots), sum(each.pinned_bytes for each in snapshots))


def add_routes(source: StatusSource = own_status) -> None:
    """Register the routes. Without a server there is nothing to do.

    Args:
        source: of the status, and of the events that pages ask for.
    """
    server = messages.find_server()
    if server is None:
        return
    watch = Watch(server, source)
    add_convert_route(server)
    add_estimate_route(server)

    @server.routes.get(STATUS_ROUTE)
    async def get_status(_request: web.Request) -> web.Response:
        async with source() as read:
            return web.json_response(await read())

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
        models = _models(body.get("model"))
        if not models:
            return _unknown(body.get("model"))
        try:
            return web.json_response(await asyncio.to_thread(free, models, body["what"], partial(idle, server)))
        except BusyError as error:
            return _refused(409, str(error))

    @server.routes.get(TIMELINE_ROUTE)
    async def get_timeline(request: web.Request) -> web.Response:
        models = _models(request.query.get("model"))
        if not models:
            return _unknown(request.query.get("model"))
        traces = traces_of(models)
        if request.query.get("format") == CHROME:
            headers = {"Content-Disposition": 'attachment; filename="weightstream-step.json"'}
            return web.json_response(trace_file(traces, models[0].title), headers=headers)
        return web.json_response({"model": str(models[0].number), "devices": describe_traces(traces)})

    @server.routes.post(TIMELINE_ROUTE)
    async def post_timeline(request: web.Request) -> web.Response:
        wanted = (await _body(request)).get("model")
        models = _models(wanted)
        if not models:
            return _unknown(wanted)
        answers = [model.streamer.ask_for_trace() for model in models]
        if not all(answers):
            return _refused(409, "steps of a compiled model are not recorded: it would be compiled anew")
        return web.json_response({})

    @server.routes.get(STEPS_ROUTE)
    async def get_steps(request: web.Request) -> web.Response:
        models = _models(request.query.get("model"))
        if not models:
            return _unknown(request.query.get("model"))
        return web.json_response({"model": str(models[0].number), "runs": describe_runs(models)})


def _models(number: object) -> list[StreamedModel]:
    """The parts of the model with this number."""
    return [model for model in streamed_models() if str(model.number) == str(number)]


def _unknown(number: object) -> web.Response:
    return _refused(404, f"there is no model {number}; it may be gone already")


async def _body(request: web.Request) -> dict[str, Any]:
    """The JSON object that was sent; an empty one if it was something else."""
    try:
        body = await request.json()
    except (ValueError, LookupError, RecursionError):  # No JSON, an unknown encoding, nested too deeply.
        return {}
    return body if isinstance(body, dict) else {}


def _refused(code: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=code)
