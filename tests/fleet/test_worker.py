"""A worker whose ComfyUI was started again in the middle of a prompt, with a small one in its place."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from weightstream.fleet import worker as worker_module
from weightstream.fleet.config import FleetConfig
from weightstream.fleet.files import Folders
from weightstream.fleet.worker import DIED, DONE, EVENT, Worker, WorkerSettings

ID = "the-prompt"
ENTRY = {"outputs": {}, "status": {"status_str": "success", "completed": True, "messages": []}}
ENDS = {"type": "executing", "data": {"node": None, "prompt_id": ID}}


class Session:
    """ComfyUI's routes as a worker asks them, while the prompt runs."""

    def __init__(self) -> None:
        self.posted: list[str] = []

    @contextlib.asynccontextmanager
    async def post(self, path: str, json: Any) -> AsyncIterator[Any]:
        self.posted.append(path)
        yield SimpleNamespace(status=200, raise_for_status=lambda: None)

    @contextlib.asynccontextmanager
    async def get(self, path: str) -> AsyncIterator[Any]:
        async def answer() -> Any:
            return {ID: ENTRY} if path.startswith("/history") else {"queue_running": [[0, ID]], "queue_pending": []}

        yield SimpleNamespace(raise_for_status=lambda: None, json=answer)


def event(number: int) -> dict[str, Any]:
    return {"type": "progress", "data": {"prompt_id": ID, "value": number}}


def test_the_run_before_takes_nothing_from_the_one_that_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "SILENCE_SECONDS", 0.2)
    folders = Folders(tmp_path, tmp_path, tmp_path)

    async def scenario() -> None:
        worker = Worker(WorkerSettings("gpu-0", FleetConfig("/comfy", "python"), folders, "here", tmp_path))
        worker._session = session = Session()
        worker._process = SimpleNamespace(why_ended=lambda: None)
        worker._reader = asyncio.get_running_loop().create_future()

        async def collect() -> list[tuple[Any, ...]]:
            return [message async for message in worker.run(ID, {})]

        hung = asyncio.create_task(collect())
        await asyncio.sleep(0.05)
        assert worker._running == ID
        worker._messages = asyncio.Queue()  # As when it is started again.
        again = asyncio.create_task(collect())
        await asyncio.sleep(0.05)
        for number in range(3):
            worker._messages.put_nowait(event(number))
        assert (await hung)[0][0] == DIED
        assert worker._running == ID, "an interrupt has somebody to reach"
        interrupting = asyncio.create_task(worker.interrupt(ID))
        await asyncio.sleep(0.05)
        worker._messages.put_nowait(ENDS)
        found = await again
        assert [message[0] for message in found] == [EVENT] * 3 + [DONE]
        assert [message[2]["value"] for message in found[:3]] == [0, 1, 2]
        await interrupting
        assert "/interrupt" in session.posted
        assert (worker._running, worker._cancelled) == (None, None)

    asyncio.run(scenario())
