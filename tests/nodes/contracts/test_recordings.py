"""Steps in which the host records allocations: what is ours stays out of the record, and a step that fails leaves none
open."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management as mm
import comfy.model_prefetch as prefetch
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from recording import FAILED, HELD_BYTES, RecordingHost, StrictRecord, recording_host  # noqa: F401
from sampling import MB, MODEL, sample, with_lora
from weightstream.nodes.host import hosts
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.parts import split_blocks
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.streaming import CpuBackend, VirtualMemory

Load = Callable[..., StreamedModelPatcher]
CPU = torch.device("cpu")
KEEPS_RECORDS = hosts.release(hosts.VERSION) >= hosts.RECORDS_SINCE


@pytest.fixture
def host(recording_host: RecordingHost) -> RecordingHost:  # noqa: F811
    return recording_host


def test_what_a_backend_allocates_is_not_recorded(host: RecordingHost) -> None:
    backend = CpuBackend(VirtualMemory(MB), record=hosts.record)
    host.begin()
    slot = backend.allocate(1024)
    others = torch.zeros(3)
    host.end()
    assert slot.nbytes == 1024
    assert len(host.rogues) == 1
    assert "(3,)" in host.rogues[0], "the stand-in notices what stays"
    del others


@pytest.mark.parametrize("outer", ["ours", "the host's"])
@pytest.mark.parametrize("inner", ["ours", "the host's"])
def test_pauses_nest_in_a_step(host: RecordingHost, outer: str, inner: str) -> None:
    """The host's is a switch, and its kernels pause inside of blocks that run while we pause."""
    pauses = {"ours": hosts.record.paused, "the host's": host.pause}
    with hosts.nesting_pauses:
        host.begin()
        with pauses[outer]():
            with pauses[inner]():
                pass
            kept = torch.zeros(2)
        recorded = torch.zeros(5)
        host.end()
    assert [what.rpartition(" ")[2] for what in host.rogues] == ["(5,)"]
    del kept, recorded


def test_methods_of_the_host_are_as_they_were_behind_a_step(host: RecordingHost, streamed: Load) -> None:
    before = StrictRecord.pause, StrictRecord.resume
    seen: list[bool] = []
    model = streamed(24 * MB)
    model.model.diffusion_model.register_forward_pre_hook(
        lambda *_: seen.append((StrictRecord.pause, StrictRecord.resume) == before)
    )
    sample(model)
    with hosts.nesting_pauses, hosts.nesting_pauses:
        assert StrictRecord.pause is not before[0]
    assert seen == [False] * 3
    assert (StrictRecord.pause, StrictRecord.resume) == before


def test_what_somebody_puts_around_the_counting_meanwhile_stays(host: RecordingHost) -> None:
    original = StrictRecord.pause, StrictRecord.resume
    called: list[str] = []

    def around(method: Callable[..., None]) -> Callable[..., None]:
        def wrapper(graph: StrictRecord, *args: Any, **options: Any) -> None:
            called.append("theirs")
            method(graph, *args, **options)

        return wrapper

    try:
        with hosts.nesting_pauses:
            theirs = StrictRecord.pause, StrictRecord.resume = around(StrictRecord.pause), around(StrictRecord.resume)
        assert (StrictRecord.pause, StrictRecord.resume) == theirs
        for _ in range(2):
            with hosts.nesting_pauses:
                host.begin()
                with host.pause():
                    with hosts.record.paused():
                        pass
                    assert host.kept[-1].paused
                assert not host.kept[-1].paused
                host.end()
        assert called
    finally:
        StrictRecord.pause, StrictRecord.resume = original


def test_a_record_that_has_failed_hides_no_error(host: RecordingHost) -> None:
    def run_out() -> None:
        with hosts.record.paused():
            host.kept[-1].failed = "memory ran out in it"
            raise torch.OutOfMemoryError("no room")

    host.begin()
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        run_out()
    with hosts.record.paused():
        pass


