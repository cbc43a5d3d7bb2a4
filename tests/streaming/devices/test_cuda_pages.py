"""The calls to CUDA's driver for pages, on one that is strict and keeps account of them."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from driver_library import DriverLibrary
from weightstream.streaming.devices import cuda_driver, cuda_pages
from weightstream.streaming.devices.cuda_pages import (
    PROTOTYPES,
    Access,
    AllocationFlags,
    AllocationProperties,
    CudaPageDriver,
    lasting_memory,
    opened_memory,
    page_counts,
)
from weightstream.streaming.devices.lasting_memory import LastingMemory, PageCounts
from weightstream.streaming.devices.pages import OutOfPagesError, Pages

PAGE = 1 << 21
BASE = 1 << 40
INVALID_VALUE, OUT_OF_MEMORY = 1, 2


class Library(DriverLibrary):
    """Keeps account of pages.

    Attributes:
        supported: whether devices have virtual memory management.
        handles: sizes of memory that was made, by their handles, and whether the handle was given back.
        mapped: handles and whether the device may access them, by address and size.
    """

    def __init__(self) -> None:
        super().__init__(PROTOTYPES)
        self.supported = 1
        self.reserved: dict[int, int] = {}
        self.handles: dict[int, int] = {}
        self.mapped: dict[tuple[int, int], list[Any]] = {}
        self._made = 0

    @property
    def bytes_taken(self) -> int:
        """Memory goes when no handle and no mapping has it."""
        mapped = {handle: nbytes for (_, nbytes), (handle, _) in self.mapped.items()}
        return sum({**mapped, **self.handles}.values())

    def do_cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> None:
        assert (attribute, device) == (102, 1)
        value._obj.value = self.supported

    def do_cuMemGetAllocationGranularity(self, nbytes: Any, properties: Any, option: int) -> None:
        self._check_properties(properties)
        assert option == 0
        nbytes._obj.value = PAGE

    def do_cuMemAddressReserve(self, address: Any, nbytes: int, alignment: int, wish: int, flags: int) -> None:
        self.check_context()
        assert nbytes % PAGE == alignment == wish == flags == 0
        address._obj.value = BASE + (len(self.reserved) << 36)
        self.reserved[address._obj.value] = nbytes

    def do_cuMemAddressFree(self, address: int, nbytes: int) -> None:
        self.check_context()
        assert self.reserved.pop(address) == nbytes

    def do_cuMemCreate(self, handle: Any, nbytes: int, properties: Any, flags: int) -> None:
        self.check_context()
        self._check_properties(properties)
        assert nbytes % PAGE == flags == 0
        self._made += 1
        handle._obj.value = self._made
        self.handles[self._made] = nbytes

    def do_cuMemRelease(self, handle: int) -> None:
        self.check_context()
        del self.handles[handle]

    def do_cuMemMap(self, address: int, nbytes: int, offset: int, handle: int, flags: int) -> None:
        self.check_context()
        assert address % PAGE == offset == flags == 0
        assert self.handles[handle] == nbytes
        self.mapped[address, nbytes] = [handle, False]

    def do_cuMemUnmap(self, address: int, nbytes: int) -> None:
        self.check_context()
        del self.mapped[address, nbytes]

    def do_cuMemSetAccess(self, address: int, nbytes: int, access: Any, count: int) -> None:
        self.check_context()
        assert (access._obj.location.type, access._obj.location.id, access._obj.flags, count) == (1, 1, 3, 1)
        self.mapped[address, nbytes][1] = True

    def _check_properties(self, properties: Any) -> None:
        known = properties._obj
        assert (known.type, known.requested_handle_types, known.win32_handle_metadata) == (1, 0, None)
        assert (known.location.type, known.location.id) == (1, 1)
        assert bytes(known.flags) == bytes(8)


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture
def driver(library: Library) -> CudaPageDriver:
    return CudaPageDriver(library, 1)


def test_structures_are_laid_out_as_in_cuda_h() -> None:
    """Offsets as a C compiler has them on every 64-bit system."""
    properties, flags = AllocationProperties, AllocationFlags
    assert (properties.requested_handle_types.offset, properties.location.offset) == (4, 8)
    assert (properties.win32_handle_metadata.offset, properties.flags.offset) == (16, 24)
    assert (flags.gpu_direct_rdma_capable.offset, flags.usage.offset, flags.reserved.offset) == (1, 2, 4)
    assert (ctypes.sizeof(properties), ctypes.sizeof(flags)) == (32, 8)
    assert (Access.flags.offset, ctypes.sizeof(Access)) == (8, 12)


def test_pages_are_mapped_for_the_device_and_go_back(library: Library, driver: CudaPageDriver) -> None:
    assert (driver.page_bytes, library.retained) == (PAGE, 1)
    pages = Pages(driver, 8 * PAGE)
    buffers = [pages.allocate(nbytes) for nbytes in (PAGE + 512, 3 * PAGE, 2 * PAGE)]
    assert library.handles == {}, "mappings alone keep the memory"
    assert all(may_access for _, may_access in library.mapped.values())
    assert library.bytes_taken == pages.mapped_bytes == 7 * PAGE
    for address in buffers:
        pages.free(address)
    assert library.bytes_taken == 0
    pages.allocate(8 * PAGE)
    assert len(library.reserved) == 1
    assert library.contexts == []


@pytest.mark.parametrize("name", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
@pytest.mark.parametrize("code", [OUT_OF_MEMORY, INVALID_VALUE])
def test_a_call_that_fails_leaves_nothing(library: Library, driver: CudaPageDriver, name: str, code: int) -> None:
    address = driver.reserve(2 * PAGE)
    driver.map(address, PAGE)
    library.fails = {name: code}
    says = {OUT_OF_MEMORY: "found no memory", INVALID_VALUE: r"failed with CUDA_ERROR_OF_SOME_KIND \(1\)"}
    with pytest.raises(OutOfPagesError if code == OUT_OF_MEMORY else RuntimeError, match=f"{name} {says[code]}"):
        driver.map(address + PAGE, PAGE)
    assert library.bytes_taken == PAGE
    assert (library.handles, library.contexts, len(library.mapped)) == ({}, [], 1)


def test_a_device_that_cannot_is_said(library: Library) -> None:
    library.supported = 0
    with pytest.raises(RuntimeError, match="no virtual memory management"):
        CudaPageDriver(library, 1)
    assert library.retained == 0, "no context is made for nothing"


# -- which devices have pages -----------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, library: Library) -> SimpleNamespace:
    """torch of CUDA, with two devices, and nothing opened."""
    settings = SimpleNamespace(fraction=1.0, allocator="cudaMallocAsync", library=library)
    monkeypatch.setattr(cuda_pages, "_MEMORIES", {})
    monkeypatch.setattr(cuda_pages, "open_library", lambda: settings.library)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: settings.allocator)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: settings.fraction, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=5 * PAGE))
    return settings


def test_a_device_has_one_for_the_process(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, torch.device]] = []

    def as_tensor(memory: Any, device: torch.device) -> torch.Tensor:
        made.append((memory, device))
        return torch.zeros(memory.nbytes, dtype=torch.uint8)

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    assert opened_memory(1) is None
    assert page_counts(1) == PageCounts()
    memory = lasting_memory(1)
    assert isinstance(memory, LastingMemory)
    assert lasting_memory(1) is memory is opened_memory(1)
    assert memory.allocate(PAGE - 1) is not None
    assert made[0][1] == torch.device("cuda", 1)
    assert page_counts(1) == PageCounts(PAGE - 1, PAGE)
    assert [*machine.library.reserved.values()] == [4 * 5 * PAGE]
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    made.clear()
    memory.give_back()
    assert waited == [torch.device("cuda", 1)]
    assert page_counts(1) == PageCounts()


def test_torch_gives_all_memory_where_it_must(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, library: Library
) -> None:
    def missing() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    def old() -> Any:
        raise AttributeError("cuMemCreate")

    def nothing(reason: str) -> None:
        assert lasting_memory(1) is None, reason
        assert library.retained == 0
        cuda_pages._MEMORIES.clear()

    machine.allocator = "pluggable"
    nothing("somebody's own allocator")
    machine.allocator = "native"
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", None)
        nothing("ROCm")
    for fail in (missing, old):
        with monkeypatch.context() as patch:
            patch.setattr(cuda_pages, "open_library", fail)
            nothing(fail.__name__)
    for name in ("cuInit", "cuDeviceGetAttribute", "cuMemGetAllocationGranularity", "cuDevicePrimaryCtxRetain"):
        library.fails = {name: OUT_OF_MEMORY if name == "cuDevicePrimaryCtxRetain" else INVALID_VALUE}
        nothing(name)
    library.fails = {}
    assert lasting_memory(1) is not None


def test_a_limit_of_torchs_is_for_weights_too(machine: SimpleNamespace) -> None:
    machine.fraction = 0.5
    assert lasting_memory(1) is None
    machine.fraction = 1.0
    memory = lasting_memory(1)
    machine.fraction = 0.5
    assert lasting_memory(1) is None
    assert opened_memory(1) is memory, "what there is must be given back all the same"


def test_a_driver_that_has_refused_something_is_opened_still(machine: SimpleNamespace) -> None:
    memory = lasting_memory(1)
    machine.library.fails = {"cuMemCreate": INVALID_VALUE}
    assert memory is not None
    assert memory.allocate(1) is None
    assert lasting_memory(1) is None
    assert opened_memory(1) is memory


def test_every_function_has_its_prototype(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {name: SimpleNamespace() for name in PROTOTYPES}
    loaded = SimpleNamespace(**functions)
    monkeypatch.setattr(cuda_driver.sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: loaded if name == "libcuda.so.1" else None)
    assert cuda_pages.open_library() is loaded
    assert all(function.restype is ctypes.c_int for function in functions.values())
    assert {name: function.argtypes for name, function in functions.items()} == PROTOTYPES


def test_who_gives_memory_back_is_not_told_that_there_is_none(library: Library, driver: CudaPageDriver) -> None:
    address = driver.reserve(PAGE)
    driver.map(address, PAGE)
    library.fails = {"cuMemUnmap": OUT_OF_MEMORY, "cuMemAddressFree": OUT_OF_MEMORY}
    with pytest.raises(RuntimeError, match="cuMemUnmap found no memory"):
        driver.unmap(address, PAGE)
    with pytest.raises(RuntimeError, match="cuMemAddressFree found no memory"):
        driver.unreserve(address, PAGE)


def test_an_allocator_that_is_plugged_in_is_not_asked_for_its_limit(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(index: int) -> float:
        raise RuntimeError("CUDAPluggableAllocator does not yet support getMemoryFraction.")

    machine.allocator = "pluggable"
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", refuse, raising=False)
    assert lasting_memory(1) is None
