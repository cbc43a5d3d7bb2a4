"""torch.cuda without a GPU: streams, events, page-locked memory and errors, ordered as CUDA orders them.

What is launched takes place at once; the order that CUDA would guarantee is what is checked (accesses.py). A device is
late: an event has happened only when the host has waited for it, or when the test says that the device has caught up.
So a wait, a record or a synchronize that is missing is a :class:`RaceError`, whatever the timing.

Strict where CUDA or torch is: an event without timing has no time, one of another device cannot be recorded, an error
that nobody has asked for is raised by the thread's next launch, memory is page-locked once and for some devices only.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from accesses import Accesses, Clock, span_of
from page_drivers import RamPages, as_tensor
from weightstream.streaming.devices import backend, cuda_backend
from weightstream.streaming.devices.lasting_memory import LastingMemory, Memory
from weightstream.streaming.model import forms

# Of the CUDA runtime API.
PORTABLE = 1
INVALID_VALUE, OUT_OF_MEMORY, ALREADY_REGISTERED, NOT_REGISTERED = 1, 2, 712, 713


class Stream:
    """Work of one device, in the order in which it is launched."""

    def __init__(self, cuda: FakeCuda, index: int, name: str) -> None:
        self.index = index
        self._cuda = cuda
        self._name = name

    def __repr__(self) -> str:
        return f"{self._name} of cuda:{self.index}"

    def wait_event(self, event: Event) -> None:
        self._cuda.launch(self)
        if event.clock is not None:
            self._cuda.accesses.see(self, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or self._cuda.Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._cuda.wait_on_host(self._cuda.accesses.seen_by(self))


class Event:
    """A moment on a stream.

    Attributes:
        clock: what is over when it has happened; None before it is recorded.
        blocking: who waits for it on the host sleeps.
        time: seconds, where it has one.
    """

    def __init__(self, cuda: FakeCuda, enable_timing: bool = False, blocking: bool = False) -> None:
        self.clock: Clock | None = None
        self.time: float | None = None
        self.blocking = blocking
        self.enable_timing = enable_timing
        self.stream: Stream | None = None
        self._cuda = cuda

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._cuda.current_stream()
        if self.stream is not None and self.stream.index != stream.index:
            raise RuntimeError(f"Event device {self.stream.index} does not match recording stream's {stream.index}")
        self._cuda.launch(stream)
        self.stream, self.clock = stream, self._cuda.accesses.seen_by(stream)
        self.time = float(next(self._cuda.ticks)) if self.enable_timing else None

    def query(self) -> bool:
        happened = self.clock is None or self._cuda.is_over(self.clock)
        if happened and self.clock is not None:
            self._cuda.accesses.see(threading.current_thread(), self.clock)
        return happened

    def synchronize(self) -> None:
        if self.clock is not None:
            self._cuda.wait_on_host(self.clock)

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds."""
        if self.time is None or other.time is None:
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if not (self.query() and other.query()):
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return other.time - self.time


# What reads all of a tensor, of the functions that are called on one.
COMPUTES = ("mul", "__mul__", "sum")


class DeviceTensor(torch.Tensor):
    """Memory of a device; copies into it and out of it are launched on the stream that is current.

    Attributes:
        machine, index: whose it is.
    """

    machine: FakeCuda
    index: int

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "copy_":
            _of_device(*args).machine.copy(args[0], args[1], kwargs.get("non_blocking", False))
        elif name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            args[0].machine.kernel(writes=[args[0]])
        elif name in COMPUTES:
            _of_device(*args).machine.kernel(reads=[each for each in args if isinstance(each, DeviceTensor)])
        output = super().__torch_function__(func, types, args, kwargs)
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, DeviceTensor):
                parent = _of_device(*args)
                tensor.machine, tensor.index = parent.machine, parent.index
        return output


def _of_device(*args: Any) -> DeviceTensor:
    """The first among arguments, and in lists of them."""
    flat = itertools.chain.from_iterable(each if isinstance(each, (list, tuple)) else [each] for each in args)
    return next(each for each in flat if isinstance(each, DeviceTensor))


