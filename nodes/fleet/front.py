"""The ComfyUI in front: its own page and routes, with workers behind its queue instead of its own thread.

[Note: why a ComfyUI is in front]
Clients expect ComfyUI's routes and messages, those of other packs too, and these change with each version. So the front
is no program that imitates them. It is a ComfyUI of the version that is there, which validates prompts, keeps queue and
history, serves the page, and needs no GPU. What is exchanged is its queue (``prompt_queue.py``), which the host makes
before it loads packs and looks up whenever it uses it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import urllib.parse
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
from aiohttp import web

from ...fleet import ray_workers
from ...fleet.config import FleetConfig
from ...fleet.dispatcher import Dispatcher
from ...fleet.errors import FleetError
from ...fleet.files import Folders
from ...fleet.store import Store
from ...fleet.worker import WorkerSettings
from ..page.estimating import ESTIMATE_ROUTE
from ..page.routes import CHROME
from ..tell import messages
from .access import guard
from .fleet_status import FleetStatus, whose
from .models import models_of
from .prompt_queue import FleetQueue

if TYPE_CHECKING:
    from server import PromptServer

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# ComfyUI keeps folders with such a name from clients.
STATE_FOLDER = "__weightstream_fleet"
QUEUE_FILE = "queue.sqlite"
API = "/api"
# Of our routes those that are about one model (nodes/page/routes.py).
OF_MODELS = tuple(f"/weightstream/v1/{name}" for name in ("unload", "timeline", "steps"))
TOO_MANY = 429
RETRY_SECONDS = 5


class FleetFront:
    """A fleet that this ComfyUI is in front of."""

    def __init__(self, server: PromptServer, config: FleetConfig) -> None:
        self.config = config
        self._server = server
        self._state = Path(folder_paths.get_user_directory()) / STATE_FOLDER
        self._folders = Folders(
            Path(folder_paths.get_input_directory()),
            Path(folder_paths.get_output_directory()),
            Path(folder_paths.get_temp_directory()),
        )
        self.queue = FleetQueue(server, Store(self._state / QUEUE_FILE))
        self.dispatcher: Dispatcher | None = None
        self.why_down = ""
        self.status = FleetStatus(lambda: self.dispatcher, lambda: len(self.queue.queue), lambda: self.why_down)
        self._task: asyncio.Task[None] | None = None

    def install(self) -> None:
        """Exchange the host's queue, and look at requests before the host does."""
        self._server.prompt_queue = self.queue
        self._server.app.middlewares.append(self._middleware())
        self._task = self._server.loop.create_task(self._serve())

    async def _serve(self) -> None:
        try:
            count = await asyncio.to_thread(ray_workers.connect, self.config)
            node = ray_workers.node()
            settings = [
                WorkerSettings(f"gpu-{number}", self.config, self._folders, node, self._state)
                for number in range(count)
            ]
            workers = [ray_workers.RayWorker(each) for each in settings]
        except Exception as error:
            self._give_up(str(error) or repr(error))
            return
        self.dispatcher = Dispatcher(self.queue, workers, self._folders, self.config.silent_seconds)
        loop = asyncio.get_running_loop()
        self.queue.on_change = lambda: _call(loop, self.dispatcher.wake)
        self.queue.on_free = lambda flags: _call(loop, self.dispatcher.free, flags)
        self.queue.on_interrupt = self.dispatcher.interrupt
        logger.info("[WeightStream] a fleet of %d workers", count)
        try:
            await self.dispatcher.run()
        except Exception as error:  # Whatever it was: prompts must not wait for workers that nobody serves.
            logger.exception("[WeightStream] the fleet has ended")
            self._give_up(repr(error))

    def _give_up(self, why: str) -> None:
        """There are no workers: what comes is refused with the reason. What waits is kept, for a fleet that runs."""
        self.why_down = why
        logger.error("[WeightStream] the fleet does not run: %s", why)

    def _middleware(self) -> Any:
        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            path = request.path.removeprefix(API)
            if path in OF_MODELS:
                return await self._ask_worker(request, path)
            if path == ESTIMATE_ROUTE:
                return await self._estimate(request)
            if request.method == "POST" and path == "/interrupt":
                return await self._interrupt(request)
            if request.method == "POST" and path == "/prompt":
                refusal = await self._refuse(request)
                if refusal is not None:
                    return refusal
            return await handler(request)

        return middleware

    async def _ask_worker(self, request: web.Request, path: str) -> web.Response:
        """A route about one model: the worker answers that has it."""
        body = await request.read()
        model = request.query.get("model")
        if model is None:
            try:
                model = json.loads(body)["model"]
            except (ValueError, TypeError, LookupError):
                model = ""
        name, number = whose(model)
        seats = self.dispatcher.seats if self.dispatcher is not None else []
        worker = next((seat.worker for seat in seats if seat.worker.name == name and seat.up), None)
        if worker is None:
            return web.json_response({"error": f"there is no model {model}; it may be gone already"}, status=404)
        query = {**request.query, "model": number}
        sent = json.dumps({**json.loads(body), "model": number}).encode() if body else b""
        headers = {"Content-Type": "application/json"} if body else {}
        target = f"{path}?{urllib.parse.urlencode(query)}"
        try:
            status, answered, content = await worker.request(request.method, target, headers, sent)
        except FleetError as error:
            return web.json_response({"error": f"{name} does not answer: {error}"}, status=502)
        kept = {key: value for key, value in answered.items() if key in ("Content-Type", "Content-Disposition")}
        if status == 200 and CHROME not in request.query.values():
            # The page knows the model by the fleet's name.
            told = json.loads(content)
            content = json.dumps({**told, "model": model} if "model" in told else told).encode()
        return web.Response(status=status, headers=kept, body=content)

    async def _estimate(self, request: web.Request) -> web.Response:
        """What a model will do: the first worker says it that answers, for its GPU. This process has none."""
        seats = self.dispatcher.seats if self.dispatcher is not None else []
        for worker in [seat.worker for seat in seats if seat.up]:
            try:
                status, _, content = await worker.request("GET", f"{ESTIMATE_ROUTE}?{request.query_string}", {}, b"")
            except FleetError as error:  # One that has just died counts as up until its prompt is known to be lost.
                logger.debug("[WeightStream] %s has no estimate: %s", worker.name, error)
                continue
            told = json.loads(content)
            return web.json_response({**told, "device": worker.name} if "device" in told else told, status=status)
        return web.json_response({"error": "no worker is up"}, status=409)

    async def _interrupt(self, request: web.Request) -> web.Response:
        """As the host's route. That one would interrupt what runs in this process, which is nothing."""
        try:
            body = await request.json()
        except ValueError:
            body = {}
        self.queue.on_interrupt(body.get("prompt_id") if isinstance(body, dict) else None)
        return web.Response(status=200)

    async def _refuse(self, request: web.Request) -> web.Response | None:
        """Why a prompt is not taken, before the host looks at it."""
        if self.why_down:
            return _refused(503, "fleet_down", f"The fleet does not run: {self.why_down}")
        if len(self.queue.queue) >= self.config.most_waiting:
            text = f"{len(self.queue.queue)} prompts wait already; try again later"
            return _refused(TOO_MANY, "queue_full", text, {"Retry-After": str(RETRY_SECONDS)})
        try:
            body = await request.json()
        except ValueError:
            return None  # The host says so.
        if not isinstance(body, dict):
            return None
        if self.queue.has(str(body.get("prompt_id"))):
            return _refused(409, "prompt_is_queued", f"The prompt {body['prompt_id']} waits or runs already")
        if not _is_finite(body.get("number", 0)):
            return _refused(400, "invalid_number", f"number={body['number']!r} is no place in a queue")
        prompt = body.get("prompt")
        if isinstance(prompt, dict) and self.dispatcher is not None:
            return await self._refuse_missing(self.dispatcher, prompt)
        return None

    async def _refuse_missing(self, dispatcher: Dispatcher, prompt: dict[str, Any]) -> web.Response | None:
        """Where no worker's host has all models: the names of those that are missing, and where."""
        files = models_of(prompt)
        lacking = dispatcher.who_lacks(files)
        if lacking and all(lacking.values()):
            await dispatcher.look_again()
            lacking = dispatcher.who_lacks(files)
        if not lacking or not all(lacking.values()):
            return None
        said = "; ".join(f"{name}: {', '.join(file.name for file in missing)}" for name, missing in lacking.items())
        return _refused(400, "missing_models", f"No worker has all models of this prompt. Missing on {said}")