def test_a_clean_up_that_fails_hides_no_error(
    streamed: Load,
    native: ModelPatcher,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = sample(native)
    model = streamed(24 * MB)
    sample(model)
    model.streamer.backend.store.budget *= 2

    def clean_up() -> None:
        raise RuntimeError(FAILED)

    monkeypatch.setattr(hosts, "_prefetch", SimpleNamespace(cleanup_malloc_graph=clean_up))
    hit: list[int] = []

    def fail(*_: Any) -> None:
        if not hit:
            hit.append(1)
            raise torch.OutOfMemoryError("no room")

    model.model.diffusion_model.single_blocks[0].register_forward_pre_hook(fail)
    assert torch.equal(sample(model), expected)
    assert hit
    assert f"could not end its record of allocations: {FAILED}" in caplog.text


def test_only_the_record_of_this_thread_counts(host: RecordingHost) -> None:
    host.begin()
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(hosts.record.held_bytes(CPU)))
    thread.start()
    thread.join()
    assert found == [0]
    assert hosts.record.held_bytes(CPU) == HELD_BYTES
    assert hosts.record.held_bytes(torch.device("cuda", 1)) == 0
    host.end()
    assert hosts.record.held_bytes(CPU) == HELD_BYTES, "it is kept for the next step"
    host.clean_up()
    assert hosts.record.held_bytes(CPU) == 0


