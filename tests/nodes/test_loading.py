"""Weights are read while the model is loaded and in its first step: progress, cancelling, faults; who reads what."""

from __future__ import annotations

import gc
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management as mm
import comfy.utils
import psutil
import pytest
import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from comfy_execution.progress import NodeState, get_progress_state
from sampling import MB, MODEL, sample, sample_with_hook, with_lora
from weightstream.nodes import devices, status
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.patcher import StreamedModelPatcher
from weightstream.streaming import CheckpointError, format_bytes
from weightstream.streaming.checkpoint_file import CheckpointFile, _Descriptor
from weightstream.streaming.host_memory import HostMemory
from weightstream.streaming.state import State

Load = Callable[..., StreamedModelPatcher]
NODE = "loader"


class Reads:
    """Counts what is read of checkpoints, and makes reading slow.

    Attributes:
        seconds: that a read takes longer for each MB; on threads whose name begins with ``only``.
        nbytes: read since the last :meth:`reset`.
        tensors: of which something was read.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        self.only = ""
        self._counting = threading.Lock()
        self.reset()
        read_into = CheckpointFile.read_into

        def read(file: CheckpointFile, target: memoryview, offset: int) -> None:
            self._count(file, offset, target.nbytes)
            if self.seconds and threading.current_thread().name.startswith(self.only):
                time.sleep(self.seconds * target.nbytes / MB)
            read_into(file, target, offset)

        monkeypatch.setattr(CheckpointFile, "read_into", read)

    def reset(self) -> None:
        self.nbytes = 0
        self.tensors: set[str] = set()

    def _count(self, file: CheckpointFile, offset: int, nbytes: int) -> None:
        with self._counting:
            self.nbytes += nbytes
            end = offset + nbytes
            self.tensors |= {name for name, entry in file.entries.items() if entry.begin < end and offset < entry.end}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture(autouse=True)
def no_interrupt_is_left() -> Iterator[None]:
    yield
    left = mm.processing_interrupted()
    mm.interrupt_current_processing(False)
    assert not left


def settle(model: StreamedModelPatcher) -> None:
    """Sample until the plan is settled and everything is page-locked."""
    for _ in range(2):
        sample(model)
        model.streamer.finish_building()
    sample(model)


def held_by_others() -> int:
    """Page-locked bytes, without those of models that earlier tests have left to the garbage collector."""
    gc.collect()
    return devices.pins.used


def check_nothing_is_held(memory: Any, before: int) -> None:
    """The models of the test are gone: so is what they held."""
    mm.unload_all_models()
    mm.cleanup_models_gc()
    gc.collect()
    give_up = time.monotonic() + 5
    while devices.pins.used > before and time.monotonic() < give_up:
        time.sleep(0.01)  # Threads that read or build hold memory until they have seen that nobody wants it.
    assert (memory.allocated, devices.pins.used) == (0, before)


# -- progress ------------------------------------------------------------------------------------------------------


class Page:
    """What the host would show."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bars: list[tuple[int, int]] = []
        self.texts: list[str] = []
        self.nodes: set[str] = set()

        def hook(value: int, total: int, preview: Any, node_id: str | None = None) -> None:
            if node_id is not None:
                self.nodes.add(node_id)
                self.bars.append((value, total))
                get_progress_state().update_progress(node_id, value, total, preview)

        def show(text: str, node_id: str) -> None:
            self.nodes.add(node_id)
            self.texts.append(text)

        monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
        comfy.utils.set_progress_bar_global_hook(hook)
        monkeypatch.setattr(status, "show", show)
        get_progress_state().nodes.pop(NODE, None)

    @property
    def reading(self) -> list[str]:
        return [text for text in self.texts if text.startswith("reading")]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    return Page(monkeypatch)


@pytest.mark.parametrize("limit", [14 * MB, None])
def test_bar_and_text_while_a_model_is_read(
    streamed: Load, native: ModelPatcher, reads: Reads, page: Page, limit: int | None
) -> None:
    reads.seconds = 0.4
    model = streamed(64 * MB, vram_limit=limit, node_id=NODE)
    assert torch.equal(sample(model), sample(native))
    assert page.nodes == {NODE}
    done, totals = zip(*page.bars, strict=True)
    assert list(done) == sorted(done)
    assert len({*done}) > 2
    assert {*totals} == {model.streamer.model_bytes}
    assert done[-1] == totals[-1]
    size, whole = r"\d+(\.\d)? [MK]?B", re.escape(format_bytes(totals[-1]))
    assert page.reading
    for text in page.reading:
        assert re.fullmatch(rf"reading {size} of {whole}(, {size}/s)?", text), text
    assert get_progress_state().nodes[NODE]["state"] is NodeState.Finished


