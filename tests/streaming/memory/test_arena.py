from __future__ import annotations

import pytest
import torch
from weightstream.streaming import CpuBackend, PinBudget, VirtualMemory
from weightstream.streaming.memory.arena import Arena


class RegisteringBackend(CpuBackend):
    """Counts what is page-locked; refuses from the n-th request on."""

    def __init__(self, refuse_from: int = 10**9) -> None:
        super().__init__(VirtualMemory(10**9))
        self.registered: dict[int, int] = {}
        self.refuse_from = refuse_from
        self.requests = 0

    def register(self, buffer: torch.Tensor) -> str | None:
        self.requests += 1
        if self.requests >= self.refuse_from:
            return "page-locking failed (error 2)"
        self.registered[buffer.data_ptr()] = buffer.nbytes
        return None

    def unregister(self, address: int) -> None:
        del self.registered[address]


def test_memory_is_unlocked_before_it_is_freed() -> None:
    backend = RegisteringBackend()
    arena = Arena(backend)
    buffers = [arena.allocate(5000) for _ in range(3)]
    for buffer in buffers:
        arena.lock(buffer)
    assert arena.pinned_bytes == sum(backend.registered.values()) == 15000
    arena.release(buffers.pop())
    assert arena.pinned_bytes == sum(backend.registered.values()) == 10000
    # Forgotten, not released: its end unlocks it all the same.
    buffers.clear()
    assert backend.registered == {}


def test_a_refused_lock_leaves_usable_memory_and_a_reason() -> None:
    arena = Arena(RegisteringBackend(refuse_from=2))
    buffers = [arena.allocate(1000) for _ in range(3)]
    for buffer in buffers:
        arena.lock(buffer)
        buffer.memory.fill_(1)
    assert [buffer.pinned for buffer in buffers] == [True, False, False]
    assert (arena.pinned_bytes, arena.pageable_bytes) == (1000, 2000)
    assert arena.reason == "page-locking failed (error 2)"
    for buffer in buffers:
        arena.release(buffer)
    assert (arena.pinned_bytes, arena.pageable_bytes) == (0, 0)


def test_the_limit_is_respected_and_explained() -> None:
    arena = Arena(RegisteringBackend(), budget=PinBudget(2500))
    buffers = [arena.allocate(1000) for _ in range(3)]
    for buffer in buffers:
        arena.lock(buffer)
    assert (arena.pinned_bytes, arena.pageable_bytes) == (2000, 1000)
    assert arena.reason == "the limit of 2.4 KiB page-locked memory is reached"


@pytest.mark.parametrize("claimed_first", [False, True])
def test_an_arena_has_a_limit_of_its_own(claimed_first: bool) -> None:
    backend, budget = RegisteringBackend(), PinBudget()
    arena, other = Arena(backend, budget=budget, limit=2500), Arena(backend, budget=budget)
    for _ in range(2):
        buffers = [arena.claim(1000) if claimed_first else arena.allocate(1000) for _ in range(3)]
        assert (buffers[2] is None) is claimed_first
        buffers = [buffer for buffer in buffers if buffer is not None]
        assert [arena.lock(buffer) for buffer in buffers] == [True, True, False][: len(buffers)]
        assert arena.reason == "this model's limit of 2.4 KiB page-locked memory is reached"
        assert other.lock(other.allocate(5000))
        for buffer in buffers:
            arena.release(buffer)
        assert (arena.pinned_bytes, arena.pageable_bytes) == (0, 0)
        arena.begin()


def test_what_was_refused_is_not_counted_towards_the_arenas_limit() -> None:
    arena = Arena(RegisteringBackend(refuse_from=2), limit=2500)
    buffers = [arena.allocate(1000) for _ in range(4)]
    assert [arena.lock(buffer) for buffer in buffers] == [True, False, False, False]
    assert arena._claimed_bytes == 1000


def test_more_is_tried_after_a_refusal() -> None:
    backend = RegisteringBackend(refuse_from=3)
    arena = Arena(backend)
    buffers = [arena.allocate(1000) for _ in range(4)]
    assert [arena.lock(buffer) for buffer in buffers] == [True, True, False, False]
    assert backend.requests == 3, "nobody asks for what was refused just now"
    backend.refuse_from = 10**9
    arena.begin()
    assert arena.lock(arena.allocate(1000))


def test_page_locking_can_be_switched_off() -> None:
    backend = RegisteringBackend()
    arena = Arena(backend, pin_memory=False)
    arena.lock(arena.allocate(1000))
    assert backend.requests == 0
    assert arena.reason == "page-locking is switched off"


def test_views_outlive_the_buffer() -> None:
    arena = Arena(RegisteringBackend())
    buffer = arena.allocate(4096)
    arena.lock(buffer)
    view = buffer.memory[100:200]
    view.fill_(9)
    arena.release(buffer)
    del buffer
    assert view.tolist() == [9] * 100


def test_an_interrupted_lock_is_not_counted() -> None:
    class Interrupted(RegisteringBackend):
        def register(self, buffer: torch.Tensor) -> str | None:
            raise KeyboardInterrupt

    budget = PinBudget(limit=5000)
    arena = Arena(Interrupted(), budget=budget)
    buffer = arena.allocate(1000)
    with pytest.raises(KeyboardInterrupt):
        arena.lock(buffer)
    arena.release(buffer)
    assert budget.used == 0
    assert (arena.pinned_bytes, arena.pageable_bytes) == (0, 0)


def test_memory_given_back_by_closing_is_not_given_back_twice() -> None:
    backend = CpuBackend(VirtualMemory(10_000))
    buffer = backend.allocate(1000)
    backend.close()
    backend.free(buffer)
    assert backend.store.allocated == 0
