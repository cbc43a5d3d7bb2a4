"""While weights are read the node shows how far it is, and the host can interrupt it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.progress import NodeState, get_progress_state
from held import check_nothing_is_held, held_by_others
from reads import Reads
from sampling import MB, Patched, sample, with_lora
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.tell import messages
from weightstream.streaming import format_bytes
from weightstream.streaming.planning.state import State

Load = Callable[..., StreamedModelPatcher]
NODE = "loader"


# -- progress --------------------------------------------------------------------------------------------------------


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
        monkeypatch.setattr(messages, "show", show)
        get_progress_state().nodes.pop(NODE, None)

    @property
    def reading(self) -> list[str]:
        return [text for text in self.texts if text.startswith("reading")]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    return Page(monkeypatch)


@pytest.mark.parametrize("limit", [14 * MB, None])
def test_bar_and_text_while_a_model_is_read(
    streamed: Load, plain: torch.Tensor, reads: Reads, page: Page, limit: int | None
) -> None:
    reads.seconds = 0.4
    model = streamed(64 * MB, vram_limit=limit, node_id=NODE)
    assert torch.equal(sample(model), plain)
    assert page.nodes == {NODE}
    done, totals = zip(*page.bars, strict=True)
    assert list(done) == sorted(done)
    assert len({*done}) > 2
    assert {*totals} == {model.streamer.model_bytes}
    assert done[-1] == totals[-1]
    size, rate, whole = r"\d+(\.\d)? ([MK]i)?B", r"\d+(\.\d)? [MK]?B/s", re.escape(format_bytes(totals[-1]))
    assert page.reading
    for text in page.reading:
        assert re.fullmatch(rf"reading {size} of {whole}(, {rate})?", text), text
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
    streamed: Load, plain: torch.Tensor, plain_with_lora: Patched, reads: Reads, page: Page
) -> None:
    reads.seconds, reads.only = 0.1, "weightstream-build"
    model = streamed(24 * MB, node_id=NODE)
    assert torch.equal(sample(with_lora(model, 0.5)), plain_with_lora(0.5))
    shown = len(page.bars)
    model.streamer.finish_building()
    assert torch.equal(sample(model), plain)
    assert len(page.bars) == shown


# -- cancelling ------------------------------------------------------------------------------------------------------


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
    streamed: Load, native: ModelPatcher, plain: torch.Tensor, reads: Reads, phase: str, lora: bool
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
    assert torch.equal(sample(model), plain)
    model = None  # The thread's condition knows it too.
    check_nothing_is_held(memory, before)


def test_cancelling_when_everything_has_just_arrived(
    streamed: Load, plain: torch.Tensor, reads: Reads, page: Page
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
        assert torch.equal(sample(model), plain)