def test_what_a_record_holds_counts_as_memory_for_the_next_step(
    streamed: Load, host: RecordingHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(24 * MB)
    monkeypatch.setattr(mm, "get_free_memory", lambda *_: 100 * MB)
    before = model.get_free_memory(CPU)
    host.begin()
    host.end()
    assert model.get_free_memory(CPU) - before == HELD_BYTES
    host.clean_up()
    assert model.get_free_memory(CPU) == before


def _recorded(host: RecordingHost, model: ModelPatcher, expected: torch.Tensor) -> tuple[int, int]:
    """How many allocations of a run were recorded, and how many of these stayed."""
    host.clean_up()
    before = len(host.rogues)
    with host.around_blocks(model.model.diffusion_model):
        assert torch.equal(sample(model), expected)
        return host.kept[-1].allocated, len(host.rogues) - before


@pytest.mark.parametrize("verify", [False, True])
def test_a_record_around_blocks_has_nothing_of_ours(
    streamed: Load, native: ModelPatcher, host: RecordingHost, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    expected = sample(native)
    theirs = _recorded(host, native, expected)
    if verify:
        monkeypatch.setenv("WEIGHTSTREAM_VERIFY", "1")
    model = streamed(24 * MB)
    for _ in range(2):
        assert _recorded(host, model, expected) == theirs
    assert host.escaped == []
    assert model.streamer.counters.steps == 6
    assert model.status()["mode"] != "resident"


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_step_that_fails_leaves_no_record_open(
    streamed: Load, native: ModelPatcher, host: RecordingHost, failing: int, lora: bool
) -> None:
    expected = sample(with_lora(native, 0.7) if lora else native)
    model = streamed(24 * MB)
    use = with_lora(model, 0.7) if lora else model
    sample(use)
    model.streamer.backend.store.budget *= 2  # So that there is something to give up.
    calls, hit = iter(range(1000)), []

    def fail(*_: Any) -> None:
        if next(calls) == failing:
            hit.append(host.cleaned)
            raise torch.OutOfMemoryError("no room")

    handle = model.model.diffusion_model.single_blocks[0].register_forward_pre_hook(fail)
    try:
        with host.around_blocks(model.model.diffusion_model):
            # A second root would raise: the step that runs again begins its record anew.
            assert torch.equal(sample(use), expected)
    finally:
        handle.remove()
    assert hit == [0]
    assert len(host.kept) == 2, "the failed step's record was given up, and a new one begun"
    assert host.escaped == []


def test_an_interrupt_leaves_no_record_open(streamed: Load, host: RecordingHost) -> None:
    model = streamed(24 * MB)
    sample(model)

    class Interrupt(BaseException):
        pass

    def interrupt(*_: Any) -> None:
        raise Interrupt

    handle = model.model.diffusion_model.single_blocks[0].register_forward_pre_hook(interrupt)
    with host.around_blocks(model.model.diffusion_model):
        with pytest.raises(Interrupt):
            sample(model)
        handle.remove()
        assert host.records == {}
        sample(model)


def test_what_runs_on_another_device_is_not_recorded(
    models: Path, machine: Any, native: ModelPatcher, host: RecordingHost
) -> None:
    """Streams are told apart by their handle alone, and the default one of each GPU has the same: what is recorded of
    the second GPU would get memory of the first."""
    expected = sample(native)
    machine(2, 64 * MB)
    with torch.inference_mode():
        model = load_streamed(str(models / MODEL), {})
        split_blocks(model, [torch.device("cpu", 0), torch.device("cpu", 1)], None)
    away = {block for block, device in model.streamed.placed if device.index == 1}
    assert 0 < len(away) < len(model.streamed.placed)
    inside: list[int] = []
    counted: dict[torch.nn.Module, int] = {}

    def enter(block: torch.nn.Module, *_: Any) -> None:
        counted[block] = host.kept[-1].allocated

    def leave(block: torch.nn.Module, *_: Any) -> None:
        inside.append(host.kept[-1].allocated - counted[block])

    sample(model)  # The hooks come behind ours.
    handles = [block.register_forward_pre_hook(enter) for block in away]
    handles += [block.register_forward_hook(leave) for block in away]
    try:
        with host.around_blocks(model.model.diffusion_model):
            assert torch.equal(sample(model), expected)
    finally:
        for handle in handles:
            handle.remove()
    assert inside == [0] * 3 * len(away)
    assert host.kept[-1].allocated > 0, "blocks at home are recorded"
    assert host.escaped == []


@pytest.mark.parametrize("gives", ["what it got", "a tensor of its own"])
def test_what_a_block_elsewhere_calls_at_home_is_recorded(
    models: Path, machine: Any, native: ModelPatcher, host: RecordingHost, gives: str
) -> None:
    """It frees what it has allocated in the record before, which the record must see."""

    def keeping(model: ModelPatcher) -> ModelPatcher:
        model, kept = model.clone(), {}

        def patch(out: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            kept["last"] = out * 1.0
            return out if gives == "what it got" else out * 1.0

        model.set_model_attn1_output_patch(patch)
        return model

    expected = sample(keeping(native))
    machine(2, 64 * MB)
    with torch.inference_mode():
        model = load_streamed(str(models / MODEL), {})
        split_blocks(model, [torch.device("cpu", 0), torch.device("cpu", 1)], None)
    patched = keeping(model)
    sample(patched)
    with host.around_blocks(model.model.diffusion_model):
        assert torch.equal(sample(patched), expected)
        assert host.kept[-1].failed == ""
    assert host.escaped == []


def test_the_hosts_clean_up_empties_its_queues_and_ends_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own function, with our stand-in in the place of a record where it keeps any."""
    queue = [None, None]
    monkeypatch.setattr(prefetch, "PREFETCH_QUEUES", [queue])
    if KEEPS_RECORDS:
        record = StrictRecord()
        record._comfy_active = True
        monkeypatch.setitem(prefetch.MALLOC_GRAPHS, threading.get_ident(), record)
    hosts.end_recordings()
    assert [queue] == prefetch.PREFETCH_QUEUES, "another thread's, or another model's, goes on"
    prefetch.cleanup_prefetch_queues()
    assert prefetch.PREFETCH_QUEUES == []
    if KEEPS_RECORDS:
        assert threading.get_ident() not in prefetch.MALLOC_GRAPHS
        assert not record._comfy_active
        assert hosts.record.held_bytes(CPU) == 0


@pytest.mark.skipif(
    not hasattr(prefetch, "pause_malloc_graph"), reason="this ComfyUI keeps no records (0.35 and newer)"
)
def test_the_hosts_pause_switches_the_record_that_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    switched: list[str] = []
    record = StrictRecord()
    record.abort()
    record.pause = lambda sync=False: switched.append("pause")
    record.resume = lambda sync=False: switched.append("resume")
    monkeypatch.setitem(prefetch.MALLOC_GRAPHS, threading.get_ident(), record)
    with prefetch.pause_malloc_graph():
        assert switched == [], "it is not open"
    record._comfy_active = True
    with prefetch.pause_malloc_graph():
        assert switched == ["pause"]
    assert switched == ["pause", "resume"]


@pytest.mark.skipif(not KEEPS_RECORDS, reason=f"ComfyUI {hosts.VERSION} keeps no records (0.35 and newer do)")
def test_the_hosts_record_has_the_interface_of_the_stand_in() -> None:
    from comfy_aimdo.malloc_graph import MallocGraph

    theirs = {name: value for name, value in vars(MallocGraph).items() if not name.startswith("_")}
    ours = {name: value for name, value in vars(StrictRecord).items() if not name.startswith("_")}
    shared = theirs.keys() & ours.keys()
    assert {"push", "pop", "abort", "pause", "resume", "iterate", "physical_bytes", "rogue_count"} <= shared
    for name in ("push", "pause", "resume", "iterate"):
        assert list(inspect.signature(theirs[name]).parameters) == list(inspect.signature(ours[name]).parameters)
    assert "_stream" in inspect.getsource(MallocGraph.__init__)
    assert inspect.signature(prefetch.malloc_graph_begin).parameters.keys() == {"device"}
