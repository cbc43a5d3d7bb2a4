"""ComfyUI's queue of prompts with workers behind it instead of its own thread."""

from __future__ import annotations

import copy
import heapq
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import execution

from ...fleet.dispatcher import MOST_ATTEMPTS
from ...fleet.errors import FleetError
from ...fleet.jobs import Job
from ...fleet.results import failed
from ...fleet.store import Store
from .models import models_of

if TYPE_CHECKING:
    from server import PromptServer

logger = logging.getLogger(__name__)

# The host's binary messages: a preview as an image, and one with a description before it.
PREVIEW, PREVIEW_WITH_METADATA = 1, 4
IMAGE_TYPES = {"image/jpeg": 1, "image/png": 2}


class FleetQueue(execution.PromptQueue):
    """The host's queue and history, kept on the disk; prompts leave it for workers.

    The host's routes for prompts, queue, history and jobs use it as their own. The host's thread, which would run
    prompts here, finds none.

    Attributes:
        on_change: called when something waits, or was taken from the queue.
        on_free: called when ComfyUI is asked to unload models.
        on_interrupt: called with the id of a prompt to interrupt; whether it runs.
    """

    def __init__(self, server: PromptServer, store: Store) -> None:
        super().__init__(server)
        self._store = store
        self._jobs: dict[str, Job] = {}
        self.on_change: Callable[[], None] = lambda: None
        self.on_free: Callable[[Mapping[str, bool]], None] = lambda flags: None
        self.on_interrupt: Callable[[str | None], bool] = lambda prompt_id: False
        self._restore()

    def _restore(self) -> None:
        """What an earlier front has left."""
        self.history = self._store.history()
        for kept in self._store.prompts():
            if not math.isfinite(kept.number):
                continue
            number, prompt_id, prompt, extra, targets = kept.item
            item = (number, prompt_id, prompt, extra, targets, {})
            job = self._make_job(item, kept.attempts)
            if kept.attempts >= MOST_ATTEMPTS:
                why = f"the fleet ended while this prompt ran, and it had been begun {kept.attempts} times"
                self._end(item, failed(prompt_id, why))
                continue
            if kept.attempts:
                job.lost["the front"] = "it ended while this prompt ran"
            self._jobs[prompt_id] = job
            heapq.heappush(self.queue, item)
            # Behind those that wait, as they would be without the restart.
            self.server.number = max(self.server.number, int(abs(number)) + 1)
        if self.queue:
            logger.info("[WeightStream] %d prompts are left from before", len(self.queue))

    def _make_job(self, item: Sequence[Any], attempts: int = 0) -> Job:
        _, prompt_id, prompt, extra, targets, sensitive = item
        body = {"prompt": prompt, "extra_data": {**extra, **sensitive}, "partial_execution_targets": list(targets)}
        return Job(prompt_id, extra.get("client_id"), body, models_of(prompt), attempts)

    # the host's side

    def put(self, item: tuple[Any, ...]) -> None:
        with self.mutex:
            if self.has(item[1]):
                return  # Asked for twice at once: it is there.
            self._store.add(item[1], item[0], item[:5])
            self._jobs[item[1]] = self._make_job(item)
            super().put(item)
        self.on_change()

    def get(self, timeout: float | None = None) -> None:
        """Nothing is for the host's own thread; flags are, and it is woken for them."""
        with self.not_empty:
            self.not_empty.wait(timeout)

    def set_flag(self, name: str, data: Any) -> None:
        super().set_flag(name, data)
        self.on_free({name: bool(data)})

    def interrupt_if_running(self, prompt_id: str) -> bool:
        return self.on_interrupt(prompt_id)

    def wipe_queue(self) -> None:
        super().wipe_queue()
        self._forget_taken()

    def delete_queue_item(self, function: Callable[[Any], bool]) -> bool:
        deleted = bool(super().delete_queue_item(function))
        self._forget_taken()
        return deleted

    def _forget_taken(self) -> None:
        with self.mutex:
            left = {item[1] for item in (*self.queue, *self.currently_running.values())}
            self._jobs = {prompt_id: job for prompt_id, job in self._jobs.items() if prompt_id in left}
            self._store.keep_only(left)
        self.on_change()

    def wipe_history(self) -> None:
        super().wipe_history()
        self._store.forget_all()

    def delete_history_item(self, id_to_delete: str) -> None:
        super().delete_history_item(id_to_delete)
        self._store.forget(id_to_delete)

    def has(self, prompt_id: str) -> bool:
        """Whether a prompt with this id waits or runs."""
        return prompt_id in self._jobs

    # the dispatcher's side (fleet/jobs.py, Front)

    def jobs(self) -> Sequence[Job]:
        with self.mutex:
            return [self._jobs[item[1]] for item in sorted(self.queue, key=lambda item: item[:2])]

    def begin(self, job: Job) -> None:
        with self.mutex:
            (place,) = [place for place, item in enumerate(self.queue) if item[1] == job.id]
            self._store.begin(job.id)
            item = self.queue.pop(place)
            heapq.heapify(self.queue)
            self.currently_running[self.task_counter] = copy.deepcopy(item)
            self.task_counter += 1
            self.server.queue_updated()

    def put_back(self, job: Job) -> None:
        with self.mutex:
            heapq.heappush(self.queue, self.currently_running.pop(self._task(job)))
            self._store.put_back(job.id, job.attempts)
            self.server.queue_updated()

    def finish(self, job: Job, entry: dict[str, Any]) -> None:
        with self.mutex:
            item = self.currently_running[self._task(job)]
            self._end(item, entry, self._task(job))
            self._jobs.pop(job.id, None)
        for kind, data in (entry.get("status") or {}).get("messages", ()):
            # What no worker has said.
            if kind in ("execution_error", "execution_interrupted") and not data.get("node_id"):
                self.send(job, kind, data)
        self.send(job, "executing", {"node": None, "prompt_id": job.id})

    def _task(self, job: Job) -> int:
        (task,) = [task for task, item in self.currently_running.items() if item[1] == job.id]
        return task

    def _end(self, item: Sequence[Any], entry: dict[str, Any], task: int | None = None) -> None:
        """Into the history, here and on the disk."""
        status = entry["status"]
        result = {key: value for key, value in entry.items() if key not in ("prompt", "status")}
        shown = {"prompt": tuple(item[:5]), "outputs": {}, "status": status, **result}
        # Paid services' keys are no part of it.
        try:
            self._store.finish(item[1], shown)
        except FleetError as error:
            # The client gets it all the same; after a restart the prompt runs again.
            logger.error("[WeightStream] the result of %s is not kept: %s", item[1], error)
        if task is None:
            self.history[item[1]] = shown
            return
        kept = self.ExecutionStatus(**status) if status is not None else None
        self.task_done(task, result, kept, process_item=lambda prompt: tuple(prompt[:5]))

    def send(self, job: Job, kind: str, data: Any) -> None:
        # Without a client these go to nobody: an empty id is told to all by the host.
        if job.client is not None:
            self.server.send_sync(kind, data, job.client)

    def send_bytes(self, job: Job, message: bytes) -> None:
        if job.client is None:
            return
        kind, data = int.from_bytes(message[:4], "big"), message[4:]
        if kind == PREVIEW_WITH_METADATA:
            if self._knows_metadata(job.client):
                # Past the host's queue of messages, which would make the message itself.
                self.server.loop.create_task(self.server.send_bytes(kind, data, job.client))
                return
            kind, data = PREVIEW, _without_metadata(data)
        self.server.send_sync(kind, data, job.client)

    def _knows_metadata(self, client: str) -> bool:
        flags = self.server.sockets_metadata.get(client, {}).get("feature_flags", {})
        return flags.get("supports_preview_metadata") is True


def _without_metadata(data: bytes) -> bytes:
    """A preview as pages know it that cannot read its description."""
    length = int.from_bytes(data[:4], "big")
    described = json.loads(data[4 : 4 + length])
    image_type = IMAGE_TYPES.get(described.get("image_type"), IMAGE_TYPES["image/jpeg"])
    return image_type.to_bytes(4, "big") + data[4 + length :]
