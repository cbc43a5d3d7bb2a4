"""How devices are used, and who is told once a second; telling keeps nothing alive."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import pytest
import torch
from placing import Machine
from sampling import MB, MODEL, sample, settle
from told import entry_of, parts_of
from weightstream.nodes.host import devices
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.page import status, usage, watching
from weightstream.nodes.page.status import full_status, own_status
from weightstream.nodes.page.usage import DeviceUsage, Sampler
from weightstream.streaming import Snapshot, Streamer, VramReader
from weightstream.streaming.machine.gpus import Nvml

Load = Callable[..., StreamedModelPatcher]
READER = VramReader(Nvml(None))


class Watcher:
    """Takes samples at times that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self._sampler = Sampler()
        self._monkeypatch = monkeypatch

    def device(self) -> DeviceUsage:
        with self._monkeypatch.context() as patch:
            patch.setattr(usage.time, "monotonic", lambda: self.now)
            (device,) = self._sampler.sample(READER).devices
        return device


def test_the_parts_of_a_device_add_up(streamed: Load) -> None:
    model = streamed(24 * MB)
    settle(model)
    (device,) = full_status()["devices"]
    assert parts_of(device) == device["total"] == 24 * MB
    assert device["resident"] + device["staging"] == model.loaded_size()
    assert device["staging"] > 0
    assert device["peak"] >= device["total"] - device["free"] > 0
    assert (device["device"], device["virtual"]) == ("gpu:0", True)


def test_page_locked_memory_is_that_of_all_models(streamed: Load) -> None:
    model = streamed(24 * MB)
    settle(model)
    now = full_status()
    assert now["host"]["pinned"] == sum(each["pinned_bytes"] for each in now["models"])
    assert entry_of(model)["pinned_bytes"] > 0
    assert now["host"]["ram_total"] > now["host"]["ram_available"] > 0


def test_rates_are_what_was_copied_between_two_samples(streamed: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(24 * MB)
    watcher = Watcher(monkeypatch)
    first = watcher.device()
    assert (first.copy_rate, first.stalled) == (None, None)
    before = replace(model.streamer.counters)
    settle(model)
    watcher.now += 2
    device = watcher.device()
    copied = model.streamer.counters.since(before)
    assert copied.streamed_bytes > 0
    assert device.copy_rate == copied.streamed_bytes / 2
    assert device.stalled == min(1.0, copied.stall_seconds / 2)
    watcher.now += 0.1
    assert watcher.device().copy_rate == pytest.approx(copied.streamed_bytes / 2.1), (
        "too short a time to be told of alone"
    )
    watcher.now += 1
    assert watcher.device().copy_rate == 0
    watcher.now += 60
    assert watcher.device().copy_rate is None, "nobody looked for a minute"


def test_rates_of_long_steps_are_over_two_of_them(streamed: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(24 * MB)
    settle(model)
    watcher, snapshot = Watcher(monkeypatch), Streamer.snapshot

    def long_step(streamer: Streamer) -> Snapshot:
        return replace(snapshot(streamer), busy=True, step_seconds=4.0)

    monkeypatch.setattr(Streamer, "snapshot", long_step)
    rates = []
    for second in range(12):
        if second % 4 == 0:
            model.streamer.counters.streamed_bytes += 4000  # Queued at once, at the begin of a step.
        rates.append(watcher.device().copy_rate)
        watcher.now += 1
    assert rates[8:] == [1000.0] * 4


def test_the_peak_is_that_of_the_last_run(streamed: Load) -> None:
    model, sampler = streamed(24 * MB), Sampler()
    sample(model)
    full = sampler.sample(READER).devices[0]
    devices.unload(model)
    (after,) = sampler.sample(READER).devices
    assert after.used == 0
    assert after.peak == full.peak == full.used
    model.streamer.begin_run()
    assert sampler.sample(READER).devices[0].peak == 0


def test_who_watches_keeps_no_model_alive(streamed: Load) -> None:
    model = streamed(24 * MB)
    sample(model)
    full_status()
    gone = weakref.ref(model.streamed)
    devices.unload(model)
    mm.cleanup_models_gc()
    del model
    gc.collect()
    assert gone() is None
    assert full_status()["models"] == []


def test_an_event_of_eight_devices_is_small(machine: Machine, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(8, 140 << 30)
    with torch.inference_mode():
        loaded = [load_streamed(str(models / MODEL), {}) for _ in range(3)]
    rates = dict.fromkeys((f"gpu:{index}" for index in range(8)), usage._Rates(55_123_456_789.123, 0.123456))
    monkeypatch.setattr(Sampler, "_rates", lambda self, device, *_: rates[device])
    for memory in devices.virtual_devices():
        memory.allocated = 123_456_789_012
    event = status.shorten(status.full_status(READER))
    assert len(event["devices"]) == 8
    assert len(loaded) == 3
    assert len(json.dumps({"type": watching.EVENT, "data": event})) <= 2048
    fields = dict(zip(status.DEVICE_FIELDS, event["devices"][7], strict=True))
    assert fields["copy_rate"] == 55_123_456_789
    assert fields["stalled"] == 0.123
    for memory in devices.virtual_devices():
        memory.allocated = 0


def test_without_a_gpu_there_are_no_devices(machine: Machine) -> None:
    machine(0)
    now = full_status()
    assert (now["devices"], now["why_no_devices"]) == ([], "there is no GPU")
    assert now["host"]["ram_total"] > 0
    json.dumps(status.shorten(status.full_status(READER)))


# -- leases ------------------------------------------------------------------------------------------------------------


class Server:
    """The host's server, as far as a watch uses it, with one page."""

    def __init__(self) -> None:
        self.sockets: dict[str, object] = {"page": object()}
        self.sent: list[tuple[str, str]] = []

    def send_sync(self, event: str, data: Any, client_id: str) -> None:
        self.sent.append((event, client_id))


def test_a_page_that_is_gone_gets_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "INTERVAL_SECONDS", 0.01)

    async def watch() -> None:
        server = Server()
        leases: Any = watching.Watch(server, own_status)  # type: ignore[arg-type]
        assert leases.renew("page")
        while not server.sent:
            await asyncio.sleep(0.01)
        server.sockets.clear()
        while leases.active:
            await asyncio.sleep(0.01)
        assert not leases.renew("page")
        assert set(server.sent) == {("weightstream.status", "page")}

    asyncio.run(watch())


def test_a_sample_that_fails_is_told_of_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [RuntimeError("the GPU has fallen off the bus")]

    def fail_once(reader: VramReader) -> dict[str, Any]:
        if failures:
            raise failures.pop()
        return full_status(reader)

    monkeypatch.setattr(status, "full_status", fail_once)

    async def watch() -> None:
        server = Server()
        leases: Any = watching.Watch(server, own_status)  # type: ignore[arg-type]
        leases.renew("page")
        while leases.active:
            await asyncio.sleep(0.01)
        leases.renew("page")
        while not server.sent:
            await asyncio.sleep(0.01)
        server.sockets.clear()
        monkeypatch.setattr(watching, "INTERVAL_SECONDS", 0.0)

    asyncio.run(watch())
    assert "the use of devices cannot be read: the GPU has fallen off the bus" in caplog.text