@pytest.mark.parametrize("steps", [1, 3])
def test_the_plan_is_what_the_node_shows_in_the_end(streamed: Load, reads: Reads, page: Page, steps: int) -> None:
    reads.seconds = 0.4
    model = streamed(64 * MB, vram_limit=14 * MB, node_id=NODE)
    sample(model, steps=steps)
    assert page.reading
    assert not page.texts[-1].startswith("reading")


def test_nothing_is_shown_without_a_node(streamed: Load, reads: Reads, page: Page) -> None:
    reads.seconds = 0.2
    sample(streamed(24 * MB))
    assert (page.bars, page.texts) == ([], [])


def test_steps_and_builders_that_wait_after_loading_show_nothing(
    streamed: Load, native: ModelPatcher, reads: Reads, page: Page
) -> None:
    reads.seconds, reads.only = 0.1, "weightstream-build"
    model = streamed(24 * MB, node_id=NODE)
    assert torch.equal(sample(with_lora(model, 0.5)), sample(with_lora(native, 0.5)))
    shown = len(page.bars)
    model.streamer.finish_building()
    assert torch.equal(sample(model), sample(native))
    assert len(page.bars) == shown


# -- cancelling ----------------------------------------------------------------------------------------------------


def cancel_when(condition: Callable[[], bool]) -> tuple[threading.Thread, list[float]]:
    """Press the host's button, from another thread, as soon as ``condition`` holds."""
    pressed: list[float] = []

    def press() -> None:
        give_up = time.monotonic() + 20
        while not condition() and time.monotonic() < give_up:
            time.sleep(0.002)
        pressed.append(time.monotonic())
        mm.interrupt_current_processing()

    thread = threading.Thread(target=press)
    thread.start()
    return thread, pressed


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("phase", ["load", "first step"])
def test_cancelling_while_weights_are_read(
    streamed: Load, native: ModelPatcher, reads: Reads, phase: str, lora: bool
) -> None:
    def patched(model: ModelPatcher) -> ModelPatcher:
        return with_lora(model, 0.5) if lora else model

    before = held_by_others()
    expected = sample(patched(native))
    model = streamed(64 * MB, vram_limit=None if phase == "load" else 14 * MB)
    memory = model.streamer.backend.store
    reads.seconds = 0.2
    if phase == "load":
        thread, pressed = cancel_when(lambda: model.streamer.reader.ring_bytes > 0)
    else:
        thread, pressed = cancel_when(lambda: model.streamer.state is State.LOADED)
    with pytest.raises(mm.InterruptProcessingException):
        sample(patched(model))
    assert time.monotonic() - pressed[0] < 0.5
    thread.join()
    assert model.streamer.counters.steps == 0
    if phase == "load":
        assert memory.allocated == 0
    reads.seconds = 0.0
    assert torch.equal(sample(patched(model)), expected)
    assert torch.equal(sample(model), sample(native))
    model = None  # The thread's condition knows it too.
    check_nothing_is_held(memory, before)


def test_cancelling_when_everything_has_just_arrived(
    streamed: Load, native: ModelPatcher, reads: Reads, page: Page
) -> None:
    """The first step's end tells that loading is over, which is where the interrupt comes out then."""
    reads.seconds = 0.4
    model = streamed(24 * MB, node_id=NODE)
    diffusion_model = model.model.diffusion_model
    handle = diffusion_model.final_layer.register_forward_hook(lambda *_: mm.interrupt_current_processing())
    with pytest.raises(mm.InterruptProcessingException):
        sample(model)
    handle.remove()
    assert page.bars
    for _ in range(2):
        assert torch.equal(sample(model), sample(native))


# -- who reads what ------------------------------------------------------------------------------------------------


def file_bytes(model: StreamedModelPatcher, names: set[str] | None = None) -> int:
    specs = model.streamer.blocks.specs
    return sum(spec.source.nbytes for spec in specs if spec.source and (names is None or spec.name in names))


@pytest.mark.parametrize("limit", [14 * MB, 24 * MB])
def test_a_second_prompt_and_a_clone_read_nothing(streamed: Load, reads: Reads, limit: int | None) -> None:
    model = streamed(64 * MB, vram_limit=limit)
    settle(model)
    assert reads.nbytes >= file_bytes(model)
    reads.reset()
    sample(model, seed=5)
    sample(model.clone())
    assert reads.nbytes == 0


@pytest.mark.parametrize("limit", [14 * MB, None])
def test_a_lora_reads_originals_of_its_own_weights_alone(
    streamed: Load, native: ModelPatcher, reads: Reads, limit: int | None
) -> None:
    model = streamed(64 * MB, vram_limit=limit)
    settle(model)
    patched = with_lora(model, 0.5)
    reads.reset()
    assert torch.equal(sample(patched), sample(with_lora(native, 0.5)))
    assert torch.equal(sample(model), sample(native))
    model.streamer.finish_building()
    assert {f"diffusion_model.{name}" for name in reads.tensors} <= {*patched.patches}
    assert reads.nbytes <= file_bytes(model, {*patched.patches})


