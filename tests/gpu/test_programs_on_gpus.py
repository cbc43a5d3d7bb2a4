"""The programs of this folder, in as few processes as there are hosts that differ, and some more (program_runs.py).

``WEIGHTSTREAM_SOAK_PROMPTS=200`` asks the soak for more. Where pytest has several workers, one must have this whole
file (``--dist loadfile``).
"""

from __future__ import annotations

from collections.abc import Callable

import programs
import pytest
import torch
from program_runs import CASES, EXPECTED, RUNS, Findings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize(("run", "program"), CASES, ids=["-".join(case) for case in CASES])
def test_a_program_finds_no_difference(
    found: Findings, run: str, program: str, record_property: Callable[[str, object], None]
) -> None:
    if RUNS[run].gpus > torch.cuda.device_count():
        pytest.skip(f"needs {RUNS[run].gpus} CUDA GPUs")
    seen = found.of(run, program)
    for name in ("seconds", "at", "parts"):
        record_property(name, seen.get(name))
    print(seen.get("error", ""))
    differing = programs.differences(seen)
    assert differing == EXPECTED.get(run, []), "; ".join(differing)
    assert seen["agree"]
