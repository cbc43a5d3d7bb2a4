"""The calls to CUDA's driver for the pool of one device, on one that is strict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from driver_library import DriverLibrary
from weightstream.streaming.devices import cuda_driver, cuda_pool
from weightstream.streaming.devices.cuda_driver import DriverError
from weightstream.streaming.devices.cuda_pool import PROTOTYPES, CudaPool, pool_of

POOL = 0xF00


class Library(DriverLibrary):
    """Has one pool.

    Attributes:
        trimmed: to how many bytes, each time.
    """

    def __init__(self) -> None:
        super().__init__(PROTOTYPES)
        self.trimmed: list[int] = []

    def do_cuDeviceGetDefaultMemPool(self, pool: Any, device: int) -> None:
        assert device == 1
        pool._obj.value = POOL

    def do_cuMemPoolTrimTo(self, pool: int, nbytes: int) -> None:
        self.check_context()
        assert pool == POOL
        self.trimmed.append(nbytes)


@pytest.fixture(autouse=True)
def nothing_open() -> Iterator[None]:
    cuda_pool._open.cache_clear()
    yield
    cuda_pool._open.cache_clear()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(cuda_driver, "open_library", lambda prototypes: library)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    return library


def test_a_pool_gives_back_all_that_nobody_has(library: Library) -> None:
    pool = pool_of(1)
    assert pool is not None
    pool.trim()
    assert library.trimmed == [0]
    assert library.contexts == []
    assert pool_of(1) is pool, "it is opened once"
    assert library.retained == 1


@pytest.mark.parametrize("allocator", ["native", "pluggable"])
def test_another_allocator_has_no_such_pool(library: Library, monkeypatch: pytest.MonkeyPatch, allocator: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: allocator)
    assert pool_of(1) is None


@pytest.mark.parametrize("function", ["cuInit", "cuDeviceGetDefaultMemPool"])
def test_a_driver_that_has_none_is_asked_once(
    library: Library, caplog: pytest.LogCaptureFixture, function: str
) -> None:
    library.fails[function] = 801
    with caplog.at_level("INFO"):
        assert pool_of(1) is pool_of(1) is None
    assert caplog.text.count("no pool for gpu:1") == 1
    assert f"{function} failed with CUDA_ERROR_OF_SOME_KIND (801)" in caplog.text


@pytest.mark.parametrize("error", [OSError("no libcuda"), AttributeError("cuMemPoolTrimTo")])
def test_a_machine_without_such_a_driver(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(prototypes: object) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setattr(cuda_driver, "open_library", fail)
    assert pool_of(0) is None


def test_a_trim_that_is_refused_is_an_error(library: Library) -> None:
    pool = CudaPool(library, 1)
    library.fails["cuMemPoolTrimTo"] = 1
    with pytest.raises(DriverError):
        pool.trim()
    assert library.contexts == []
