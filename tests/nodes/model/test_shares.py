"""Blocks of a MODEL on several devices are given out anew: for good reasons, and at once where a device is full."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import comfy.hooks
import comfy.model_management as mm
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from placing import Machine, place
from sampling import MB, Patched, sample, sample_with_hook, with_lora
from weightstream.nodes.model import shares
from weightstream.nodes.model.shares import Shares
from weightstream.nodes.model.sharing import _times
from weightstream.nodes.tell import messages, notices
from weightstream.streaming import State, VirtualMemory
from weightstream.streaming.machine.gpus import Link


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    announce = messages.announce

    def listen(name: str, text: str, *rest: Any, **options: Any) -> None:
        texts.append(text)
        announce(name, text, *rest, **options)

    monkeypatch.setattr(messages, "announce", listen)
    return texts


@pytest.fixture
def split(loaded: Any, machine: Machine) -> Callable[..., tuple[Any, tuple[VirtualMemory, ...]]]:
    """The tiny FLUX, which takes 38 MB, on virtual devices."""

    def make(*budgets: int, **inputs: Any) -> tuple[Any, tuple[VirtualMemory, ...]]:
        memories = machine(len(budgets))
        for memory, budget in zip(memories, budgets, strict=True):
            memory.budget = budget
        return place(loaded, **inputs)[0], memories

    return make


def blocks_of(model: Any) -> list[int]:
    return [len(streamer.blocks.blocks) for streamer in model.streamers]


# How torch's allocators say it, and libraries under torch.
FULL = {
    "cached": (torch.OutOfMemoryError, "CUDA out of memory. GPU {} has a total capacity of 1 GiB of which 0 is free"),
    "driver": (torch.OutOfMemoryError, "Allocation on device {} would exceed allowed memory. (out of memory)"),
    "library": (RuntimeError, "CUDA error: out of memory"),
}


def out_of_memory(device: int, words: str = "cached") -> Exception:
    """A new one each time: an error keeps alive what it went through."""
    kind, text = FULL[words]
    return kind(text.format(device))


def fill(model: Any, device: int, words: str = "cached") -> Any:
    """As if another process took all memory of that GPU: a step there fails, until nothing runs there any more."""
    streamer = model.streamers[device]
    block = streamer.blocks.blocks[0].module

    def fail(*_: object) -> None:
        if any(block is one.module for one in streamer.blocks.blocks):
            raise out_of_memory(device, words)

    return block.register_forward_pre_hook(fail)


# -- a device that is full ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [0.0, 0.7])
@pytest.mark.parametrize("budgets", [(16 * MB, 16 * MB), (14 * MB, 14 * MB, 14 * MB)], ids=["two", "three"])
def test_a_device_that_is_filled_in_mid_run_gets_nothing(
    split: Callable, native: ModelPatcher, announced: list[str], budgets: tuple[int, ...], lora: float
) -> None:
    expected = sample(with_lora(native, lora) if lora else native)
    model, _ = split(*budgets)
    model = with_lora(model, lora) if lora else model
    assert torch.equal(sample(model), expected)
    before = blocks_of(model)
    handle = fill(model, 1)
    for _ in range(2):
        assert torch.equal(sample(model), expected)
    assert blocks_of(model)[1] == 0
    assert sum(blocks_of(model)) == sum(before)
    assert "gpu:1 is full, so its blocks go to the other devices" in announced
    assert model.streamer.counters.reruns == 1
    assert model.parts[0].loaded_size() == 0
    handle.remove()
    # What it would gain from that device seems so for the first time, then for the second.
    assert torch.equal(sample(model), expected)
    assert blocks_of(model) == before
    for _ in range(2):
        assert torch.equal(sample(model), expected)
    mm.unload_all_models()
    assert [streamer.state for streamer in model.streamers] == [State.UNLOADED] * len(budgets)


def test_a_device_that_is_filled_between_prompts(split: Callable, plain: torch.Tensor, announced: list[str]) -> None:
    model, memories = split(16 * MB, 16 * MB)
    assert torch.equal(sample(model), plain)
    mm.unload_all_models()
    memories[1].budget = MB
    assert torch.equal(sample(model), plain)
    assert blocks_of(model)[1] == 0
    assert "gpu:1 is full, so its blocks go to the other devices" in announced


@pytest.mark.parametrize("count", [2, 3])
def test_the_home_is_filled_in_mid_run(
    split: Callable, plain: torch.Tensor, plain_with_lora: Patched, count: int
) -> None:
    model, _ = split(*[40 * MB] * count)
    assert torch.equal(sample(model), plain)
    before = blocks_of(model)
    handle = fill(model, 0)
    for _ in range(2):
        assert torch.equal(sample(model), plain)
    assert blocks_of(model)[0] == 0
    assert model.streamer.snapshot().blocks == 0
    handle.remove()
    assert sum(blocks_of(model)) == sum(before)
    assert torch.equal(sample(with_lora(model, 0.7)), plain_with_lora(0.7))


@pytest.mark.parametrize("full", [(1, 2), (0, 2), (0, 1, 2)])
def test_several_devices_are_full(split: Callable, plain: torch.Tensor, full: tuple[int, ...]) -> None:
    model, _ = split(60 * MB, 60 * MB, 60 * MB)
    assert torch.equal(sample(model), plain)

    def fail(module: torch.nn.Module, *_: object) -> None:
        for device in full:
            if any(module is block.module for block in model.streamers[device].blocks.blocks):
                raise out_of_memory(device)

    handles = [block.register_forward_pre_hook(fail) for block, _ in model.streamed.placed]
    if len(full) == 3:
        with pytest.raises(torch.OutOfMemoryError):
            sample(model)
    else:
        assert torch.equal(sample(model), plain)
        assert [device for device, count in enumerate(blocks_of(model)) if count == 0] == list(full)
    for handle in handles:
        handle.remove()
    assert torch.equal(sample(model), plain)


@pytest.mark.parametrize("words", FULL)
def test_the_full_device_is_found(split: Callable, plain: torch.Tensor, words: str) -> None:
    model, _ = split(16 * MB, 16 * MB)
    handle = fill(model, 1, words)
    assert torch.equal(sample(model), plain)
    assert blocks_of(model)[1] == 0
    handle.remove()


@pytest.mark.parametrize("mode", [comfy.hooks.EnumHookMode.MinVram, comfy.hooks.EnumHookMode.MaxSpeed])
def test_hooks_are_in_the_weights_wherever_they_go(
    split: Callable, native: ModelPatcher, plain: torch.Tensor, mode: Any
) -> None:
    expected = sample_with_hook(native, mode)
    model, _ = split(16 * MB, 16 * MB)
    assert torch.equal(sample_with_hook(model, mode), expected)
    handle = fill(model, 1)
    assert torch.equal(sample_with_hook(model, mode), expected)
    handle.remove()
    assert torch.equal(sample(model), plain)


def test_another_error_is_no_reason(split: Callable) -> None:
    model, _ = split(16 * MB, 16 * MB)
    sample(model)
    before = blocks_of(model)

    def fail(*_: object) -> None:
        raise ValueError("of a block")

    handle = model.parts[0].streamer.blocks.blocks[0].module.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="of a block"):
        sample(model)
    handle.remove()
    assert blocks_of(model) == before


# -- other memory ------------------------------------------------------------------------------------------------------


def test_lasting_pressure_changes_shares_and_a_passing_one_does_not(
    split: Callable, plain: torch.Tensor, announced: list[str]
) -> None:
    model, memories = split(18 * MB, 18 * MB)
    for _ in range(3):
        assert torch.equal(sample(model), plain)
    before = blocks_of(model)
    mm.unload_all_models()
    for budgets in ((30, 10), (18, 18), (30, 10)):
        for memory, budget in zip(memories, budgets, strict=True):
            memory.budget = budget * MB
        assert torch.equal(sample(model), plain)
        mm.unload_all_models()
        assert blocks_of(model) == before
    assert "memory or speed of its devices has changed" not in announced
    assert torch.equal(sample(model), plain)
    assert "memory or speed of its devices has changed" in announced
    assert blocks_of(model)[1] < before[1]
    assert torch.equal(sample(model), plain)


def test_shares_that_the_user_chose_stay(split: Callable, plain: torch.Tensor) -> None:
    model, memories = split(18 * MB, 18 * MB, split="ratio", ratio="50,50")
    sample(model)
    before = blocks_of(model)
    mm.unload_all_models()
    memories[1].budget = 12 * MB
    for _ in range(3):
        assert torch.equal(sample(model), plain)
    assert blocks_of(model) == before


# -- speed and links ---------------------------------------------------------------------------------------------------


def streamer(*blocks: tuple[type, int, float]) -> Any:
    """Blocks by class, bytes and seconds."""
    return SimpleNamespace(
        blocks=SimpleNamespace(
            blocks=[
                SimpleNamespace(module=kind(), units=[SimpleNamespace(nbytes=nbytes)]) for kind, nbytes, _ in blocks
            ]
        ),
        outline=SimpleNamespace(unit_bytes=tuple(nbytes for _, nbytes, _ in blocks)),
        profile=SimpleNamespace(block_seconds=tuple(seconds for *_, seconds in blocks)),
    )


class Double:
    pass


class Single:
    pass


def test_devices_are_compared_by_blocks_that_both_have() -> None:
    ours = streamer((Double, 8, 2.0), (Double, 8, 2.0), (Single, 2, 1.0))
    slower = streamer((Single, 2, 3.0), (Single, 2, 3.0))
    as_fast = streamer((Double, 8, 2.1))
    nothing_in_common = streamer((Single, 3, 100.0))
    assert _times([ours, as_fast]) == [7.1 / 26] * 2
    first, second = _times([ours, slower])
    assert second == pytest.approx(3 * first)
    assert first * 18 + second * 4 == pytest.approx(5 + 6), "all blocks take what they took"
    assert len(set(_times([ours, nothing_in_common]))) == 1


def test_a_slower_link_gets_less_before_anything_was_measured(split: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = split(14 * MB, 14 * MB)
    backends = [SimpleNamespace(device=torch.device("cuda", number), is_virtual=False, name="x") for number in range(2)]
    for one, other, expected in ((Link(4, 16), Link(4, 4), 4.0), (Link(5, 8), Link(4, 16), 1.0)):
        monkeypatch.setattr(shares, "best_links", lambda indices, links=(one, other): [links[i] for i in indices])
        rates = shares.links_of(backends)
        assert rates[0] / rates[1] == pytest.approx(expected, rel=1e-3)
    monkeypatch.setattr(shares, "best_links", lambda indices: [Link(4, 16), Link(4, None)])
    assert shares.links_of(backends) == [1.0, 1.0]
    monkeypatch.setattr(shares, "links_of", lambda backends: [4.0, 1.0])
    monkeypatch.setattr(shares, "room_on", lambda backend, settings: 10 * MB)
    found = Shares(model.streamed.shares.blocks, None).begin(backends, model.settings)
    assert found.assignment.devices.count(0) > 1.5 * found.assignment.devices.count(1)


def test_shares_that_the_user_chose_come_back(split: Callable, plain: torch.Tensor) -> None:
    model, _ = split(60 * MB, 60 * MB, split="equal")
    sample(model)
    before = blocks_of(model)
    handle = fill(model, 1)
    assert torch.equal(sample(model), plain)
    assert blocks_of(model) == [sum(before), 0]
    handle.remove()
    for _ in range(2):
        assert torch.equal(sample(model), plain)
    assert blocks_of(model) == before


def test_a_compiled_model_with_functions_of_others_in_its_blocks_runs_at_home(
    split: Callable, plain: torch.Tensor, announced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = split(60 * MB, 60 * MB)
    assert torch.equal(sample(model), plain)
    before = blocks_of(model)
    monkeypatch.setattr(type(model), "_is_compiled", lambda self: True)
    mm.unload_all_models()
    block = model.streamed.placed[-1][0]
    block.forward = block.forward
    for _ in range(3):
        assert torch.equal(sample(model), plain)
        assert blocks_of(model) == [sum(before), 0]
    (text,) = {text for text in announced if text.startswith("all blocks run on gpu:0: the model is compiled")}
    assert "diffusion_model.single_blocks.3 holds functions of another node" in text
    assert text in [notice["text"] for notice in notices.describe_notices()]
    del block.forward
    for _ in range(3):
        assert torch.equal(sample(model), plain)
    assert blocks_of(model) == before
    assert text not in [notice["text"] for notice in notices.describe_notices()]
