"""Every prompt gets one result: whatever dies, whenever it dies, and whoever interrupts.

The workers here are small and die when they are told to. Real ones, with real ComfyUIs, are in test_fleet.py.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from weightstream.fleet import dispatcher
from weightstream.fleet.dispatcher import Dispatcher
from weightstream.fleet.errors import FleetError, WorkerDied, WorkerStartError
from weightstream.fleet.files import Folders
from weightstream.fleet.jobs import Job
from weightstream.fleet.scheduling import PROMPT_SECONDS, ModelFile

MODEL = ModelFile("diffusion_models", "flux", 1)
# What a worker says of a prompt, in order. A fault comes before one of these, or behind the last.
MESSAGES = ("start", "picture", "done")
FAULTS = ("dies", "falls silent", "its GPU breaks")


class FakeWorker:
    """Runs prompts as a worker does; ``faults`` says at which message of which of its prompts what happens."""

    def __init__(self, name: str, faults: Mapping[tuple[int, int], str] | None = None) -> None:
        self.name = name
        self.faults = dict(faults or {})
        self.ran: list[str] = []
        self.starts = 0
        self.models_there = {"diffusion_models": ["flux"]}
        self.refuses: set[str] = set()
        self.hold = asyncio.Event()
        self.hold.set()
        self.interrupted: set[str] = set()
        self.fails_to_start = 0
        self.ends = asyncio.Event()

    async def start(self) -> dict[str, Any]:
        self.starts += 1
        await asyncio.sleep(0)
        if self.starts <= self.fails_to_start:
            raise WorkerStartError("no such program")
        return {"host": "here", "models": self.models_there}

    async def run(self, prompt_id: str, body: dict[str, Any]) -> AsyncIterator[tuple[Any, ...]]:
        if prompt_id in self.refuses:
            yield "refused", {"error": {"message": "invalid"}, "node_errors": {}}
            return
        number = len(self.ran)
        self.ran.append(prompt_id)
        for place, message in enumerate(MESSAGES):
            await self.hold.wait()
            await asyncio.sleep(0)
            fault = self.faults.get((number, place))
            if fault == "dies":
                raise WorkerDied("killed")
            if fault == "falls silent":
                return
            for _ in range(5 if fault == "takes its time" else 0):
                await asyncio.sleep(0.3)
                yield "event", "progress", {"prompt_id": prompt_id, "value": 1, "max": 9}
            while fault == "hangs":
                await asyncio.sleep(0.05)
                yield "event", "another_pack", {"load": 0.5}
            if prompt_id in self.interrupted:
                yield "done", result("error", [["execution_interrupted", {"node_id": "3"}]])
                return
            if fault == "its GPU breaks":
                error = {"node_id": "3", "exception_type": "torch.AcceleratorError", "exception_message": "CUDA error"}
                yield "done", result("error", [["execution_error", error]])
                return
            if message == "start":
                yield "event", "execution_start", {"prompt_id": prompt_id}
            elif message == "picture":
                yield "event", "executed", {"output": {"images": [picture()]}}
            else:
                yield "done", result("success", [], {"9": {"images": [picture()]}})

    async def wait_for_end(self) -> str:
        await self.ends.wait()
        self.ends.clear()
        return "it ended by itself"

    async def interrupt(self, prompt_id: str) -> None:
        self.interrupted.add(prompt_id)

    async def free(self, flags: Mapping[str, bool]) -> None:
        raise FleetError("it does not answer")

    async def models(self) -> dict[str, list[str]]:
        return self.models_there

    async def lacks(self, places: Sequence[Any]) -> list[Any]:
        return []

    async def write(self, place: tuple[str, str, str], offset: int, piece: bytes) -> None:
        raise AssertionError("nothing has to be brought")

    async def request(self, *_: Any) -> tuple[int, dict[str, str], bytes]:
        raise AssertionError("nobody asks")


def picture() -> dict[str, str]:
    return {"filename": "a.png", "subfolder": "", "type": "output"}


def result(status: str, messages: list[Any], outputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "outputs": outputs or {},
        "status": {"status_str": status, "completed": status == "success", "messages": messages},
    }


class FakeFront:
    """A queue that checks that a prompt is in one place at a time, and ends once."""

    def __init__(self, count: int) -> None:
        self.all = [Job(f"p{number}", "page", {"prompt": {}}, frozenset({MODEL})) for number in range(count)]
        self.waiting = list(self.all)
        self.running: list[Job] = []
        self.results: dict[str, dict[str, Any]] = {}
        self.said: list[tuple[str, str]] = []
        self.at_result: Callable[[], None] = lambda: None

    def jobs(self) -> list[Job]:
        return list(self.waiting)

    def begin(self, job: Job) -> None:
        self.waiting.remove(job)
        assert job not in self.running
        self.running.append(job)

    def put_back(self, job: Job) -> None:
        self.running.remove(job)
        self.waiting.append(job)
        self.waiting.sort(key=self.all.index)

    def finish(self, job: Job, entry: dict[str, Any]) -> None:
        self.running.remove(job)
        assert job.id not in self.results, "it has ended twice"
        self.results[job.id] = entry
        self.at_result()

    def send(self, job: Job, kind: str, data: Any) -> None:
        assert job in self.running
        self.said.append((job.id, kind))
        if kind == "executed":
            assert data["output"]["images"][0]["subfolder"].startswith("gpu-")

    def send_bytes(self, job: Job, message: bytes) -> None:
        raise AssertionError("no previews here")

    def kind(self, prompt_id: str) -> str:
        """How a prompt has ended: with a success, or by the kind of its last message."""
        status = self.results[prompt_id]["status"]
        return "success" if status["completed"] else next(kind for kind, _ in status["messages"])


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "PATIENCE_SECONDS", 0.005)
    monkeypatch.setattr(dispatcher, "FIRST_PAUSE_SECONDS", 0.001)


def serve(
    tmp_path: Path,
    front: FakeFront,
    workers: list[FakeWorker],
    meanwhile: Callable[[Dispatcher], Awaitable[None]] | None = None,
    most_silent: float = 0.0,
) -> Dispatcher:
    """Run until all prompts have a result."""

    async def run() -> Dispatcher:
        served = Dispatcher(front, workers, Folders(tmp_path, tmp_path, tmp_path), most_silent)
        done = asyncio.Event()
        front.at_result = lambda: done.set() if len(front.results) == len(front.all) else None
        task = asyncio.create_task(served.run())
        if meanwhile is not None:
            await meanwhile(served)
        try:
            await asyncio.wait_for(done.wait(), 10)
            await asyncio.sleep(0.01)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert not front.running
        return served

    return asyncio.run(run())


def test_all_prompts_run_in_order_on_one_worker(tmp_path: Path) -> None:
    front, worker = FakeFront(5), FakeWorker("gpu-0")
    serve(tmp_path, front, [worker])
    assert worker.ran == ["p0", "p1", "p2", "p3", "p4"]
    assert {front.kind(job.id) for job in front.all} == {"success"}
    assert front.results["p0"]["outputs"]["9"]["images"][0]["subfolder"] == "gpu-0"


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_is_lost_at_any_moment_loses_nothing(tmp_path: Path, workers: int, fault: str) -> None:
    """All moments of the first two prompts of the first worker, alone and in pairs."""
    moments = list(itertools.product(range(2), range(len(MESSAGES))))
    for faults in (*itertools.combinations(moments, 1), *itertools.combinations(moments, 2)):
        front = FakeFront(4)
        some = [FakeWorker(f"gpu-{number}") for number in range(workers)]
        some[0].faults = dict.fromkeys(faults, fault)
        served = serve(tmp_path, front, some)
        # A later fault of the same prompt counts for nothing: it is not there any more.
        lost = len({number for number, _ in faults} & set(range(len(some[0].ran))))
        ended = [front.kind(job.id) for job in front.all]
        twice = [name for name in set(some[0].ran) if some[0].ran[:2] == [name, name]]
        if lost == 2 and twice:
            assert ended.count("execution_error") == 1, "two workers died with it"
            assert served.reruns == 1
        else:
            assert ended == ["success"] * 4
            assert served.reruns == lost
        assert some[0].starts == 1 + lost
        reruns = [job.id for job in front.all if job.lost and front.kind(job.id) == "success"]
        for name in reruns:
            assert "weightstream_rerun" in [kind for kind, _ in front.results[name]["status"]["messages"]]


@pytest.mark.parametrize("place", range(len(MESSAGES)))
def test_a_worker_that_hangs_is_started_again_and_its_prompt_runs_elsewhere(tmp_path: Path, place: int) -> None:
    front, some = FakeFront(2), [FakeWorker("gpu-0", {(0, place): "hangs"}), FakeWorker("gpu-1")]
    served = serve(tmp_path, front, some, most_silent=1.0)
    assert [front.kind(job.id) for job in front.all] == ["success"] * 2
    assert (some[0].starts, served.reruns) == (2, 1)
    (job,) = (job for job in front.all if job.lost)
    assert job.lost == {"gpu-0": "it has said nothing of its prompt for 1 s"}
    assert job.id in some[1].ran


def test_a_worker_that_speaks_of_its_prompt_is_left_alone(tmp_path: Path) -> None:
    front, worker = FakeFront(1), FakeWorker("gpu-0", {(0, 1): "takes its time"})
    served = serve(tmp_path, front, [worker], most_silent=1.0)
    assert (front.kind("p0"), worker.starts, served.reruns) == ("success", 1, 0)


def test_a_worker_that_does_not_take_the_files_of_a_prompt_hangs_too(tmp_path: Path) -> None:
    (tmp_path / "in.png").write_bytes(b"a picture")
    front, some = FakeFront(1), [FakeWorker("gpu-0"), FakeWorker("gpu-1")]
    front.all[0].body["prompt"] = {"1": {"class_type": "LoadImage", "inputs": {"image": "in.png"}}}

    async def never(places: Sequence[Any]) -> list[Any]:
        return await asyncio.Event().wait()

    some[0].lacks = never
    served = serve(tmp_path, front, some, most_silent=0.5)
    assert front.kind("p0") == "success"
    assert (some[0].starts, served.reruns, some[1].ran) == (2, 1, ["p0"])


def test_nobody_is_ended_for_silence_unless_that_is_asked_for(tmp_path: Path) -> None:
    front, worker = FakeFront(1), FakeWorker("gpu-0", {(0, 1): "hangs"})

    async def look(served: Dispatcher) -> None:
        while not worker.ran:
            await asyncio.sleep(0)
        await asyncio.sleep(0.4)
        assert (served.seats[0].state, worker.starts) == ("running", 1)
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        serve(tmp_path, front, [worker], look)


def test_a_prompt_that_kills_goes_elsewhere_and_then_has_an_error(tmp_path: Path) -> None:
    front = FakeFront(1)
    some = [FakeWorker(f"gpu-{number}", {(0, 1): "dies"}) for number in range(3)]
    serve(tmp_path, front, some)
    ran = [worker.name for worker in some if worker.ran]
    assert len(ran) == 2
    [[kind, said]] = front.results["p0"]["status"]["messages"]
    assert kind == "execution_error"
    assert all(f"{name}: killed" in said["exception_message"] for name in ran)


def test_with_the_only_worker_it_is_tried_again(tmp_path: Path) -> None:
    front, worker = FakeFront(1), FakeWorker("gpu-0", {(0, 2): "dies"})
    serve(tmp_path, front, [worker])
    assert worker.ran == ["p0", "p0"]
    assert front.kind("p0") == "success"


@pytest.mark.parametrize("place", range(len(MESSAGES) + 1))
@pytest.mark.parametrize("fault", [None, "dies"])
def test_an_interrupted_prompt_ends_interrupted(tmp_path: Path, place: int, fault: str | None) -> None:
    front, worker = FakeFront(2), FakeWorker("gpu-0")
    if fault and place < len(MESSAGES):
        worker.faults = {(0, place): fault}

    async def interrupt(served: Dispatcher) -> None:
        worker.hold.clear()
        while not worker.ran:
            await asyncio.sleep(0)
        assert not served.interrupt("unknown")
        assert served.interrupt("p0")
        worker.hold.set()

    serve(tmp_path, front, [worker], interrupt)
    assert front.kind("p0") == "execution_interrupted"
    assert front.kind("p1") == "success"
    assert worker.ran == ["p0", "p1"], "what was interrupted does not run again"


def test_a_prompt_that_one_worker_refuses_runs_on_another(tmp_path: Path) -> None:
    front, some = FakeFront(3), [FakeWorker("gpu-0"), FakeWorker("gpu-1")]
    some[0].refuses = {"p0", "p1", "p2"}
    serve(tmp_path, front, some)
    assert some[1].ran == ["p0", "p1", "p2"]
    assert all(job.attempts == 1 for job in front.all)


def test_a_prompt_that_all_refuse_has_an_error(tmp_path: Path) -> None:
    front, some = FakeFront(2), [FakeWorker("gpu-0"), FakeWorker("gpu-1")]
    for worker in some:
        worker.refuses = {"p0"}
    serve(tmp_path, front, some)
    assert front.kind("p1") == "success"
    [[_, said]] = front.results["p0"]["status"]["messages"]
    assert "gpu-0: invalid; gpu-1: invalid" in said["exception_message"]


def test_a_worker_without_the_model_gets_no_prompt_for_it(tmp_path: Path) -> None:
    front, some = FakeFront(3), [FakeWorker("gpu-0"), FakeWorker("gpu-1")]
    some[0].models_there = {"diffusion_models": []}
    front.waiting.clear()

    async def look(served: Dispatcher) -> None:
        while not all(seat.up for seat in served.seats):
            await asyncio.sleep(0)
        assert served.who_lacks(frozenset({MODEL})) == {"gpu-0": [MODEL], "gpu-1": []}
        some[0].models_there = {"diffusion_models": ["flux"]}
        await served.look_again()
        assert served.who_lacks(frozenset({MODEL})) == {"gpu-0": [], "gpu-1": []}
        some[0].models_there = {}
        await served.look_again()
        front.waiting = list(front.all)
        served.wake()

    serve(tmp_path, front, some, look)
    assert some[1].ran == ["p0", "p1", "p2"]


def test_a_worker_that_does_not_start_is_tried_again(tmp_path: Path) -> None:
    front, worker = FakeFront(1), FakeWorker("gpu-0")
    worker.fails_to_start = 3
    served = serve(tmp_path, front, [worker])
    assert worker.starts == 4
    assert served.seats[0].reason == ""


def test_a_worker_that_ends_while_it_is_free_is_started_again(tmp_path: Path) -> None:
    front, worker = FakeFront(1), FakeWorker("gpu-0")
    front.waiting.clear()

    async def end(served: Dispatcher) -> None:
        while not served.seats[0].up:
            await asyncio.sleep(0)
        worker.ends.set()
        while worker.starts < 2:
            await asyncio.sleep(0)
        front.waiting = list(front.all)
        served.wake()

    served = serve(tmp_path, front, [worker], end)
    assert front.kind("p0") == "success"
    assert (front.all[0].attempts, served.reruns) == (1, 0), "no prompt was lost by it"


def test_a_fault_of_ours_costs_one_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    front, worker = FakeFront(2), FakeWorker("gpu-0")
    send = front.send

    def fail(job: Job, kind: str, data: Any) -> None:
        if job.id == "p0":
            raise KeyError("a fault")
        send(job, kind, data)

    front.send = fail  # type: ignore[method-assign]
    serve(tmp_path, front, [worker])
    assert (front.kind("p0"), front.kind("p1")) == ("execution_error", "success")
    assert "cannot be served" in caplog.text


def test_a_queue_that_cannot_be_written_to_is_tried_again(tmp_path: Path) -> None:
    front, worker = FakeFront(2), FakeWorker("gpu-0")
    begin, failures = front.begin, [FleetError("the disk is full")] * 3

    def begin_later(job: Job) -> None:
        if failures:
            raise failures.pop()
        begin(job)

    front.begin = begin_later  # type: ignore[method-assign]
    serve(tmp_path, front, [worker])
    assert {front.kind(job.id) for job in front.all} == {"success"}
    assert worker.starts == 1


def test_what_is_learned_is_of_whole_prompts(tmp_path: Path) -> None:
    front, worker = FakeFront(3), FakeWorker("gpu-0", {(1, 0): "its GPU breaks"})
    worker.refuses = {"p0"}
    served = serve(tmp_path, front, [worker])
    seat = served.seats[0]
    assert (seat.prompt_seconds, seat.load_rate > 0) == (PROMPT_SECONDS, True), "all of them loaded a model, or failed"
    assert seat.changes <= 2


def test_freeing_forgets_what_is_loaded_and_outlives_a_worker_that_does_not_answer(tmp_path: Path) -> None:
    front, worker = FakeFront(1), FakeWorker("gpu-0")
    served = serve(tmp_path, front, [worker])
    assert served.seats[0].loaded == {MODEL}

    async def free() -> None:
        served.free({"free_memory": True})
        await asyncio.sleep(0.01)

    asyncio.run(free())
    assert served.seats[0].loaded == frozenset()
