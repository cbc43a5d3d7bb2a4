"""A worker: an actor that owns a ComfyUI bound to one GPU, and speaks to it over HTTP on its own host.

It is the only way to that ComfyUI, which listens on the loopback interface alone: prompts, events, files and requests
of the page all come through the actor's methods, so hosts of a cluster need no open ports beside Ray's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from .child import Child
from .comfy_process import ComfyProcess
from .config import SHARE_VARIABLE, FleetConfig
from .errors import WorkerDied, WorkerStartError
from .files import OUTPUT, TEMP, Folders, Place, pieces_of, places_in, write_piece

# As which client a worker's ComfyUI knows its actor.
CLIENT = "weightstream-fleet"
START_SECONDS = 600.0
POLL_SECONDS = 0.1
END_POLL_SECONDS = 0.5
# Without a message for so long, a running prompt is asked after.
SILENCE_SECONDS = 5.0
# What the actor's socket tells ComfyUI first: previews come with their metadata, and the front takes that off for pages
# that do not know it.
FEATURES = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}

# What a run says, each a tuple that begins with one of these.
EVENT, BINARY, FILE = "event", "binary", "file"
DONE, REFUSED, CANCELLED, DIED = "done", "refused", "cancelled", "died"


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker needs to know when it is made.

    Attributes:
        name: also that of its folder in the front's output.
        front: the folders of the ComfyUI in front.
        front_node: the Ray node that this is on.
        state: a folder of the front's for logs; used on its host alone.
    """

    name: str
    config: FleetConfig
    front: Folders
    front_node: str
    state: Path


