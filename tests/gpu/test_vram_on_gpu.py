"""What is read of a real GPU's memory."""

from __future__ import annotations

import subprocess

import pytest
import torch
from weightstream.streaming import open_vram_reader

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

NO_CONTEXT = """
import torch
from streaming import open_vram_reader
torch.cuda.init()
with open_vram_reader() as reader:
    figures = reader.read(0)
assert not torch._C._cuda_hasPrimaryContext(0), "a context was made"
assert figures.total > 0 and figures.allocated == 0
"""


NBYTES = 256 << 20
# What is free is so for every process: others may take and give back some between two readings.
TRIES = 20


def test_what_torch_has_is_known() -> None:
    # A context, and what a library keeps, are there before anything is read.
    torch.ones(2, 2, device="cuda:0").mm(torch.ones(2, 2, device="cuda:0"))
    taken = []
    with open_vram_reader() as reader:
        for _ in range(TRIES):
            torch.cuda.empty_cache()
            before = reader.read(0)
            memory = torch.empty(NBYTES, dtype=torch.uint8, device="cuda:0")
            after = reader.read(0)
            assert after.allocated - before.allocated == memory.nbytes
            assert after.reserved >= after.allocated
            assert after.total > after.free > 0
            taken.append(before.free - after.free)
            del memory
    assert any(NBYTES // 2 <= nbytes <= 2 * NBYTES for nbytes in taken), taken


@pytest.mark.child("-c", NO_CONTEXT)
def test_reading_makes_no_context(child: subprocess.CompletedProcess[str]) -> None:
    assert child.returncode == 0, child.stderr