def test_after_unloading_only_what_was_resident_is_read(streamed: Load, native: ModelPatcher, reads: Reads) -> None:
    model = streamed(64 * MB, vram_limit=28 * MB)
    settle(model)
    blocks, placement = model.streamer.blocks, model.streamer._placement
    units = [blocks.rest, *(unit for unit in blocks.units if placement.copies(unit.index).master is None)]
    places = [spec.source for unit in units for spec in unit.layout.specs if spec.source is not None]
    without_master = {
        name
        for place in places
        for name, entry in place.file.entries.items()
        if entry.begin <= place.offset < entry.end
    }
    mm.unload_all_models()
    reads.reset()
    assert torch.equal(sample(model), sample(native))
    model.streamer.finish_building()
    assert reads.tensors == without_master


# -- faults --------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_file(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(models / MODEL, tmp_path / "own.safetensors"))


@pytest.mark.parametrize("limit", [14 * MB, None])
@pytest.mark.parametrize("fault", ["truncated", "overwritten"])
def test_a_file_that_changes_after_loading(
    models: Path,
    own_file: Path,
    virtual_device: Callable[[int], Any],
    native: ModelPatcher,
    fault: str,
    limit: int | None,
) -> None:
    before = held_by_others()
    memory = virtual_device(64 * MB)
    with torch.inference_mode():
        model = load_streamed(str(own_file), {}, limit)
    times = own_file.stat()
    if fault == "truncated":
        os.truncate(own_file, times.st_size // 2)
    else:
        with own_file.open("r+b") as file:
            file.seek(times.st_size - 100)
            file.write(bytes(100))
    for run in (model, with_lora(model, 0.5)):
        with pytest.raises(CheckpointError, match=r"own\.safetensors: was changed while it was in use"):
            sample(run)
        assert model.loaded_size() == 0
    # As it was, also by its time: the same model works. (Else it is loaded anew.)
    shutil.copy(models / MODEL, own_file)
    os.utime(own_file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert torch.equal(sample(model), sample(native))
    with torch.inference_mode():
        again = load_streamed(str(own_file), {}, limit)
    assert torch.equal(sample(again), sample(native))
    del model, run, again
    check_nothing_is_held(memory, before)


@pytest.mark.parametrize("fault", ["replaced", "deleted"])
def test_a_file_that_goes_after_loading_is_still_read(
    models: Path, own_file: Path, virtual_device: Callable[[int], Any], native: ModelPatcher, fault: str
) -> None:
    virtual_device(64 * MB)
    with torch.inference_mode():
        model = load_streamed(str(own_file), {}, 14 * MB)
    if fault == "replaced":
        other = own_file.with_name("other")
        other.write_bytes(b"another")
        os.replace(other, own_file)
    else:
        own_file.unlink()
    assert torch.equal(sample(with_lora(model, 0.5)), sample(with_lora(native, 0.5)))
    assert torch.equal(sample(model), sample(native))
    mm.unload_all_models()
    assert torch.equal(sample(model), sample(native))


@pytest.mark.parametrize("limit", [14 * MB, None])
@pytest.mark.parametrize("tensor", ["double_blocks.0.img_mlp.0.weight", "single_blocks.3.linear1.weight"])
def test_a_read_error_names_file_and_tensor(
    streamed: Load, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch, tensor: str, limit: int | None
) -> None:
    before = held_by_others()
    model = streamed(64 * MB, vram_limit=limit)
    model.streamer.finish_building()
    model.streamer.give_up_masters(1 << 40)
    memory = model.streamer.backend.store
    spec = next(spec for spec in model.streamer.blocks.specs if spec.name == f"diffusion_model.{tensor}")
    bad = spec.source.offset + spec.source.nbytes // 2
    with monkeypatch.context() as patch:
        read = _Descriptor.read

        def fail(source: _Descriptor, target: memoryview, offset: int) -> int:
            if offset <= bad < offset + target.nbytes:
                raise OSError(5, "Input/output error")
            return read(source, target, offset)

        patch.setattr(_Descriptor, "read", fail)
        with pytest.raises(CheckpointError, match=re.escape(tensor)) as caught:
            sample(model)
        assert f"{MODEL}: cannot read " in str(caught.value)
        assert "Input/output error" in str(caught.value)
        mm.unload_all_models()
        assert memory.allocated == 0
    assert torch.equal(sample(model), sample(native))
    del model, spec, caught
    check_nothing_is_held(memory, before)


# -- page-locked memory --------------------------------------------------------------------------------------------


GB = 1 << 30


@pytest.mark.parametrize(
    ("host", "group", "expected"),
    [
        (-1, None, None),
        (0, HostMemory(GB, GB), None),
        (57.6 * GB, None, int(57.6 * GB)),
        # The host's share of the machine is its share of the container, too.
        (57.6 * GB, HostMemory(16 * GB, 4 * GB), int(14.4 * GB)),
        (57.6 * GB, HostMemory(256 * GB, 4 * GB), int(57.6 * GB)),
    ],
)
def test_the_limit_of_page_locked_memory(
    monkeypatch: pytest.MonkeyPatch, host: float, group: HostMemory | None, expected: int | None
) -> None:
    monkeypatch.setattr(mm, "MAX_PINNED_MEMORY", host)
    monkeypatch.setattr(devices, "group_memory", lambda: group)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: HostMemory(64 * GB, 8 * GB))
    limit = devices._pin_limit()
    assert limit == (expected if expected is None else pytest.approx(expected, abs=8))


@pytest.mark.parametrize(
    ("system", "group", "expected"),
    [
        (HostMemory(64 * GB, 8 * GB), None, 6 * GB),
        (HostMemory(8 * GB, 4 * GB), None, 4 * GB - int(0.8 * GB)),
        (HostMemory(64 * GB, 40 * GB), HostMemory(16 * GB, 5 * GB), 5 * GB - int(1.6 * GB)),
        (HostMemory(64 * GB, 3 * GB), HostMemory(16 * GB, 5 * GB), GB),
        (HostMemory(64 * GB, GB), None, -GB),
    ],
)
def test_the_memory_that_may_still_be_taken(
    monkeypatch: pytest.MonkeyPatch, system: HostMemory, group: HostMemory | None, expected: int
) -> None:
    monkeypatch.setattr(devices, "group_memory", lambda: group)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: system)
    assert devices.spare_ram() == pytest.approx(expected, abs=8)