def install_front() -> FleetFront | None:
    """Make this ComfyUI the front of a fleet, if it was started as one."""
    server = messages.find_server()
    if server is None:
        return None
    try:
        config = FleetConfig.from_environment()
        if config is None:
            return None
        # Before anything that can fail: whatever does, nobody comes in without it.
        server.app.middlewares.append(guard(config))
        front = FleetFront(server, config)
        front.install()
        return front
    except Exception as error:
        # A front without its queue must not run prompts by itself, on the CPU and unseen.
        logger.exception("[WeightStream] the fleet cannot be started")
        server.app.middlewares.append(_refuse_prompts(str(error) or repr(error)))
        return None


def _refuse_prompts(why: str) -> Any:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == "POST" and request.path.removeprefix(API) == "/prompt":
            return _refused(503, "fleet_down", f"The fleet does not run: {why}")
        return await handler(request)

    return middleware


def _is_finite(number: object) -> bool:
    try:
        return math.isfinite(float(number))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _refused(status: int, kind: str, text: str, headers: dict[str, str] | None = None) -> web.Response:
    """As the host refuses a prompt."""
    error = {"type": kind, "message": text, "details": "", "extra_info": {}}
    return web.json_response({"error": error, "node_errors": {}}, status=status, headers=headers)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *values: Any) -> None:
    """Call it on the loop, from any thread."""
    loop.call_soon_threadsafe(function, *values)
