"""Weights in pages of a real GPU: every byte goes back to the driver, and never under a kernel that reads it."""

from __future__ import annotations

import gc
import itertools
import random
import subprocess
import threading
from collections.abc import Iterator

import pytest
import torch
from models import make_transformer
from weightstream.streaming import CudaBackend, Streamer, StreamingConfig, cut_model
from weightstream.streaming.devices.cuda_pages import lasting_memory, page_counts
from weightstream.streaming.devices.lasting_memory import LastingMemory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DEVICE = torch.device("cuda:0")
MB = 1 << 20
# FLUX's units in bf16, and small ones that lie between them.
UNITS = [18_882_560, 56_647_680, 113_283_072, 132_157_440, 9_216]
# What is free is so for every process, and drivers take some for themselves.
SLACK = 16 * MB


@pytest.fixture
def memory() -> Iterator[LastingMemory]:
    torch.ones(2, 2, device=DEVICE).mm(torch.ones(2, 2, device=DEVICE))
    gc.collect()
    found = lasting_memory(0)
    if found is None:
        pytest.skip("torch gives all memory of this GPU")
    found.give_back()
    torch.cuda.empty_cache()
    yield found
    found.give_back()


def free() -> int:
    torch.cuda.synchronize(DEVICE)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(DEVICE)[0]


def take(memory: LastingMemory, nbytes: int) -> torch.Tensor:
    buffer = memory.allocate(nbytes)
    assert buffer is not None
    return buffer


def test_a_buffer_is_ordinary_memory_of_the_device(memory: LastingMemory) -> None:
    with torch.inference_mode():
        buffer = take(memory, 5 * MB + 512)
    assert (buffer.device, buffer.dtype, buffer.is_inference()) == (DEVICE, torch.uint8, False)
    expected = torch.randint(0, 256, (buffer.nbytes,), dtype=torch.uint8)
    buffer.copy_(expected.pin_memory(), non_blocking=True)
    assert torch.equal(buffer.cpu(), expected)
    matrix = buffer[: 2 * MB].view(torch.bfloat16).view(1024, 1024).fill_(0.5)
    assert torch.equal(matrix @ matrix, torch.full_like(matrix, 256.0))
    assert torch.equal(buffer[2 * MB :].cpu(), expected[2 * MB :])


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_every_byte_goes_back_in_every_order(memory: LastingMemory, order: tuple[int, ...]) -> None:
    before, counted = free(), page_counts(0)
    buffers: dict[int, torch.Tensor] = {number: take(memory, nbytes) for number, nbytes in enumerate(UNITS[:4])}
    for number, buffer in buffers.items():
        buffer.fill_(number + 1)
    del buffer
    assert before - free() >= sum(UNITS[:4])
    for number in order:
        del buffers[number]
        memory.give_back()
        assert all(bool((each == kept + 1).all()) for kept, each in buffers.items())
    assert page_counts(0) == counted
    assert abs(before - free()) < SLACK


def test_what_is_dropped_between_others_is_free_for_anybody(memory: LastingMemory) -> None:
    units = UNITS * 6
    buffers = [take(memory, nbytes) for nbytes in units]
    before, mapped = free(), page_counts(0).mapped
    dropped = units[::3]
    del buffers[::3]
    memory.give_back()
    page = 2 * MB
    gained = mapped - page_counts(0).mapped
    assert gained > sum(dropped) - 2 * page * len(dropped)
    assert free() - before > gained - SLACK
    again = torch.empty(gained - 4 * SLACK, dtype=torch.uint8, device=DEVICE)
    assert free() < before + 5 * SLACK, "one tensor of torch's has what lay in pieces"
    del again, buffers
    torch.cuda.empty_cache()


