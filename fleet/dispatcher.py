"""Gives prompts to workers, passes on what comes of them, and runs one again whose worker died.

[Note: nothing lost, nothing twice]
A prompt is in exactly one place: in the queue, or with one worker. It leaves the queue when a worker is about to get
it, which is written down first (``begin``), and it leaves the worker by its result, or by the worker's end. Only the
second puts it back into the queue, and only once: a prompt with which two workers died has an error for its result. So
has one that was begun twice before the front itself ended. All of this runs on one event loop; nothing between two
awaits is interleaved with anything else.

A worker's end is seen by the run that waits for it, not by whoever ends it. So a result that has arrived counts, and
one that has not is made again; the client hears of one prompt id either way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, TypeVar

from .errors import FleetError, WorkerDied
from .files import Folders, Place, pieces_of, read_by, rename, write_piece
from .jobs import Front, Job, Seat
from .ray_workers import FleetWorker
from .results import broken_gpu, failed, interrupted, reason_of, with_reruns
from .scheduling import ModelFile, choose, total
from .worker import BINARY, CANCELLED, DIED, DONE, EVENT, FILE, REFUSED, prefixes

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A prompt may be begun so often.
MOST_ATTEMPTS = 2
# New measurements count for so much in the averages.
NEWEST_SHARE = 0.3
# While prompts wait and workers are free, what is better off waiting is asked again.
PATIENCE_SECONDS = 0.5
# Between two starts of a worker that does not come up, doubled each time up to the second.
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
# A worker that hangs answers nobody; who asks does not wait for it.
ANSWER_SECONDS = 3.0


class Dispatcher:
    """The loop of each worker: start it, give it prompts, start it again when it died.

    Args:
        most_silent: seconds after which a worker that says nothing of its prompt counts as dead, and so is started
            again; 0 for never.
    """

    def __init__(
        self, front: Front, workers: Sequence[FleetWorker], folders: Folders, most_silent: float = 0.0
    ) -> None:
        self._front = front
        self._most_silent = most_silent or None
        self._folders = folders
        self.seats = [Seat(worker) for worker in workers]
        self._changed = asyncio.Event()
        self.reruns = 0

    async def run(self) -> None:
        """Serve until cancelled."""
        async with _Group() as group:
            for seat in self.seats:
                group.start(self._serve(seat))

    def wake(self) -> None:
        """Something waits, or was taken back."""
        self._changed.set()

    def interrupt(self, prompt_id: str | None = None) -> bool:
        """Interrupt the prompt with this id, or all that run; whether any does."""
        found = [seat for seat in self.seats if seat.job is not None and prompt_id in (None, seat.job.id)]
        for seat in found:
            assert seat.job is not None
            seat.job.cancelled = True
            _in_background(seat.worker.interrupt(seat.job.id))
        return bool(found)

    def free(self, flags: Mapping[str, bool]) -> None:
        """Have all workers unload models; what they have loaded counts no more."""
        for seat in self.seats:
            if seat.up:
                seat.loaded = frozenset()
                _in_background(seat.worker.free(flags))

    def who_lacks(self, files: frozenset[ModelFile]) -> dict[str, list[ModelFile]]:
        """For each worker that is up, which of these models its host does not have."""
        return {
            seat.worker.name: [file for file in sorted(files) if not seat.has(file)] for seat in self.seats if seat.up
        }

    async def look_again(self) -> None:
        """Ask all workers anew which models there are: one may have been added."""
        await asyncio.gather(*(self._look_at(seat) for seat in self.seats if seat.up))

    async def _look_at(self, seat: Seat) -> None:
        try:
            seat.models = _names(await asyncio.wait_for(seat.worker.models(), ANSWER_SECONDS))
        except (FleetError, asyncio.TimeoutError) as error:
            logger.info("[WeightStream] %s does not say which models it has: %r", seat.worker.name, error)

    # one worker

    async def _serve(self, seat: Seat) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                seat.info = await seat.worker.start()
            except FleetError as error:
                seat.state, seat.reason = "failed", str(error)
                logger.error("[WeightStream] %s cannot be started: %s", seat.worker.name, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            pause = FIRST_PAUSE_SECONDS
            seat.models = _names(seat.info.pop("models"))
            seat.state, seat.reason, seat.loaded = "free", "", frozenset()
            logger.info("[WeightStream] %s is up on %s", seat.worker.name, seat.info.get("host"))
            ending = asyncio.ensure_future(seat.worker.wait_for_end())
            try:
                while True:
                    await self._serve_one(seat, ending)
            except WorkerDied as error:
                seat.state, seat.reason = "restarting", str(error)
                logger.warning("[WeightStream] %s is started again: %s", seat.worker.name, error)
                self._changed.set()
            finally:
                ending.cancel()
                await asyncio.gather(ending, return_exceptions=True)

    async def _serve_one(self, seat: Seat, ending: asyncio.Future[str]) -> None:
        try:
            await self._run(seat, await self._next(seat, ending))
        except WorkerDied:
            raise
        except FleetError as error:  # The queue's file cannot be written to: a disk that is full, for example.
            logger.error("[WeightStream] %s has to wait: %s", seat.worker.name, error)
            await asyncio.sleep(FIRST_PAUSE_SECONDS)

    async def _next(self, seat: Seat, ending: asyncio.Future[str]) -> Job:
        """The prompt that this worker takes, once there is one. It is the worker's when this returns.

        Raises:
            WorkerDied: it has ended meanwhile, by itself, and with nobody's prompt.
        """
        while (job := self._choose(seat)) is None or ending.done():
            if ending.done():
                raise WorkerDied(_why(ending))
            self._changed.clear()
            changed = asyncio.ensure_future(self._changed.wait())
            try:
                patience = PATIENCE_SECONDS if self._front.jobs() else None
                await asyncio.wait((changed, ending), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
        # Between the choice and this there is no await: no other worker can have chosen it too.
        self._front.begin(job)
        job.attempts += 1
        seat.job, seat.since, seat.state = job, time.monotonic(), "running"
        return job

    def _choose(self, seat: Seat) -> Job | None:
        jobs = {job.id: job for job in self._front.jobs()}
        self._refuse_hopeless(jobs)
        files = frozenset(file for job in jobs.values() for file in job.files)
        views = {id(each): each.view(files) for each in self.seats if each.up}
        up = frozenset(view.name for view in views.values())
        found = choose(views[id(seat)], list(views.values()), [job.waiting(up) for job in jobs.values()])
        return jobs[found.id] if found else None

    def _refuse_hopeless(self, jobs: dict[str, Job]) -> None:
        """Give an error to prompts that every worker has refused."""
        names = {seat.worker.name for seat in self.seats}
        for job in [job for job in jobs.values() if names <= job.refused.keys()]:
            del jobs[job.id]
            self._front.begin(job)
            reasons = "; ".join(f"{name}: {reason}" for name, reason in job.refused.items())
            self._front.finish(job, failed(job.id, "no worker can run this prompt: " + reasons))

    async def _run(self, seat: Seat, job: Job) -> None:
        before = seat.loaded
        try:
            entry = await self._result(seat, job)
        except WorkerDied as error:
            self._lose(seat, job, str(error))
            raise
        except FleetError as error:
            entry = failed(job.id, f"{seat.worker.name}: {error}")
        except Exception as error:
            # A fault of ours costs one prompt, not the fleet.
            logger.exception("[WeightStream] %s: the prompt %s cannot be served", seat.worker.name, job.id)
            entry = failed(job.id, f"{seat.worker.name}: {error!r}")
        if entry is not None:
            self._learn(seat, job, before, entry)
        seat.job, seat.state = None, "free"
        if entry is None:  # Refused: for another worker.
            self._front.put_back(job)
        else:
            self._front.finish(job, entry)
        self._changed.set()
        broken = entry and broken_gpu(entry)
        if broken:
            raise WorkerDied(broken)

    async def _result(self, seat: Seat, job: Job) -> dict[str, Any] | None:
        """Run a prompt and pass on what it says; its entry for the history, or None where the worker refuses it."""
        await self._bring_files(seat, job)
        if job.cancelled:
            return interrupted(job.id)
        names = prefixes(seat.worker.name)
        async for kind, *values in self._messages(seat, job):
            if kind == EVENT:
                event, data = values
                rename(data, names)
                self._front.send(job, event, data)
            elif kind == BINARY:
                self._front.send_bytes(job, values[0])
            elif kind == FILE:
                place, offset, piece = values
                path = self._folders.path(_in_front(Place(*place), names))
                await asyncio.to_thread(write_piece, path, offset, piece)
            elif kind == DONE:
                (entry,) = values
                rename(entry["outputs"], names)
                if (why := broken_gpu(entry)) and job.attempts < MOST_ATTEMPTS and not job.cancelled:
                    raise WorkerDied(why)
                return with_reruns(job.id, job.lost, entry)
            elif kind == REFUSED:
                job.refused[seat.worker.name] = reason_of(values[0])
                job.attempts -= 1
                return None
            elif kind == CANCELLED:
                return interrupted(job.id)
            elif kind == DIED:
                raise WorkerDied(values[0])
        raise WorkerDied("its events ended before the prompt did")

    async def _messages(self, seat: Seat, job: Job) -> AsyncIterator[tuple[Any, ...]]:
        """What a worker says of a prompt. One that hangs is ended when it is started again."""
        messages = seat.worker.run(job.id, job.body)
        heard = time.monotonic()
        while True:
            try:
                message = await self._in_time(messages.__anext__(), heard)
            except StopAsyncIteration:
                return
            yield message
            if _is_of(message, job.id):
                heard = time.monotonic()

    async def _in_time(self, asked: Awaitable[T], heard: float | None = None) -> T:
        """What a worker answers, of which something was ``heard`` last at that time, or just now.

        Raises:
            WorkerDied: it has been silent for too long.
        """
        if self._most_silent is None:
            return await asked
        silent = 0.0 if heard is None else time.monotonic() - heard
        try:
            return await asyncio.wait_for(asked, max(0.0, self._most_silent - silent))
        except asyncio.TimeoutError:
            raise WorkerDied(f"it has said nothing of its prompt for {self._most_silent:g} s") from None

    async def _bring_files(self, seat: Seat, job: Job) -> None:
        """Bring what the prompt reads to the worker's folders."""
        places = read_by(job.body["prompt"], self._folders)
        found = {tuple(place): self._folders.path(place).stat() for place in places}
        known = [(values, stat.st_size, stat.st_mtime_ns) for values, stat in found.items()]
        for values in await self._in_time(seat.worker.lacks(known)) if known else ():
            for offset, piece in pieces_of(self._folders.path(Place(*values))):
                await self._in_time(seat.worker.write(values, offset, piece, found[tuple(values)].st_mtime_ns))

    def _lose(self, seat: Seat, job: Job, reason: str) -> None:
        """A worker died with a prompt (Note: nothing lost, nothing twice)."""
        seat.job = None
        job.lost[seat.worker.name] = reason
        if job.cancelled:
            self._front.finish(job, interrupted(job.id))
        elif job.attempts >= MOST_ATTEMPTS:
            reasons = "; ".join(f"{name}: {why}" for name, why in job.lost.items())
            self._front.finish(job, failed(job.id, f"{MOST_ATTEMPTS} workers died with this prompt: {reasons}"))
        else:
            self.reruns += 1
            self._front.put_back(job)

    def _learn(self, seat: Seat, job: Job, before: frozenset[ModelFile], entry: Mapping[str, Any]) -> None:
        """From how long a whole prompt took: of prompts, or with other models than before, of loading."""
        seconds = time.monotonic() - seat.since
        changed = total(job.files - before)
        seat.done += 1
        seat.loaded = job.files
        if not (entry.get("status") or {}).get("completed"):
            return
        if not changed:
            seat.prompt_seconds += NEWEST_SHARE * (seconds - seat.prompt_seconds)
            return
        seat.changes += 1
        if (loading := seconds - seat.prompt_seconds) > 0:
            seat.load_rate += NEWEST_SHARE * (changed / loading - seat.load_rate)


