"""Each line of cuda_backend.py that waits, records or page-locks, on a fake of torch.cuda (fake_cuda.py)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accesses import RaceError
from fake_cuda import PORTABLE, FakeCuda, cuda
from weightstream.streaming import CudaBackend
from weightstream.streaming.devices import cuda_backend
from weightstream.streaming.devices.allocation_record import AllocationRecord

__all__ = ["cuda"]

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
BYTES = 4096


class Record(AllocationRecord):
    """Knows whether it pauses, and has ``held`` bytes of the second device."""

    def __init__(self, held: int = 0) -> None:
        self.held = held
        self.pauses = 0
        self._paused = False

    @contextmanager
    def _pause(self) -> Any:
        self.pauses += 1
        yield

    def paused(self) -> AbstractContextManager[None]:
        return self._pause()

    def held_bytes(self, device: torch.device) -> int:
        return self.held if device == SECOND else 0


class Machine:
    """A backend of the second device, the first being current, with master copies and a slot.

    Attributes:
        masters: two in page-locked memory.
        slot: memory of the device.
    """

    def __init__(self, cuda: FakeCuda, copy_streams: int = 2, record: AllocationRecord | None = None) -> None:
        self.cuda = cuda
        self.backend = CudaBackend(SECOND, record or AllocationRecord())
        self.masters = [torch.full((BYTES,), number, dtype=torch.uint8) for number in (1, 2)]
        for master in self.masters:
            assert self.backend.register(master) is None
        self.backend.open(copy_streams)
        self.slot = self.backend.allocate(BYTES)
        cuda.synchronize(SECOND)
        cuda.host_waits = 0

    def copy(self, number: int = 0, after: Sequence[Any] = ()) -> Any:
        return self.backend.copy([(self.slot, self.masters[number])], after)

    def compute(self) -> None:
        """A kernel that reads the slot."""
        self.cuda.kernel(reads=[self.slot])

    def close(self) -> None:
        self.backend.close()
        for master in self.masters:
            self.backend.unregister(master.data_ptr())


@pytest.fixture
def machine(cuda: FakeCuda) -> Any:
    made = Machine(cuda)
    yield made
    made.close()


# -- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy_streams", [0, 1, 2, 3])
def test_a_copy_waits_for_the_kernels_before_it(cuda: FakeCuda, copy_streams: int) -> None:
    machine = Machine(cuda, copy_streams)
    machine.backend.wait(machine.copy())
    machine.compute()
    machine.copy(1, after=[machine.backend.mark()])
    machine.close()


def test_without_that_it_would_race(machine: Machine) -> None:
    machine.backend.wait(machine.copy())
    machine.compute()
    with pytest.raises(RaceError, match="may still be read"):
        machine.copy(1)


@pytest.mark.parametrize("copy_streams", [0, 1, 2, 3])
def test_copies_into_one_slot_keep_their_order(cuda: FakeCuda, copy_streams: int) -> None:
    machine = Machine(cuda, copy_streams)
    for number in (0, 1, 0):
        event = machine.copy(number)
    machine.backend.wait(event)
    machine.compute()
    machine.close()


def test_compute_waits_for_a_copy(machine: Machine) -> None:
    event = machine.copy()
    with pytest.raises(RaceError, match="before the write into it is done"):
        machine.compute()
    machine.backend.wait(event)
    machine.compute()


def test_all_pieces_of_a_copy_are_behind_its_event(machine: Machine) -> None:
    machine.backend.fine_bytes = BYTES // 4
    machine.backend.wait(
        machine.backend.copy([(machine.slot, machine.masters[0])], [machine.backend.mark()], fine=True)
    )
    machine.compute()
    assert machine.slot.tolist() == [1] * BYTES


def test_all_of_several_copies_is_the_last_one(machine: Machine) -> None:
    half = BYTES // 2
    pairs = [(machine.slot[:half], machine.masters[0][:half]), (machine.slot[half:], machine.masters[1][half:])]
    machine.backend.wait(machine.backend.all_of([machine.backend.copy([pair]) for pair in pairs]))
    machine.compute()


def test_copies_go_round_on_streams_of_their_own_device(machine: Machine) -> None:
    events = [machine.copy(number) for number in (0, 1, 0)]
    streams = [event.stream for event in events]
    assert streams[0] is streams[2] is not streams[1]
    assert {stream.index for stream in streams} == {1}
    assert machine.cuda.current_stream(SECOND) not in streams
    assert machine.cuda.current_device() == 0, "what was current is so again"


def test_there_are_as_many_copy_streams_as_were_asked_for_last(machine: Machine) -> None:
    compute = machine.cuda.current_stream(SECOND)
    for count, different in ((3, 3), (1, 1), (2, 2), (0, 1)):
        machine.backend.synchronize()
        machine.backend.open(count)
        streams = {machine.copy(number % 2).stream for number in range(6)}
        assert len(streams) == different
        assert (compute in streams) is (count == 0)


def test_nothing_of_a_step_makes_the_host_wait(machine: Machine) -> None:
    machine.backend.time_copies()
    for number in (0, 1):
        stall = machine.backend.wait(machine.copy(number, after=[machine.backend.mark()]))
        machine.compute()
        assert stall() is None
    before = machine.backend.moment()
    assert machine.backend.seconds(before, machine.backend.moment()) is None
    machine.backend.memory()
    assert machine.cuda.host_waits == 0
    assert machine.cuda.contexts == {1}


# -- times ---------------------------------------------------------------------------------------------------------


def test_copies_are_timed_from_their_begin_to_their_end_on_their_stream(machine: Machine) -> None:
    machine.copy()
    machine.backend.time_copies()
    machine.backend.copy(
        [(machine.slot[:64], machine.masters[0][:64]), (machine.slot[64:80], machine.masters[0][64:80])]
    )
    machine.copy(1)
    first, second = machine.backend.copy_times()
    assert (first.nbytes, second.nbytes) == (80, BYTES)
    assert first.begin.stream is first.end.stream is not second.end.stream
    assert machine.backend.seconds(first.begin, first.end) is None
    machine.cuda.catch_up()
    assert machine.backend.seconds(first.begin, first.end) == pytest.approx(0.001)
    assert machine.copy().enable_timing is False
    assert machine.backend.copy_times() == []


def test_a_time_begins_behind_what_the_copy_waits_for(machine: Machine) -> None:
    """Else a copy that waits for a slot would look like a slow bus."""
    machine.backend.time_copies()
    machine.compute()
    machine.copy(after=[machine.backend.mark()])
    (copy,) = machine.backend.copy_times()
    compute = machine.cuda.current_stream(SECOND)
    assert machine.cuda.accesses.seen_by(compute)[compute] == copy.begin.clock[compute]


def test_a_stall_is_the_time_that_compute_has_waited(machine: Machine) -> None:
    compute = machine.cuda.current_stream(SECOND)
    stall = machine.backend.wait(machine.copy())
    assert stall() is None
    machine.cuda.catch_up()
    assert stall() == pytest.approx(0.001)
    begin = machine.backend.moment()
    assert begin.stream is compute
    event = machine.copy()
    machine.cuda.catch_up()
    assert machine.backend.wait(event)() == 0
    assert machine.cuda.accesses.seen_by(compute) == begin.clock | {compute: begin.clock[compute]}


def test_compute_of_the_device_itself_is_held_back(machine: Machine) -> None:
    """Another one is current."""
    machine.backend.hold_back(0.25)
    ((stream, cycles),) = machine.cuda.slept
    assert stream is machine.cuda.current_stream(SECOND)
    assert 0.1 < cycles / 2.8e9 < cycles / 1.2e9 < 0.5


# -- the host waits ------------------------------------------------------------------------------------------------


def test_finish_waits_for_a_copy_and_sleeps_meanwhile(machine: Machine) -> None:
    """A reader's thread writes to a chunk again."""
    event = machine.copy()
    assert event.blocking, "a thread that spins takes a core from the others"
    with pytest.raises(RaceError), machine.cuda.accesses.written_by_host(machine.masters[0]):
        pytest.fail("a copy out of it is under way")
    machine.backend.finish(event)
    assert machine.cuda.host_waits == 1
    with machine.cuda.accesses.written_by_host(machine.masters[0]):
        machine.masters[0].fill_(3)


