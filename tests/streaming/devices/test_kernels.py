"""Kernels are loaded ahead: nothing that is launched for it may fail or matter."""

from __future__ import annotations

import logging

import pytest
import torch
from weightstream.streaming.devices import kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_everything_that_is_launched_can_run(dtype: torch.dtype) -> None:
    before = torch.random.get_rng_state()
    kernels.launch_all(torch.device("cpu"), dtype)
    assert torch.equal(torch.random.get_rng_state(), before), "random numbers are the host's"


def test_a_cpu_has_nothing_to_load() -> None:
    assert kernels.warm_up(torch.device("cpu"), torch.float32) is None


def test_a_gpu_that_fails_is_no_error_and_is_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    """There is none with this number, on a machine without GPUs there is none at all."""
    device = torch.device("cuda", 77)
    with caplog.at_level(logging.DEBUG):
        thread = kernels.warm_up(device, torch.bfloat16)
        assert thread is not None
        thread.join(30)
    assert not thread.is_alive()
    assert "cuda:77" in caplog.text
    assert kernels.warm_up(device, torch.bfloat16) is None
