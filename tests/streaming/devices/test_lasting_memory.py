"""Buffers in pages: they live as long as any view of them, and go behind a synchronize of the device."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from page_drivers import GONE, NEW, RamPages, as_tensor
from weightstream.streaming.devices.lasting_memory import LastingMemory, Memory, PageCounts

PAGE = 2048


class Device:
    """Lasting memory in RAM.

    Attributes:
        waits: how often somebody has waited for the device.
        while_waiting: called meanwhile.
    """

    def __init__(self, free_pages: int = 1 << 20) -> None:
        self.driver = RamPages(PAGE, free_pages)
        self.waits = 0
        self.while_waiting: Callable[[], None] = lambda: None
        self.memory = LastingMemory(self.driver, 1 << 20, as_tensor, self._synchronize)

    def _synchronize(self) -> None:
        self.waits += 1
        self.while_waiting()

    @property
    def mapped(self) -> int:
        return self.memory.counts().mapped

    def allocate(self, nbytes: int = PAGE) -> torch.Tensor:
        buffer = self.memory.allocate(nbytes)
        assert buffer is not None
        return buffer


@pytest.fixture
def device() -> Device:
    return Device()


def test_a_buffer_is_ordinary_memory(device: Device) -> None:
    with torch.inference_mode():
        buffer = device.allocate(3 * PAGE + 5)
    assert not buffer.is_inference()
    assert (buffer.dtype, buffer.shape, buffer.data_ptr() % 512) == (torch.uint8, (3 * PAGE + 5,), 0)
    assert buffer.eq(NEW).all()
    buffer.fill_(7)
    assert buffer[512:1536].view(torch.float32).view(torch.uint8).eq(7).all()


def test_what_as_tensor_takes_says_where_it_is(device: Device) -> None:
    said = Memory(4096, 99).__cuda_array_interface__
    assert (said["shape"], said["typestr"], said["data"], said["strides"]) == ((99,), "|u1", (4096, False), None)
    assert said["stream"] is None


def test_memory_stays_as_long_as_a_view_of_it(device: Device) -> None:
    buffer = device.allocate()
    view = torch.nn.Parameter(buffer[512:1024].view(torch.float16).detach(), requires_grad=False)
    del buffer
    device.memory.give_back()
    assert (device.mapped, device.waits) == (PAGE, 0)
    view.data = torch.empty(0, dtype=torch.float16)
    assert (device.mapped, device.waits) == (PAGE, 0), "nothing happens where a reference goes"
    device.memory.give_back()
    assert (device.mapped, device.waits) == (0, 1)


def test_memory_that_nobody_has_is_not_in_use(device: Device) -> None:
    kept, dropped = device.allocate(PAGE + 512), device.allocate(PAGE)
    assert device.memory.counts() == PageCounts(2 * PAGE + 512, 3 * PAGE)
    del dropped
    assert device.memory.counts() == PageCounts(PAGE + 512, 3 * PAGE)
    device.memory.give_back()
    assert device.memory.counts() == PageCounts(kept.nbytes, 2 * PAGE)


def test_nobody_waits_where_nothing_was_dropped(device: Device) -> None:
    kept = [device.allocate(), device.allocate()]
    device.memory.give_back()
    assert (device.waits, len(kept)) == (0, 2)


def test_what_was_dropped_makes_room_for_the_next() -> None:
    device = Device(free_pages=2)
    first = device.allocate(2 * PAGE)
    assert device.memory.allocate(PAGE) is None
    del first
    device.allocate(2 * PAGE)
    assert device.waits == 1
    assert device.memory.works, "having no room is no fault of the driver's"


def test_pages_go_when_the_device_is_done(device: Device) -> None:
    """A kernel that is under way while the last reference goes: the memory holds what it reads until the end."""
    buffer = device.allocate()
    address, read = buffer.data_ptr(), []
    device.while_waiting = lambda: read.extend(as_tensor(Memory(address, PAGE)).tolist())
    buffer.fill_(3)
    del buffer
    device.memory.give_back()
    assert read == [3] * PAGE
    assert as_tensor(Memory(address, PAGE)).eq(GONE).all()


def test_what_is_dropped_while_the_host_waits_is_waited_for_anew(device: Device) -> None:
    """Its kernels may have been launched after the wait had begun."""
    buffers = [device.allocate(), device.allocate()]
    left: list[int] = []

    def meanwhile() -> None:
        left.append(device.mapped)
        buffers.clear()

    device.while_waiting = meanwhile
    buffers.pop()
    device.memory.give_back()
    assert left == [2 * PAGE, PAGE], "the one dropped first went alone"
    assert (device.mapped, device.waits) == (0, 2)


@pytest.mark.parametrize("ask", ["give_back", "allocate"])
def test_a_device_that_has_failed_keeps_what_was_dropped(device: Device, ask: str) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    device.while_waiting = fail
    device.allocate()
    with pytest.raises(RuntimeError, match="illegal"):
        device.memory.give_back() if ask == "give_back" else device.memory.allocate(1)
    device.while_waiting = lambda: None
    device.memory.give_back()
    assert device.mapped == 0


def ill(address: int, nbytes: int) -> None:
    raise RuntimeError("cuMemSomething failed with CUDA_ERROR_UNKNOWN (999)")


def test_a_driver_that_refuses_is_asked_no_more(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    kept = device.allocate()
    device.driver.before_map = ill
    assert device.memory.allocate(PAGE) is None
    device.driver.before_map = lambda address, nbytes: None
    assert device.memory.allocate(PAGE) is None
    assert not device.memory.works
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "weights get their memory from torch from now on: cuMemSomething failed with" in caplog.text
    del kept
    device.memory.give_back()
    assert device.driver.mapped == {}, "what there was goes as ever"


def test_a_page_that_cannot_be_unmapped_keeps_no_other(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    buffers = [device.allocate(), device.allocate()]
    first = buffers[0].data_ptr()
    device.driver.before_unmap = lambda address, nbytes: ill(address, nbytes) if address == first else None
    buffers.clear()
    device.memory.give_back()
    assert [*device.driver.mapped] == [first]
    assert not device.memory.works
    assert len(caplog.records) == 1


# -- whose backend is closed -----------------------------------------------------------------------------------------


def test_an_orphan_goes_with_its_last_reference(device: Device) -> None:
    orphan, other = device.allocate(), device.allocate()
    device.memory.orphan([orphan.data_ptr(), 12345])
    del orphan
    assert (device.mapped, device.waits) == (PAGE, 1)
    del other
    assert (device.mapped, device.waits) == (PAGE, 1), "somebody will ask for it"


def test_orphans_of_a_device_that_has_failed_disturb_nobody(device: Device, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    orphan = device.allocate()
    device.memory.orphan([orphan.data_ptr()])
    device.while_waiting = fail
    del orphan
    assert capsys.readouterr().err == ""
    device.while_waiting = lambda: None
    device.memory.give_back()
    assert device.mapped == 0


def test_an_orphan_that_goes_while_memory_is_taken_waits_for_the_next_time(device: Device) -> None:
    """As in a garbage collection in the middle of it, on the thread that holds the lock."""
    orphans = [device.allocate()]
    device.memory.orphan([orphans[0].data_ptr()])
    device.driver.before_map = lambda address, nbytes: orphans.clear()
    kept = device.allocate()
    assert (device.mapped, device.waits) == (2 * PAGE, 0)
    device.memory.give_back()
    assert device.mapped == kept.nbytes


def test_a_model_that_ends_while_memory_is_taken_or_given_back_disturbs_nobody(device: Device) -> None:
    """A garbage collection closes its backend on the thread that is in the middle of it."""
    buffers = [device.allocate() for _ in range(3)]

    def collect(*_: int) -> None:
        device.memory.orphan([buffers[0].data_ptr()] if buffers else [])
        device.memory.give_back()

    device.driver.before_map = device.driver.before_unmap = collect
    buffers.pop()
    kept = device.allocate()
    buffers.pop()
    device.memory.give_back()
    buffers.clear()
    assert (device.mapped, device.waits) == (kept.nbytes, 3)
    device.memory.give_back()
    assert not device.memory._busy


def test_an_orphans_address_is_forgotten_with_it(device: Device) -> None:
    orphan = device.allocate()
    device.memory.orphan([orphan.data_ptr()])
    del orphan
    assert device.memory._orphans == set()


# -- threads, and the end ---------------------------------------------------------------------------------------------


def test_threads_take_and_drop_at_once(device: Device) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            kept: list[torch.Tensor] = []
            for turn in range(200):
                buffer = device.allocate(1 + (number * 977 + turn * 613) % (3 * PAGE))
                buffer.fill_(number)
                kept.append(buffer)
                if turn % 5 == 4:
                    del kept[turn % 3 :: 2]
                    device.memory.give_back()
                    device.memory.counts()
                assert all(each.eq(number).all() for each in kept[-3:])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    gc.collect()
    device.memory.give_back()
    assert device.memory.counts() == PageCounts()
    assert device.driver.mapped == {}


AT_EXIT = """
import sys
sys.path[:0] = sys.argv[1:3]
import pytest, types
pack = types.ModuleType("weightstream")
pack.__path__ = [sys.argv[1]]
sys.modules["weightstream"] = pack
from page_drivers import RamPages, as_tensor
from weightstream.streaming.devices.lasting_memory import LastingMemory