def test_finish_of_a_copy_that_is_over_only_asks(machine: Machine) -> None:
    event = machine.copy()
    machine.cuda.catch_up()
    machine.backend.finish(event)
    assert machine.cuda.host_waits == 0
    with machine.cuda.accesses.written_by_host(machine.masters[0]):
        machine.masters[0].fill_(3)


def test_synchronize_waits_for_every_stream_of_its_device(machine: Machine) -> None:
    machine.copy(0)
    machine.copy(1)
    machine.compute_later = machine.cuda.kernel(writes=[machine.backend.allocate(64)])
    machine.backend.synchronize()
    for master in machine.masters:
        with machine.cuda.accesses.written_by_host(master):
            master.fill_(3)


def test_who_closes_has_waited(cuda: FakeCuda) -> None:
    machine = Machine(cuda)
    machine.copy(0)
    machine.copy(1)
    machine.backend.close()
    for master in machine.masters:
        with cuda.accesses.written_by_host(master):
            master.fill_(3)
    machine.close()
    assert machine.backend.allocated == 0


def test_memory_that_is_dropped_without_waiting_is_a_fault(cuda: FakeCuda) -> None:
    """That the fake notices: torch gives the memory to the next who computes."""
    machine = Machine(cuda)
    machine.copy()
    machine.backend.free(machine.slot)
    machine.slot = None
    assert [fault for fault in cuda.faults if "gets memory that may be in use" in fault]
    cuda.faults.clear()
    machine.close()


