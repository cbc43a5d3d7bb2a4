"""Steps in which the host records allocations: what is ours stays out of the record, and a step that fails leaves none
open."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import comfy.model_prefetch as prefetch
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from recording import HELD_BYTES, Recorder, StrictRecord, recorder  # noqa: F401
from sampling import MB, sample, with_lora
from weightstream.nodes import hosts
from weightstream.nodes.parts import split_blocks
from weightstream.nodes.patcher import StreamedModelPatcher
from weightstream.streaming import CpuBackend, VirtualMemory

Load = Callable[..., StreamedModelPatcher]
CPU = torch.device("cpu")


@pytest.fixture
def record(recorder: Recorder) -> Recorder:  # noqa: F811
    return recorder


def test_what_a_backend_allocates_is_not_recorded(record: Recorder) -> None:
    backend = CpuBackend(VirtualMemory(MB), record=hosts.record)
    record.begin(CPU)
    slot = backend.allocate(1024)
    others = torch.zeros(3)
    record.end()
    assert slot.nbytes == 1024
    assert len(record.rogues) == 1
    assert "(3,)" in record.rogues[0], "the stand-in notices what stays"
    del others


def test_a_pause_inside_of_a_pause_does_not_end_it(record: Recorder) -> None:
    record.begin(CPU)
    with hosts.record.paused():
        with hosts.record.paused():
            pass
        kept = torch.zeros(2)
    recorded = torch.zeros(5)
    record.end()
    assert [what.rpartition(" ")[2] for what in record.rogues] == ["(5,)"]
    del kept, recorded


def test_a_record_that_has_failed_hides_no_error(record: Recorder) -> None:
    record.begin(CPU)

    def run_out() -> None:
        with hosts.record.paused():
            record.records[threading.get_ident()].failed = True
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        run_out()
    with hosts.record.paused():
        pass
    record.clean_up()


def test_only_the_record_of_this_thread_counts(record: Recorder) -> None:
    record.begin(CPU)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(hosts.record.held_bytes(CPU)))
    thread.start()
    thread.join()
    assert found == [0]
    assert hosts.record.held_bytes(CPU) == HELD_BYTES
    assert hosts.record.held_bytes(torch.device("cuda", 1)) == 0
    record.end()
    assert hosts.record.held_bytes(CPU) == HELD_BYTES, "it is kept for the next step"
    record.clean_up()
    assert hosts.record.held_bytes(CPU) == 0


def test_what_a_record_holds_counts_as_memory_for_the_next_step(
    streamed: Load, record: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(24 * MB)
    monkeypatch.setattr(mm, "get_free_memory", lambda *_: 100 * MB)
    before = model.get_free_memory(CPU)
    record.begin(CPU)
    record.end()
    assert model.get_free_memory(CPU) - before == HELD_BYTES
    record.clean_up()
    assert model.get_free_memory(CPU) == before


def _recorded(record: Recorder, model: ModelPatcher, expected: torch.Tensor) -> tuple[int, int]:
    """How many allocations of a run were recorded, and how many of these stayed."""
    record.clean_up()
    before = len(record.rogues)
    with record.around_blocks(model.model.diffusion_model, CPU):
        assert torch.equal(sample(model), expected)
        return record.kept[-1].allocated, len(record.rogues) - before


@pytest.mark.parametrize("verify", [False, True])
def test_a_record_around_blocks_has_nothing_of_ours(
    streamed: Load, native: ModelPatcher, record: Recorder, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    expected = sample(native)
    theirs = _recorded(record, native, expected)
    if verify:
        monkeypatch.setenv("WEIGHTSTREAM_VERIFY", "1")
    model = streamed(24 * MB)
    for _ in range(2):
        assert _recorded(record, model, expected) == theirs
    assert record.escaped == []
    assert model.streamer.counters.steps == 6
    assert model.status()["mode"] != "resident"


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_step_that_fails_leaves_no_record_open(
    streamed: Load, native: ModelPatcher, record: Recorder, failing: int, lora: bool
) -> None:
    expected = sample(with_lora(native, 0.7) if lora else native)
    model = streamed(24 * MB)
    use = with_lora(model, 0.7) if lora else model
    sample(use)
    model.streamer.backend.store.budget *= 2  # So that there is something to give up.
    calls, hit = iter(range(1000)), []

    def fail(*_: Any) -> None:
        if next(calls) == failing:
            hit.append(record.cleaned)
            raise torch.OutOfMemoryError("no room")

    handle = model.model.diffusion_model.single_blocks[0].register_forward_pre_hook(fail)
    try:
        with record.around_blocks(model.model.diffusion_model, CPU):
            # A second root would raise: the step that runs again begins its record anew.
            assert torch.equal(sample(use), expected)
    finally:
        handle.remove()
    assert hit == [0]
    assert len(record.kept) == 2, "the failed step's record was given up, and a new one begun"
    assert record.escaped == []


def test_an_interrupt_leaves_no_record_open(streamed: Load, record: Recorder) -> None:
    model = streamed(24 * MB)
    sample(model)

    class Interrupt(BaseException):
        pass

    def interrupt(*_: Any) -> None:
        raise Interrupt

    handle = model.model.diffusion_model.single_blocks[0].register_forward_pre_hook(interrupt)
    with record.around_blocks(model.model.diffusion_model, CPU):
        with pytest.raises(Interrupt):
            sample(model)
        handle.remove()
        assert record.records == {}
        sample(model)


def test_what_runs_on_another_device_is_not_recorded(
    models: Any, machine: Any, native: ModelPatcher, record: Recorder
) -> None:
    """Streams are told apart by their handle alone, and the default one of each GPU has the same: what is recorded of
    the second GPU would get memory of the first."""
    from sampling import MODEL
    from weightstream.nodes.loader import load_streamed

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
        counted[block] = record.kept[-1].allocated

    def leave(block: torch.nn.Module, *_: Any) -> None:
        inside.append(record.kept[-1].allocated - counted[block])

    sample(model)  # The hooks come behind ours.
    handles = [block.register_forward_pre_hook(enter) for block in away]
    handles += [block.register_forward_hook(leave) for block in away]
    try:
        with record.around_blocks(model.model.diffusion_model, CPU):
            assert torch.equal(sample(model), expected)
    finally:
        for handle in handles:
            handle.remove()
    assert inside == [0] * 3 * len(away)
    assert record.kept[-1].allocated > 0, "blocks at home are recorded"
    assert record.escaped == []


def test_the_hosts_clean_up_empties_its_queues_and_ends_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own function, with our stand-in in the place of a record where it keeps any."""
    keeps_records = hasattr(prefetch, "MALLOC_GRAPHS")
    monkeypatch.setattr(prefetch, "PREFETCH_QUEUES", [[None, None]])
    record = StrictRecord(CPU)
    if keeps_records:
        monkeypatch.setitem(prefetch.MALLOC_GRAPHS, threading.get_ident(), record)
        record.begin()
    hosts.end_recordings()
    assert prefetch.PREFETCH_QUEUES == []
    if keeps_records:
        assert threading.get_ident() not in prefetch.MALLOC_GRAPHS
        assert not record._comfy_active
        assert hosts.record.held_bytes(CPU) == 0


@pytest.mark.skipif(
    not hasattr(prefetch, "pause_malloc_graph"), reason="this ComfyUI keeps no records (0.35 and newer)"
)
def test_the_hosts_pause_switches_the_record_that_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    switched: list[str] = []
    record = StrictRecord(CPU)
    record.pause = lambda sync=False: switched.append("pause")
    record.resume = lambda sync=False: switched.append("resume")
    monkeypatch.setitem(prefetch.MALLOC_GRAPHS, threading.get_ident(), record)
    with prefetch.pause_malloc_graph():
        assert switched == [], "it is not open"
    record._comfy_active = True
    with prefetch.pause_malloc_graph():
        assert switched == ["pause"]
    assert switched == ["pause", "resume"]
