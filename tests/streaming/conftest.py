"""What tests with threads share."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from _pytest.faulthandler import fault_handler_stderr_fd_key

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