# -- which device --------------------------------------------------------------------------------------------------


def test_without_an_index_it_is_the_device_that_is_current(cuda: FakeCuda) -> None:
    with cuda.device(1):
        backend = CudaBackend(torch.device("cuda"))
    assert (backend.device, backend.name) == (SECOND, "gpu:1")
    assert CudaBackend(FIRST).device == FIRST


def test_events_and_waits_of_compute_are_on_the_device_of_the_backend(machine: Machine) -> None:
    compute = machine.cuda.current_stream(SECOND)
    assert machine.backend.mark().stream is compute
    assert machine.backend.moment().stream is compute
    with machine.cuda.stream(machine.cuda.Stream(SECOND)) as _, machine.cuda.device(0):
        other = machine.cuda.current_stream(SECOND)
        assert machine.backend.mark().stream is other is not compute, "what the host makes current there"


def test_memory_is_what_is_free_and_what_torch_keeps(machine: Machine) -> None:
    gib = 1 << 30
    machine.cuda.stats = {"reserved_bytes.all.current": 5000, "active_bytes.all.current": 2000}
    assert machine.backend.memory() == (2 * gib, 3000)
    machine.cuda.stats = {"reserved_bytes.all.current": 5000, "active_bytes.all.current": 7000}
    assert machine.backend.memory() == (2 * gib, 0), "memory of another allocator counts as active"
    machine.cuda.stats = {}
    assert machine.backend.memory() == (2 * gib, 0), "nothing was allocated yet"
    machine.backend.record = Record(held=40)
    assert machine.backend.memory() == (2 * gib, 40)
    machine.backend.trim()
    assert machine.cuda.emptied == [1]