def wait():
    raise SystemError("nobody may ask a device at the end of the process")

memory = LastingMemory(RamPages(), 1 << 20, as_tensor, wait)
kept = [memory.allocate(3000), memory.allocate(10)]
memory.orphan([kept[0].data_ptr()])
class Circle: pass
circle = Circle(); circle.me = circle; circle.buffer = memory.allocate(99)
sys.kept = kept
"""


@pytest.mark.slow
def test_a_process_ends_with_buffers_that_somebody_has(pytestconfig: pytest.Config) -> None:
    root = pytestconfig.rootpath
    program = [sys.executable, "-c", AT_EXIT, str(root), str(Path(__file__).parents[1])]
    result = subprocess.run(program, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_an_orphan_that_is_dropped_while_somebody_waits_goes_too(device: Device) -> None:
    """Who drops it finds somebody at work, and nobody may ever come again."""
    first, second = device.allocate(), device.allocate()
    device.memory.orphan([first.data_ptr(), second.data_ptr()])
    left = [second]
    del second

    def meanwhile() -> None:
        if left:
            thread = threading.Thread(target=left.clear)
            thread.start()
            thread.join()

    device.while_waiting = meanwhile
    del first
    assert device.mapped == 0


def test_memory_of_which_torch_makes_no_tensor_comes_from_torch() -> None:
    def fail(memory: Memory) -> torch.Tensor:
        raise RuntimeError("Numpy is not available")

    memory = LastingMemory(RamPages(PAGE, 1 << 20), 1 << 20, fail, lambda: None)
    assert memory.allocate(PAGE) is None
    assert not memory.works
    memory.give_back()
    assert memory.counts() == (0, 0)
