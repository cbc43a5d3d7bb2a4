"""Prompts on their way, the ComfyUI in front that they come from, and workers with what is known of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from .ray_workers import FleetWorker
from .scheduling import LOAD_BYTES_PER_SECOND, PROMPT_SECONDS, ModelFile, Waiting, WorkerView

State = Literal["starting", "free", "running", "restarting", "failed"]


@dataclass
class Job:
    """A prompt on its way.

    Attributes:
        id, client: the prompt's, and that of whoever is told of it.
        body: for ComfyUI's route ``/prompt``.
        files: the models that it loads.
        attempts: how often it was begun.
        refused: workers whose ComfyUI finds it invalid, with the reasons.
        lost: workers that died with it, and why.
        cancelled: whether it was interrupted.
    """

    id: str
    client: str | None
    body: dict[str, Any]
    files: frozenset[ModelFile] = frozenset()
    attempts: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    cancelled: bool = False

    def waiting(self, up: frozenset[str]) -> Waiting:
        """For the scheduler. Workers that died with it are not tried again, if one of those ``up`` has not."""
        excluded = frozenset(self.refused)
        if up - excluded - self.lost.keys():
            excluded |= self.lost.keys()
        return Waiting(self.id, self.files, excluded)


class Front(Protocol):
    """The ComfyUI in front: its queue, and the clients behind it. All on the dispatcher's loop."""

    def jobs(self) -> Sequence[Job]:
        """Those that wait, in the order of the queue."""
        ...

    def begin(self, job: Job) -> None:
        """Take it from the queue; from here on it counts as running."""
        ...

    def put_back(self, job: Job) -> None:
        """Back into the queue, where it was."""
        ...

    def finish(self, job: Job, entry: dict[str, Any]) -> None:
        """It has a result: ``outputs``, ``status``, ``meta`` as in ComfyUI's history."""
        ...

    def send(self, job: Job, kind: str, data: Any) -> None:
        """Tell its client of an event."""
        ...

    def send_bytes(self, job: Job, message: bytes) -> None:
        """Send its client a binary message, a preview for example."""
        ...


@dataclass
class Seat:
    """A worker with what is known of it."""

    worker: FleetWorker
    state: State = "starting"
    reason: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    job: Job | None = None
    since: float = 0.0
    loaded: frozenset[ModelFile] = frozenset()
    prompt_seconds: float = PROMPT_SECONDS
    load_rate: float = LOAD_BYTES_PER_SECOND
    done: int = 0
    changes: int = 0
    models: dict[str, frozenset[str]] = field(default_factory=dict)

    @property
    def up(self) -> bool:
        return self.state in ("free", "running")

    def has(self, file: ModelFile) -> bool:
        return file.name in self.models.get(file.folder, ())

    def view(self, files: frozenset[ModelFile]) -> WorkerView:
        """For the scheduler. ``files``: all that waiting prompts load."""
        busy = time.monotonic() - self.since if self.job is not None else None
        missing = frozenset((file.folder, file.name) for file in files if not self.has(file))
        return WorkerView(self.worker.name, busy, self.loaded, missing, self.prompt_seconds, self.load_rate)