def test_without_page_locking_everything_is_staged(
    streamed: Load, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(args, "disable_pinned_memory", True)
    before = held_by_others()
    model = streamed(64 * MB, vram_limit=14 * MB)
    for _ in range(2):
        assert torch.equal(sample(model), sample(native))
        assert torch.equal(sample(with_lora(model, 0.5)), sample(with_lora(native, 0.5)))
    now = model.status()
    assert now["mode"] == "streamed"
    assert now["pinned_bytes"] == 0
    assert "page-locking is switched off" in now["explain"]
    assert devices.pins.used == before


@pytest.mark.parametrize("lora", [False, True])
def test_two_models_take_turns_with_room_for_the_copies_of_one(
    models: Path,
    virtual_device: Callable[[int], Any],
    native: ModelPatcher,
    monkeypatch: pytest.MonkeyPatch,
    lora: bool,
) -> None:
    virtual_device(64 * MB)
    with torch.inference_mode():
        first, second = (load_streamed(str(models / MODEL), {}, 14 * MB) for _ in range(2))
    gc.collect()
    settle(first)
    held = first.status()["pinned_bytes"]
    assert held > 20 * MB
    # Room for the copies of one and for a ring.
    monkeypatch.setattr(devices.pins, "limit", int(1.4 * held))
    expected = sample(with_lora(native, 0.5) if lora else native)
    for _ in range(2):
        for model in (first, second):
            latent = sample(with_lora(model, 0.5) if lora else model)
            model.streamer.finish_building()
            assert torch.equal(latent, expected)
            assert devices.pins.used <= devices.pins.limit
    assert torch.equal(sample(first), sample(native))


# -- weight hooks --------------------------------------------------------------------------------------------------


def written_bytes(name: str) -> int:
    """Bytes of mapped files of this name that somebody has written to: the system keeps such pages apart."""
    mapped, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field, _, rest = line.partition(" ")
        if not field.endswith(":"):
            mapped = line.endswith(name)
        elif mapped and field in ("Private_Dirty:", "Swap:"):
            found += 1024 * int(rest.split()[0])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
@pytest.mark.parametrize("mode", list(comfy.hooks.EnumHookMode))
def test_weight_hooks_while_copies_are_built(
    streamed: Load, native: ModelPatcher, reads: Reads, mode: comfy.hooks.EnumHookMode
) -> None:
    expected = sample_with_hook(native, mode)
    reads.seconds, reads.only = 0.05, "weightstream-build"
    model = streamed(64 * MB, vram_limit=14 * MB)
    assert torch.equal(sample_with_hook(model, mode), expected)
    assert torch.equal(sample(model), sample(native))
    assert written_bytes(MODEL) == 0