class Worker:
    """The actor. Its methods run one beside the other, on one event loop."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._process: ComfyProcess | None = None
        self._broker: Child | None = None
        self._session: aiohttp.ClientSession | None = None
        self._own: Path | None = None
        self._reader: asyncio.Task[None] | None = None
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        self._running: str | None = None
        self._cancelled: str | None = None
        self._folders = settings.front
        self._shares_input = True

    async def start(self, node: str, gpus: Sequence[int]) -> dict[str, Any]:
        """Start ComfyUI, in the place of one that is there; where it is and what it has, once it answers.

        Args:
            node: the Ray node that this actor is on.
            gpus: the numbers of the GPUs that Ray gave to it.

        Raises:
            WorkerStartError: it did not start.
        """
        await self.stop()
        config = self._settings.config
        local = node == self._settings.front_node
        self._place_folders(local)
        arguments = [
            *config.host_arguments,
            *config.worker_arguments,
            "--disable-auto-launch",
            *("--database-url", "sqlite:///:memory:"),
            *("--input-directory", os.fspath(self._folders.input)),
            *("--output-directory", os.fspath(self._folders.output)),
            # ComfyUI puts a folder of that name into it.
            *("--temp-directory", os.fspath(self._folders.temp.parent)),
        ]
        log = (self._settings.state if local else self._own_folder()) / f"{self._settings.name}.log"
        self._share(log)
        sharing = {SHARE_VARIABLE: config.share} if config.share else {}
        environ = {**sharing, **config.environ}
        self._process = ComfyProcess(config.python, config.main, arguments, environ, log, config.folder)
        self._process.start()
        self._session = aiohttp.ClientSession(
            self._process.url, timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0), trust_env=False
        )
        await self._wait_until_up()
        self._messages = asyncio.Queue()
        self._running = self._cancelled = None
        socket_ = await self._session.ws_connect(f"/ws?clientId={CLIENT}", max_msg_size=0)
        await socket_.send_json(FEATURES)
        self._reader = asyncio.create_task(self._read(socket_, self._messages))
        return {
            "host": socket.gethostname(),
            "pid": self._process.pid,
            "gpus": list(gpus),
            "local": local,
            "log": os.fspath(log),
            "models": await self._models(),
        }

    def _share(self, log: Path) -> None:
        """See to it that somebody on this host keeps what its workers share.

        The first worker's broker gets the address, and those of the others end at once. If it ends with its worker, the
        others go on with what they have; what they build from then on is their own until they are started again.
        """
        config = self._settings.config
        if config.share and (self._broker is None or not self._broker.running):
            self._broker = Child(config.python, Path(config.pack) / "streaming", {}, log.with_suffix(".share.log"))
            self._broker.start(["share", config.share])

    def _place_folders(self, local: bool) -> None:
        """Choose where this ComfyUI reads and writes (files.py, Note: whose folder)."""
        front, name = self._settings.front, self._settings.name
        self._shares_input = local
        if local:
            self._folders = Folders(front.input, front.output / name, front.temp / name / "temp")
        else:
            own = self._own_folder()
            self._folders = Folders(own / "input", own / "output", own / "temp")
        for folder in (self._folders.input, self._folders.output, self._folders.temp):
            folder.mkdir(parents=True, exist_ok=True)

    def _own_folder(self) -> Path:
        if self._own is None:
            self._own = Path(tempfile.mkdtemp(prefix="weightstream-worker-"))
        return self._own

    async def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                await self._get("/system_stats")
                return
            self._check_process(WorkerStartError)
            if time.monotonic() > deadline:
                raise WorkerStartError(f"its ComfyUI did not answer within {START_SECONDS:.0f} s")
            await asyncio.sleep(POLL_SECONDS)

    async def _models(self) -> dict[str, list[str]]:
        """The names in each of its folders of models."""
        return {folder: await self._get(f"/models/{folder}") for folder in await self._get("/models")}

    async def wait_for_end(self) -> str:
        """Why its ComfyUI has ended, once it has, by itself."""
        process = self._process
        while process is not None and (ended := process.why_ended()) is None:
            await asyncio.sleep(END_POLL_SECONDS)
        return ended if process is not None else "it was stopped"

    async def models(self) -> dict[str, list[str]]:
        return await self._models()

    async def stop(self) -> None:
        """End its ComfyUI."""
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
        if self._session is not None:
            await self._session.close()
            self._session = None
        if self._process is not None:
            await asyncio.to_thread(self._process.stop)
            self._process = None
        if self._own is not None:
            await asyncio.to_thread(shutil.rmtree, self._own, True)
            self._own = None

    # prompts

    async def run(self, prompt_id: str, body: dict[str, Any]) -> AsyncIterator[tuple[Any, ...]]:
        """Run a prompt; what comes of it, message by message, to the last: its result, or why there is none.

        Args:
            body: as for ComfyUI's own route ``/prompt``.
        """
        messages = self._messages
        while not messages.empty():  # Of the prompt before.
            messages.get_nowait()
        self._running = prompt_id
        try:
            async for message in self._run(prompt_id, body, messages):
                yield message
        except (aiohttp.ClientError, OSError) as error:
            # The process is looked at a moment later than its connections break.
            await asyncio.sleep(POLL_SECONDS)
            ended = self._process.why_ended() if self._process else None
            yield DIED, ended or f"its ComfyUI does not answer: {error!r}"
        finally:
            # The next one may have begun: its messages need not wait for the end of this. It may be of the same prompt,
            # if this one hung and ComfyUI was started again.
            is_last = self._messages is messages
            if self._running == prompt_id and is_last:
                self._running = None
            if self._cancelled == prompt_id and is_last:
                self._cancelled = None

    async def _run(
        self, prompt_id: str, body: dict[str, Any], messages: asyncio.Queue[Any]
    ) -> AsyncIterator[tuple[Any, ...]]:
        if self._cancelled == prompt_id:
            yield (CANCELLED,)
            return
        async with self._open.post("/prompt", json={**body, "prompt_id": prompt_id, "client_id": CLIENT}) as answer:
            if answer.status == 400:
                yield REFUSED, await answer.json()
                return
            answer.raise_for_status()
        while True:
            try:
                message = await asyncio.wait_for(messages.get(), SILENCE_SECONDS)
            except asyncio.TimeoutError:
                message = None
            if self._messages is not messages:
                raise aiohttp.ClientConnectionError("its ComfyUI was started again")
            if message is None:
                # The socket is gone, or nothing is to be told: the process may have ended, or the prompt.
                self._check_process(aiohttp.ClientConnectionError)
                if not await self._is_queued(prompt_id):
                    break
                if self._reader is None or self._reader.done():
                    raise aiohttp.ClientConnectionError("its events have ended")
            elif isinstance(message, bytes):
                yield BINARY, message
            elif _ends(message, prompt_id):
                break
            elif message["type"] not in ("status", "feature_flags"):
                async for file in self._carry(message):
                    yield file
                yield EVENT, message["type"], message.get("data")
        entry = (await self._get(f"/history/{prompt_id}")).get(prompt_id)
        if entry is None:
            yield DIED, "its ComfyUI has no result of the prompt, and does not run it"
            return
        async for file in self._carry(entry["outputs"]):
            yield file
        yield DONE, entry
        await self._post("/history", {"delete": [prompt_id]})

    async def _is_queued(self, prompt_id: str) -> bool:
        queue = await self._get("/queue")
        return any(item[1] == prompt_id for item in (*queue["queue_running"], *queue["queue_pending"]))

    async def _carry(self, value: Any) -> AsyncIterator[tuple[Any, ...]]:
        """The files that a message names, where the front cannot read them itself."""
        if self._shares_input:
            return
        for _, place in places_in(value):
            try:
                path = self._folders.path(place)
            except ValueError:
                continue
            if path.is_file():
                for offset, piece in pieces_of(path):
                    yield FILE, tuple(place), offset, piece

    async def interrupt(self, prompt_id: str) -> None:
        """Interrupt a prompt of :meth:`run`, which may not have begun. Returns when it has ended.

        ComfyUI forgets an interrupt that comes in the moment in which a prompt begins, so it is said again.
        """
        self._cancelled = prompt_id
        while self._running == prompt_id:
            await self._post("/interrupt", {"prompt_id": prompt_id})
            await asyncio.sleep(POLL_SECONDS)

    async def free(self, flags: Mapping[str, bool]) -> None:
        """ComfyUI's own "unload models" and "free memory"."""
        await self._post("/free", dict(flags))

    # files and the page

    async def lacks(self, places: Sequence[tuple[tuple[str, str, str], int, int]]) -> list[tuple[str, str, str]]:
        """Those of the front's files that this worker has not, or of another size (bytes) or time of change (ns)."""
        wanting = []
        for values, size, changed_ns in places:
            place = Place(*values)
            if place.kind == "input" and self._shares_input:
                continue
            path = self._folders.path(place)
            known = path.stat() if path.is_file() else None
            if known is None or (known.st_size, known.st_mtime_ns) != (size, changed_ns):
                wanting.append(values)
        return wanting

    async def write(self, values: tuple[str, str, str], offset: int, piece: bytes, changed_ns: int) -> None:
        """Put a piece of one of the front's files into this worker's folders."""
        await asyncio.to_thread(write_piece, self._folders.path(Place(*values)), offset, piece, changed_ns)

    async def request(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """A request to its ComfyUI: status, headers and body of the answer."""
        async with self._open.request(method, path, headers=headers, data=body or None) as answer:
            return answer.status, dict(answer.headers), await answer.read()

    # its ComfyUI

    async def _read(self, socket_: aiohttp.ClientWebSocketResponse, messages: asyncio.Queue[Any]) -> None:
        """Keep what comes from the socket; None behind the last."""
        async for message in socket_:
            if message.type is aiohttp.WSMsgType.TEXT:
                messages.put_nowait(json.loads(message.data))
            elif message.type is aiohttp.WSMsgType.BINARY:
                messages.put_nowait(message.data)
        messages.put_nowait(None)

    async def _get(self, path: str) -> Any:
        async with self._open.get(path) as answer:
            answer.raise_for_status()
            return await answer.json()

    async def _post(self, path: str, body: Mapping[str, Any]) -> None:
        if self._session is not None:
            async with self._session.post(path, json=dict(body)) as answer:
                answer.raise_for_status()

    @property
    def _open(self) -> aiohttp.ClientSession:
        """The connection to its ComfyUI. An actor that was made anew has none until it is started."""
        if self._session is None:
            raise WorkerDied("its ComfyUI was not started")
        return self._session

    def _check_process(self, error: type[Exception]) -> None:
        ended = self._process.why_ended() if self._process else "it was stopped"
        if ended is not None:
            raise error(ended)


def prefixes(name: str) -> dict[str, str]:
    """The subfolders of a worker's files in front, by kind."""
    return {OUTPUT: name, TEMP: f"{name}/temp"}


def _ends(message: Mapping[str, Any], prompt_id: str) -> bool:
    """Whether ComfyUI says that it is done with a prompt; its history has the result by then."""
    data = message.get("data") or {}
    return message["type"] == "executing" and data.get("node") is None and data.get("prompt_id") == prompt_id