def test_a_pool_is_trimmed_for_one_device_when_its_kernels_are_over(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other devices keep what they have for their steps."""
    order: list[tuple[str, int]] = []
    pool = SimpleNamespace(trim=lambda: order.append(("trim", machine.cuda.current_device())))
    monkeypatch.setattr(cuda_backend, "pool_of", lambda index: pool if index == 1 else None)
    monkeypatch.setattr(machine.cuda, "synchronize", lambda device: order.append(("synchronize", device.index)))
    machine.cuda.stats = {"reserved_bytes.all.current": 5000, "active_bytes.all.current": 2000}
    with machine.cuda.device(0):
        assert machine.backend.trim() == 3000
    assert order == [("synchronize", 1), ("trim", 1)]
    assert machine.cuda.emptied == []


def test_a_peak_is_what_was_allocated_beyond_what_is(machine: Machine) -> None:
    stats = machine.cuda.stats = {"allocated_bytes.all.current": 700, "allocated_bytes.all.peak": 5000}
    machine.backend.watch_peak()
    stats["allocated_bytes.all.peak"] = 900
    stats["allocated_bytes.all.current"] = 750
    assert machine.backend.peak_bytes() == 150
    machine.cuda.stats = {}
    assert machine.backend.peak_bytes() is None, "an allocator that does not count"


def test_a_piece_is_kept_where_there_is_room(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(machine.backend, "_empty", taken.append)
    machine.backend.keep(1000)
    assert taken == [1000]

    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setattr(machine.backend, "_empty", lambda nbytes: fail(torch.OutOfMemoryError("no room")))
    with caplog.at_level(logging.DEBUG):
        machine.backend.keep(1000)
    assert "gpu:1 has no 1000 B in one piece: no room" in caplog.text
    monkeypatch.setattr(machine.backend, "_empty", lambda nbytes: fail(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        machine.backend.keep(1000)


# -- page-locking --------------------------------------------------------------------------------------------------


class Foreign(torch.Tensor):
    """Memory that torch has page-locked."""

    def is_pinned(self, *_: Any) -> bool:
        return True


def test_memory_is_locked_for_every_device(machine: Machine) -> None:
    for index in (0, 1):
        assert all(machine.cuda.is_locked_for(master, index) for master in machine.masters)
    assert machine.cuda.contexts == {1}, "a thread's own device gets no context for it"


def test_what_is_locked_already_is_said_and_not_tried(machine: Machine) -> None:
    foreign = torch.zeros(8, dtype=torch.uint8).as_subclass(Foreign)
    assert "by somebody else" in machine.backend.register(foreign)
    assert len(machine.cuda.registered) == 2
    machine.cuda.kernel(writes=[machine.slot])


def refused(machine: Machine) -> None:
    machine.cuda.refuses = lambda nbytes: True
    reason = machine.backend.register(torch.zeros(1 << 20, dtype=torch.uint8))
    assert reason == "page-locking 1.0 MiB failed (CUDA error 2)"


def not_registered(machine: Machine) -> None:
    machine.backend.unregister(12345)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("fail", [refused, not_registered])
def test_an_error_of_the_driver_is_nobody_elses(cuda: FakeCuda, fail: Callable[[Machine], None], late: bool) -> None:
    """The next kernel of this thread would raise it, or who waits for that, wherever that is."""
    record = Record()
    machine = Machine(cuda, record=record)
    cuda.late_errors = late
    before = record.pauses
    fail(machine)
    assert record.pauses > before, "what is allocated to take the error is not part of a step"
    cuda.kernel(writes=[machine.slot])
    cuda.raise_error()
    machine.close()


def test_what_is_said_of_a_drained_error(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "weightstream"):
        not_registered(machine)
    assert "CUDA error: 713" in caplog.text


def test_unlocking_frees_what_was_locked(cuda: FakeCuda) -> None:
    backend = CudaBackend(SECOND)
    memory = torch.zeros(64, dtype=torch.uint8)
    assert backend.register(memory) is None
    backend.unregister(memory.data_ptr())
    assert cuda.registered == {}
    assert backend.register(memory) is None
    backend.unregister(memory.data_ptr())
    assert cuda.contexts == {1}
    assert cuda.host_waits == 0, "nothing has failed"


def test_other_threads_have_devices_of_their_own(cuda: FakeCuda) -> None:
    """A thread that fills memory starts on the first device, also where the second is current elsewhere."""
    memory, reasons = torch.zeros(64, dtype=torch.uint8), []
    with cuda.device(1):
        backend = CudaBackend(torch.device("cuda"))
        thread = threading.Thread(target=lambda: reasons.append(backend.register(memory)))
        thread.start()
        thread.join()
    assert reasons == [None]
    assert cuda.contexts == {1}
    assert cuda.registered[memory.data_ptr()][1] is None, f"flag {PORTABLE}"
    backend.unregister(memory.data_ptr())