def test_kernels_that_read_what_is_dropped_read_it_to_the_end(memory: LastingMemory) -> None:
    """On a stream of their own, of which nobody here knows, and late."""
    stream = torch.cuda.Stream(DEVICE)
    for number in range(20):
        buffer = take(memory, 64 * MB)
        buffer.fill_(number)
        torch.cuda.synchronize(DEVICE)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            copy = torch.empty_like(buffer)
            copy.copy_(buffer)
        del buffer
        memory.give_back()
        other = take(memory, 64 * MB).fill_(255)
        torch.cuda.synchronize(DEVICE)
        assert bool((copy == number).all())
        del copy, other
    torch.cuda.empty_cache()


def test_threads_without_a_context_take_and_drop(memory: LastingMemory) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for turn in range(30):
                buffer = take(memory, 3 * MB + 512 * turn).fill_(number)
                if not bool((buffer == number).all()):
                    wrong.append(turn)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_has_no_room_is_torchs_to_refuse(memory: LastingMemory) -> None:
    backend = CudaBackend(DEVICE)
    counted, nothing_left = page_counts(0), free() + 64 * MB
    with pytest.raises(torch.OutOfMemoryError) as error:
        backend.allocate(nothing_left, lasting=True)
    assert backend.is_named(error.value)
    assert page_counts(0) == counted
    kept = torch.empty(free() // 2, dtype=torch.uint8, device=DEVICE)
    nbytes = kept.nbytes + 64 * MB
    del kept  # torch keeps it for its next allocation.
    buffer = backend.allocate(nbytes, lasting=True)
    assert page_counts(0).used == counted.used + nbytes
    del buffer
    backend.close()


def test_residents_that_come_and_go_leave_no_gap(memory: LastingMemory) -> None:
    """A model whose plan changes all the time, right to the bit, with nothing of its weights in torch's memory."""
    model = make_transformer(12, 1024)
    x = torch.randn(1, 64, 1024, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    resident = make_transformer(12, 1024).to(DEVICE)
    expected = resident(x)
    del resident
    torch.cuda.empty_cache()
    streamer = Streamer(model, cut_model(model), CudaBackend(DEVICE), StreamingConfig())
    chance, before = random.Random(3), free()
    for _ in range(15):
        streamer.load(streamer.plan_for(chance.randint(streamer.minimum_bytes, streamer.model_bytes)))
        for _ in range(3):
            assert torch.equal(model(x), expected)
        counts, plan = page_counts(0), streamer.plan
        assert counts.used >= plan.resident_bytes + plan.staging_bytes + plan.unpacking_bytes
        assert counts.mapped - counts.used < 4 * MB * (3 + len(plan.resident))
    streamer.unload()
    assert page_counts(0).used == 0
    streamer.close()
    torch.cuda.empty_cache()
    assert before - free() < SLACK


AT_EXIT = """
import sys, torch
from streaming.devices.cuda_pages import lasting_memory
torch.ones(1, device="cuda:0")
memory = lasting_memory(0)
class Circle: pass
circle = Circle(); circle.me = circle
if memory is not None:
    sys.kept = [memory.allocate(3 << 20).fill_(1), memory.allocate(99)]
    circle.buffer = memory.allocate(5 << 20).fill_(2)
    memory.orphan([circle.buffer.data_ptr(), sys.kept[0].data_ptr()])
"""


@pytest.mark.child("-c", AT_EXIT)
def test_a_process_ends_with_buffers_that_somebody_has(child: subprocess.CompletedProcess[str]) -> None:
    assert child.returncode == 0, child.stderr
    assert "Traceback" not in child.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_gpu_has_pages_of_its_own_and_others_may_read_them() -> None:
    other = torch.device("cuda", 1)
    torch.ones(1, device=other)
    memory = lasting_memory(1)
    if memory is None:
        pytest.skip("torch gives all memory of this GPU")
    with torch.cuda.device(0):
        before = page_counts(1).used
        buffer = take(memory, 5 * MB)
        assert buffer.device == other
        assert page_counts(1).used == before + 5 * MB
        buffer.fill_(7)
        assert bool((buffer.to(DEVICE) == 7).all())
        del buffer
        memory.give_back()
        assert page_counts(1).used == before
