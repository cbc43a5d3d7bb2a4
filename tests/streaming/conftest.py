"""What tests with threads share, and a small file."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _pytest.faulthandler import fault_handler_stderr_fd_key
from safetensors.torch import save_file
from weightstream.streaming.memory import packing as packing_file

# Many times what the slowest test takes.
HANG_SECONDS = 60


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("weightstream")}


@pytest.fixture
def watched(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that hangs ends the run and shows where its threads stood; one that ends leaves no thread of ours."""
    before, cores = _threads(), torch.get_num_threads()
    torch.set_num_threads(1)  # Small matrices, many threads of ours: torch's would only be in the way.
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=request.config.stash[fault_handler_stderr_fd_key])
    yield
    torch.set_num_threads(cores)
    deadline = time.monotonic() + 3
    for thread in _threads() - before:
        thread.join(max(0.0, deadline - time.monotonic()))
    faulthandler.cancel_dump_traceback_later()
    assert _threads() - before == set()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "b.weight": torch.randn(6, 4, generator=generator),
        "a.weight": torch.randn(8, 3, 2, generator=generator).to(torch.bfloat16),
        "a.scale": torch.tensor(0.5),
        "a.empty": torch.empty(0, 5),
        "a.fp8": torch.randn(7, generator=generator).to(torch.float8_e4m3fn),
        "a.mask": torch.tensor([True, False, True]),
    }


@pytest.fixture
def path(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A file with ``tensors``."""
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "é"})
    return path


@pytest.fixture
def packed_units(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many units were packed, by call."""
    found: list[int] = []
    own = packing_file.measure_unit

    def count(*args: object) -> object:
        found.append(1)
        return own(*args)

    monkeypatch.setattr(packing_file, "measure_unit", count)
    return found
