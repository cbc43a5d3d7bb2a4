"""What tests with threads share."""

from __future__ import annotations

import faulthandler
import threading
from collections.abc import Iterator

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

# Many times what the slowest test takes.
HANG_SECONDS = 30


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("weightstream")}


@pytest.fixture
def watched(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that hangs ends the run and shows where its threads stood; one that ends leaves no thread of ours."""
    before = _threads()
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=request.config.stash[fault_handler_stderr_fd_key])
    yield
    for thread in _threads() - before:
        thread.join(3)
    faulthandler.cancel_dump_traceback_later()
    assert _threads() - before == set()
