"""What the status route tells of devices, models and notices; and that telling keeps nothing alive."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import folder_paths
import pytest
import torch
from placing import Machine
from sampling import MB, MODEL, sample, settle
from weightstream.nodes import description, devices, routes, status, usage, watching
from weightstream.nodes.description import ladder_step
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.names import shown_name, without_folders
from weightstream.nodes.notices import keep_notice, withdraw_notice
from weightstream.nodes.patcher import StreamedModelPatcher
from weightstream.nodes.routes import full_status
from weightstream.nodes.split import split_over
from weightstream.nodes.usage import DeviceUsage, Sampler
from weightstream.nodes.version import VERSION
from weightstream.streaming import Snapshot, Streamer, VirtualMemory, VramReader, format_bytes
from weightstream.streaming.gpus import Nvml

ROOT = Path(status.__file__).parent.parent
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


def entry_of(model: StreamedModelPatcher) -> dict[str, Any]:
    (entry,) = [each for each in full_status()["models"] if each["id"] == str(model.streamed.number)]
    return entry


def parts_of(device: dict[str, Any]) -> int:
    return sum(device[name] for name in ("resident", "staging", "torch", "cache", "other", "free"))


# -- devices -----------------------------------------------------------------------------------------------------------


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
    event = watching.make_event(READER)
    assert len(event["devices"]) == 8
    assert len(loaded) == 3
    assert len(json.dumps({"type": watching.EVENT, "data": event})) <= 2048
    fields = dict(zip(watching.DEVICE_FIELDS, event["devices"][7], strict=True))
    assert fields["copy_rate"] == 55_123_456_789
    assert fields["stalled"] == 0.123
    for memory in devices.virtual_devices():
        memory.allocated = 0


def test_without_a_gpu_there_are_no_devices(machine: Machine) -> None:
    machine(0)
    now = full_status()
    assert (now["devices"], now["why_no_devices"]) == ([], "there is no GPU")
    assert now["host"]["ram_total"] > 0
    json.dumps(watching.make_event(READER))


# -- models ------------------------------------------------------------------------------------------------------------


def test_the_ladder(streamed: Load) -> None:
    model = streamed(24 * MB)
    assert entry_of(model)["ladder"] == "unloaded"
    settle(model)
    now = model.streamer.snapshot()
    kept, whole = (format_bytes(nbytes) for nbytes in (now.device_bytes - now.staging_bytes, model.model_size()))
    assert ladder_step(now) == ("pinned", f"{kept} of {whole} stay in VRAM")
    steps: list[tuple[Snapshot, tuple[str, str]]] = [
        (replace(now, staged_bytes=5, note="the limit is reached"), ("staged", "the limit is reached")),
        (replace(now, staged_bytes=5, building=True), ("staged", "page-locked copies are still being made")),
        (replace(now, mode="synchronous"), ("synchronous", "its settings ask for it")),
        (replace(now, mode="synchronous", note="a copy was corrupted"), ("synchronous", "a copy was corrupted")),
        (replace(now, mode="resident"), ("resident", "")),
        (replace(now, mode="off", note="x"), ("unloaded", "")),
    ]
    assert [ladder_step(each) for each, _ in steps] == [expected for _, expected in steps]


def test_the_last_run_is_not_all_runs(streamed: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(24 * MB)
    assert entry_of(model)["last_run"] is None
    sample(model, steps=3)
    first = entry_of(model)
    sample(model, steps=2)
    running = entry_of(model)
    monkeypatch.setattr(description, "RUNNING_SECONDS", 0)
    second = entry_of(model)
    assert (first["last_run"], running["running"], second["running"]) == (None, True, False)
    assert running["last_run"]["steps"] == 3, "of the run that has ended"
    assert second["last_run"]["steps"] == 2
    assert second["counters"]["steps"] == 5
    copied = second["counters"]["streamed_bytes"] - first["counters"]["streamed_bytes"]
    assert second["last_run"]["bytes"] == copied > 0


def test_a_run_of_one_step_has_times_of_its_own(streamed: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(description, "RUNNING_SECONDS", 0)
    model = streamed(24 * MB)
    before = None
    for steps in (6, 1, 1):
        sample(model, steps=steps)
        entry = entry_of(model)
        seconds = entry["last_run"]["step_seconds"]
        if steps == 1:
            assert seconds == entry["step_seconds"] != before
        before = entry["step_seconds"]
        assert entry["last_run"]["rate"] == pytest.approx(entry["last_run"]["bytes"] / steps / seconds)


def test_parts_of_a_split_model_are_told_as_one_model(loaded: StreamedModelPatcher) -> None:
    ours, _ = split_over(loaded, [torch.device("cpu", 0), torch.device("cpu", 1)], "equal", None, None)
    sample(ours)
    entries = [each for each in full_status()["models"] if each["id"] == str(ours.streamed.number)]
    assert [each["device"] for each in entries] == ["gpu:0", "gpu:1"]
    assert {each["name"] for each in entries} == {MODEL}
    assert all(each["run"]["counters"]["steps"] == 3 for each in entries)
    assert all(parts_of(device) == device["total"] for device in full_status()["devices"])


def test_a_file_is_named_as_the_host_lists_it(models: Path, tmp_path: Path) -> None:
    (models / "flux").mkdir(exist_ok=True)
    assert shown_name(str(models / "flux" / "one.safetensors")) == str(Path("flux", "one.safetensors"))
    assert shown_name(str(models / "one.safetensors")) == "one.safetensors"
    assert shown_name(str(tmp_path / "elsewhere" / "one.safetensors")) == "one.safetensors"
    folder = folder_paths.get_folder_paths("diffusion_models")[0]
    assert not shown_name(str(Path(folder + "-too") / "one.safetensors")).startswith("..")


def test_texts_name_no_folder(models: Path, tmp_path: Path) -> None:
    text = f"{models / 'flux' / 'one.safetensors'}: truncated; {tmp_path / 'x.bin'} and /usr are left"
    assert without_folders(text).startswith(f"{Path('flux', 'one.safetensors')}: truncated; ")
    assert str(tmp_path.parent.parent) not in without_folders(text)


def test_everything_can_be_sent(streamed: Load) -> None:
    model = streamed(24 * MB)
    sample(model)
    now = full_status()
    assert json.loads(json.dumps(now)) == now
    assert (now["schema"], now["version"]) == (1, VERSION)
    assert f'version = "{VERSION}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_the_revision_changes_with_what_events_leave_out(streamed: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(description, "RUNNING_SECONDS", 0)
    model = streamed(24 * MB)
    model.streamer.finish_building()
    one = watching.make_event(READER)["revision"]
    assert watching.make_event(READER)["revision"] == one
    sample(model)
    two = watching.make_event(READER)["revision"]
    assert two != one
    keep_notice("inactive", "x", "because", None, model.model)
    assert watching.make_event(READER)["revision"] != two
    withdraw_notice("x", None)
    assert watching.make_event(READER)["revision"] == two


# -- notices -----------------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_stream_is_told_of_for_as_long_as_it_lives(machine: Machine, models: Path) -> None:
    machine(0)
    with torch.inference_mode():
        model = load_streamed(str(models / MODEL), {}, node_id="4")
    assert [notice for notice in full_status()["notices"] if notice["node_id"] == "4"] == [
        {
            "node_id": "4",
            "name": MODEL,
            "kind": "inactive",
            "text": "not streamed, loaded ComfyUI's own way: there is no GPU, so there is nothing to stream to",
        }
    ]
    del model
    gc.collect()
    assert [notice for notice in full_status()["notices"] if notice["node_id"] == "4"] == []


def test_a_placement_that_is_another_is_told_of_until_it_is_not(
    loaded: StreamedModelPatcher, nodes_of_pack: dict[str, type]
) -> None:
    node = nodes_of_pack["WeightStreamGPUPlacement"]
    node.execute(loaded, devices="gpu:0,gpu:5")
    (notice,) = full_status()["notices"]
    assert (notice["kind"], notice["name"]) == ("fallback", "GPU Placement")
    assert "gpu:5 is not there" in notice["text"]
    node.execute(loaded, devices="gpu:0")
    assert full_status()["notices"] == []


def test_the_oldest_notices_are_forgotten(streamed: Load) -> None:
    about = streamed(24 * MB)
    for number in range(30):
        keep_notice("inactive", f"file {number}", "because", None, about.model)
    names = [notice["name"] for notice in full_status()["notices"]]
    assert names == [f"file {number}" for number in range(14, 30)]
    for name in names:
        withdraw_notice(name, None)


# -- unloading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [routes.MODEL, routes.PINNED])
def test_one_model_is_unloaded_and_runs_again(machine: Machine, models: Path, what: str) -> None:
    machine(1, 48 * MB)
    with torch.inference_mode():
        one, two = (load_streamed(str(models / MODEL), {}, vram_limit=16 * MB) for _ in range(2))
    expected = sample(one)
    for model in (one, two):
        settle(model)
    before, other = entry_of(one), entry_of(two)
    freed = routes.free([one.streamed], what, nullcontext)
    after = entry_of(one)
    assert entry_of(two)["device_bytes"] == other["device_bytes"]
    assert entry_of(two)["pinned_bytes"] == other["pinned_bytes"]
    if what == routes.MODEL:
        assert freed == {"freed_device": before["device_bytes"], "freed_pinned": 0}
        assert (after["device_bytes"], after["ladder"]) == (0, "unloaded")
        assert after["pinned_bytes"] == before["pinned_bytes"]
    else:
        assert freed["freed_pinned"] == before["pinned_bytes"] > 0
        assert after["pinned_bytes"] == 0
    assert torch.equal(sample(one), expected)


def test_page_locked_memory_that_is_in_use_stays(streamed: Load) -> None:
    model = streamed(24 * MB)
    settle(model)
    model.streamer.lend_masters()
    with pytest.raises(routes.BusyError, match="it is in use"):
        routes.unlock([model.streamed], nullcontext)
    model.streamer.take_masters_back()
    routes.unlock([model.streamed], nullcontext)
    assert entry_of(model)["pinned_bytes"] == 0


def test_unlocking_ends_when_a_prompt_begins(streamed: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "UNLOCKED_AT_ONCE", 1)
    model = streamed(24 * MB)
    settle(model)
    expected, before = sample(model), entry_of(model)["pinned_bytes"]
    pauses = [True, True]

    @contextmanager
    def between_prompts() -> Iterator[None]:
        if not pauses:
            raise routes.BusyError("a prompt is running")
        pauses.pop()
        yield

    freed = routes.free([model.streamed], routes.PINNED, between_prompts)
    assert 0 < freed["freed_pinned"] < before
    with pytest.raises(routes.BusyError):
        routes.free([model.streamed], routes.PINNED, between_prompts)
    assert torch.equal(sample(model), expected)


def test_all_parts_of_a_split_model_are_unloaded(loaded: StreamedModelPatcher) -> None:
    ours, _ = split_over(loaded, [torch.device("cpu", 0), torch.device("cpu", 1)], "equal", None, None)
    expected = sample(ours)
    models = [model for model in status.watched() if model.number == ours.streamed.number]
    routes.take_off(models)
    assert [memory.allocated for memory in devices.virtual_devices()] == [0, 0]
    assert torch.equal(sample(ours), expected)


def test_a_virtual_device_that_is_full_is_all_used(virtual_device: Callable[[int], VirtualMemory]) -> None:
    virtual_device(24 * MB).take(24 * MB)
    (device,) = full_status()["devices"]
    assert (device["free"], device["torch"]) == (0, 24 * MB)


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
        leases: Any = watching.Watch(server)  # type: ignore[arg-type]
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
    make_event = watching.make_event

    def fail_once(reader: VramReader) -> dict[str, Any]:
        if failures:
            raise failures.pop()
        return make_event(reader)

    monkeypatch.setattr(watching, "make_event", fail_once)

    async def watch() -> None:
        server = Server()
        leases: Any = watching.Watch(server)  # type: ignore[arg-type]
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