class FakeCuda:
    """Stands for ``torch.cuda`` on a machine with some devices.

    Attributes:
        accesses: to the memory of the devices, and by them to that of the host.
        registered: page-locked memory: its span, and the device for which it is locked, None for all.
        contexts: devices on which somebody has made a context.
        host_waits: how often the host has waited for a device.
        emptied: devices whose cached memory was given back.
        free_bytes: of each device.
        stats: of torch's allocator.
        page_memories: lasting memory of devices that have pages; none has any unless the test says so.
        refuses: says whether so many bytes cannot be page-locked.
        late_errors: a thread's last error is raised when it waits, and not by its next launch.
        faults: of what nobody could be told.
        slept: streams on which a kernel has slept, with its cycles.
    """

    def __init__(self, devices: int = 2) -> None:
        self.accesses = Accesses()
        self.slept: list[tuple[Stream, int]] = []
        self.registered: dict[int, tuple[range, int | None]] = {}
        self.contexts: set[int] = set()
        self.host_waits = 0
        self.emptied: list[int] = []
        self.free_bytes = {index: (index + 1) << 30 for index in range(devices)}
        self.stats: dict[str, int] = {}
        self.faults: list[str] = []
        self.page_memories: dict[int, LastingMemory] = {}
        self.refuses: Callable[[int], bool] = lambda nbytes: False
        self.late_errors = False
        self.ticks = itertools.count(1)
        self._default = [Stream(self, index, "compute") for index in range(devices)]
        self._streams = list(self._default)
        self._over: Clock = {}
        self._mine = threading.local()

    # -- what torch.cuda has -------------------------------------------------------------------------------------

    def Stream(self, device: Any = None) -> Stream:
        stream = Stream(self, self._index(device), f"copy stream {len(self._streams)}")
        self._streams.append(stream)
        return stream

    def Event(self, enable_timing: bool = False, blocking: bool = False) -> Event:
        return Event(self, enable_timing, blocking)

    def current_device(self) -> int:
        return getattr(self._mine, "device", 0)

    def current_stream(self, device: Any = None) -> Stream:
        index = self._index(device)
        return getattr(self._mine, "streams", {}).get(index, self._default[index])

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self._mine.device = self.current_device(), self._index(device)
        try:
            yield
        finally:
            self._mine.device = before

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current_stream(stream.index)
        with self.device(stream.index):
            self._mine.streams = {**getattr(self._mine, "streams", {}), stream.index: stream}
            try:
                yield
            finally:
                self._mine.streams = {**self._mine.streams, stream.index: before}

    def synchronize(self, device: Any = None) -> None:
        index = self._index(device)
        self.contexts.add(index)
        streams = [stream for stream in self._streams if stream.index == index]
        for stream in streams:
            self.wait_on_host(self.accesses.seen_by(stream))
        self.accesses.end_of(streams)
        if self.late_errors:
            self.raise_error()

    def empty_cache(self) -> None:
        self.emptied.append(self.current_device())

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return dict(self.stats) if self._index(device) == 1 else {}

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        assert self._index(device) == 1
        if (now := self.stats.get("allocated_bytes.all.current")) is not None:
            self.stats["allocated_bytes.all.peak"] = now

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.free_bytes[self._index(device)], 1 << 40

    def cudart(self) -> FakeCuda:
        return self

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.contexts.add(self.current_device())
        span = range(address, address + nbytes)
        if any(span.start < other.stop and other.start < span.stop for other, _ in list(self.registered.values())):
            return self._fail(ALREADY_REGISTERED)
        if nbytes == 0 or self.refuses(nbytes):
            return self._fail(OUT_OF_MEMORY if nbytes else INVALID_VALUE)
        self.registered[address] = span, None if flags & PORTABLE else self.current_device()
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.contexts.add(self.current_device())
        if address not in self.registered:
            return self._fail(NOT_REGISTERED)
        span, _ = self.registered.pop(address)
        self.accesses.end(threading.current_thread(), span, "unlocks memory that a copy may be using")
        return 0

    # -- what devices do -----------------------------------------------------------------------------------------

    def allocate(self, nbytes: int, device: torch.device) -> DeviceTensor:
        """Memory for the stream that is current. Whoever had it before may have kernels under way in it there."""
        with torch.inference_mode(False):
            memory = np.zeros(nbytes, np.uint8)
            tensor = torch.from_numpy(memory).as_subclass(DeviceTensor)
        tensor.machine, tensor.index = self, device.index
        owner = self.current_stream(device)
        self.accesses.write(self.launch(owner), tensor)
        weakref.finalize(memory, self._freed, owner, span_of(tensor)).atexit = False
        return tensor

    def give_pages(self, index: int, free_pages: int = 1 << 20) -> RamPages:
        """Have a device give pages to who asks for lasting memory; from when they are unmapped nobody may use them."""

        def make(memory: Memory) -> DeviceTensor:
            tensor = as_tensor(memory).as_subclass(DeviceTensor)
            tensor.machine, tensor.index = self, index
            return tensor

        def unmap(address: int, nbytes: int) -> None:
            span = range(address, address + nbytes)
            self.accesses.end(threading.current_thread(), span, "unmaps memory that may be in use")

        driver = RamPages(free_pages=free_pages)
        driver.before_unmap = unmap
        self.page_memories[index] = LastingMemory(driver, 1 << 22, make, lambda: self.synchronize(index))
        return driver

    def _freed(self, owner: Stream, span: range) -> None:
        """The next who computes on its stream gets the memory, at once."""
        try:
            self.accesses.end(self.launch(owner), span, "gets memory that may be in use")
        except AssertionError as error:
            self.faults.append(str(error))

    def _sleep(self, cycles: int) -> None:
        """A kernel that only takes time, on the stream that is current."""
        self.slept.append((self.current_stream(), cycles))

    def kernel(self, reads: Any = (), writes: Any = ()) -> None:
        """Compute, on the stream that is current on the device of its tensors."""
        stream = self.launch(self.current_stream([*reads, *writes][0].index))
        if not self.late_errors:
            self.raise_error()
        for tensor in reads:
            self.accesses.read(stream, tensor)
        for tensor in writes:
            self.accesses.write(stream, tensor)

    def copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
        if isinstance(target, DeviceTensor) and isinstance(source, DeviceTensor) and target.index != source.index:
            return self._copy_across(target, source)
        stream = self.launch(self.current_stream(_of_device(target, source).index))
        self.accesses.read(stream, source)
        self.accesses.write(stream, target)
        host = [each for each in (target, source) if not isinstance(each, DeviceTensor)]
        # A driver copies pageable memory while the host waits.
        if host and not (non_blocking and self.is_locked_for(host[0], stream.index)):
            stream.synchronize()

    def _copy_across(self, target: DeviceTensor, source: DeviceTensor) -> None:
        """On the source's current stream, behind and before what is on the target's."""
        there, here = (self.launch(self.current_stream(tensor.index)) for tensor in (source, target))
        self.accesses.see(there, self.accesses.seen_by(here))
        self.accesses.read(there, source)
        self.accesses.write(there, target)
        self.accesses.see(here, self.accesses.seen_by(there))

    def is_locked_for(self, memory: torch.Tensor, index: int) -> bool:
        """Whether device ``index`` copies from ``memory`` by itself."""
        span = span_of(memory)
        return any(
            locked.start <= span.start and span.stop <= locked.stop and device in (None, index)
            for locked, device in self.registered.values()
        )

    def launch(self, stream: Stream) -> Stream:
        """``stream`` is given something to do: after all that this thread has seen."""
        self.contexts.add(stream.index)
        self.accesses.see(stream, self.accesses.seen_by(threading.current_thread()))
        return stream

    def wait_on_host(self, clock: Clock) -> None:
        self.host_waits += 1
        self._over = {agent: max(tick, self._over.get(agent, 0)) for agent, tick in {**self._over, **clock}.items()}
        self.accesses.see(threading.current_thread(), clock)

    def catch_up(self) -> None:
        """Every device has done all that was launched; the host knows nothing of it until it asks."""
        for stream in self._streams:
            clock = self.accesses.seen_by(stream)
            for agent, tick in clock.items():
                self._over[agent] = max(tick, self._over.get(agent, 0))

    def is_over(self, clock: Clock) -> bool:
        return all(self._over.get(agent, 0) >= tick for agent, tick in clock.items() if isinstance(agent, Stream))

    def _index(self, device: Any) -> int:
        index = device if isinstance(device, int) else device.index if device is not None else None
        return self.current_device() if index is None else index

    def _fail(self, code: int) -> int:
        self._mine.error = code
        return code

    def raise_error(self) -> None:
        code, self._mine.error = getattr(self._mine, "error", None), None
        if code is not None:
            raise RuntimeError(f"CUDA error: {code}")


class FakeTorch:
    """torch, as modules see it that are given this one: its devices are those of ``cuda``."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, nbytes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if device.type != "cuda":
            return torch.empty(nbytes, dtype=dtype, device=device)
        return self.cuda.allocate(nbytes, device)

    def ones(self, nbytes: int, device: torch.device) -> DeviceTensor:
        tensor = self.cuda.allocate(nbytes, device)
        self.cuda.kernel(writes=[tensor])
        return tensor


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A machine with two GPUs, for the backends. At the end nothing is locked, and nobody has done any wrong."""
    fake = FakeCuda()
    for module in (backend, cuda_backend):
        monkeypatch.setattr(module, "torch", FakeTorch(fake))
    monkeypatch.setattr(cuda_backend, "lasting_memory", fake.page_memories.get)
    monkeypatch.setattr(cuda_backend, "opened_memory", fake.page_memories.get)
    monkeypatch.setattr(forms, "PLAIN_CLASSES", (*forms.PLAIN_CLASSES, DeviceTensor))
    yield fake
    assert fake.faults == []
    assert list(fake.registered.values()) == []