def _is_of(message: Sequence[Any], prompt_id: str) -> bool:
    """Whether a worker's message shows that a prompt goes on: packs also tell of other things now and then."""
    kind, *values = message
    return kind != EVENT or (isinstance(values[1], Mapping) and values[1].get("prompt_id") == prompt_id)


def _in_front(place: Place, names: Mapping[str, str]) -> Place:
    return Place(place.kind, "/".join(part for part in (names[place.kind], place.subfolder) if part), place.name)


def _names(models: Mapping[str, Sequence[str]]) -> dict[str, frozenset[str]]:
    return {folder: frozenset(names) for folder, names in models.items()}


def _why(ending: asyncio.Future[str]) -> str:
    """Why a worker has ended: it says so, or cannot any more."""
    error = ending.exception()
    return str(error) if error is not None else ending.result()


_tasks: set[asyncio.Task[None]] = set()


def _in_background(work: Awaitable[None]) -> None:
    """Let it run by itself; what goes wrong is in the log."""

    async def watched() -> None:
        try:
            await work
        except FleetError as error:
            logger.info("[WeightStream] %s", error)

    task = asyncio.get_running_loop().create_task(watched())
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


class _Group:
    """Tasks that end together: the first that fails ends all. (asyncio's own needs Python 3.11.)"""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, work: Any) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    async def __aenter__(self) -> _Group:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
