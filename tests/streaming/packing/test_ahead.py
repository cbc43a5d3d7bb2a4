"""Kernels are compiled behind other work, once for each device."""

from __future__ import annotations

import threading

import pytest
import torch
from weightstream.streaming.packing import ahead
from weightstream.streaming.packing.ahead import KernelsAhead


def test_both_kinds_are_compiled_once_on_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, torch.device, bool]] = []

    def note(what: str, device: torch.device) -> None:
        made.append((what, device, threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(ahead, "packer_of", lambda device: note("packer", device))
    monkeypatch.setattr(ahead, "unpacker_of", lambda device: note("unpacker", device))
    kernels, devices = KernelsAhead(), [torch.device("cuda", 0), torch.device("cuda", 1)]
    for device in (*devices, *devices):
        kernels.compile(device)
    for worker in kernels.workers:
        worker.join()
    assert sorted(made, key=str) == [(what, device, False) for what in ("packer", "unpacker") for device in devices]


def test_what_fails_is_left_to_who_needs_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("the device has failed")

    monkeypatch.setattr(ahead, "packer_of", fail)
    kernels = KernelsAhead()
    with caplog.at_level("DEBUG", logger=ahead.__name__):
        kernels.compile(torch.device("cuda", 0))
        kernels.workers[0].join()
    assert "the device has failed" in caplog.text
