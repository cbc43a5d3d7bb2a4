"""Whether weights stream packed is found out once it may matter, and why they do not is said in words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from packed_models import BUDGET, PACKED_IN_BLOCK, X, learned, make, make_model, step, why
from weightstream.streaming import CpuBackend, VirtualMemory, packing_choice
from weightstream.streaming.config import PackingMode
from weightstream.streaming.packing import unpackers
from weightstream.streaming.run.recorder import Recorder


def test_a_device_that_cannot_unpack_streams_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fail(*args: object) -> float:
        asked.append(1)
        raise RuntimeError("cuLaunchKernel failed\nand more")

    monkeypatch.setattr(packing_choice, "unpacked_bytes_per_second", fail)
    model = make_model()
    expected = model(X)
    streamer = make(model)
    for _ in range(2):
        assert learned(streamer, model).packed == frozenset()
        assert torch.equal(step(streamer, model), expected)
    assert len(asked) == 1
    assert why(streamer) == "weights do not stream packed: they cannot be packed (cuLaunchKernel failed)"


def test_of_the_first_steps_nothing_is_said() -> None:
    model = make_model()
    streamer = make(model)
    assert why(streamer) == ""
    streamer.load(streamer.plan_for(BUDGET))
    assert why(streamer) == ""
    step(streamer, model)
    assert why(streamer) == ""


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The devices for which a kernel was compiled and timed."""
    found: list[object] = []
    own = packing_choice.unpacked_bytes_per_second
    monkeypatch.setattr(packing_choice, "unpacked_bytes_per_second", lambda *args: found.append(1) or own(*args))
    return found


def test_where_there_is_nothing_to_pack_no_kernel_is_tried(tried: list[object]) -> None:
    model = make_model().float()
    x = X.float()
    expected = model(x)
    streamer = make(model)
    streamer.load(streamer.plan_for(10**6))
    for _ in range(4):
        assert torch.equal(streamer.run(lambda: model(x), shape="x"), expected)
    assert streamer.plan.packed == frozenset()
    text = "weights do not stream packed: none that streams is held in bfloat16 or float16, is large and gets smaller"
    assert why(streamer) == text
    assert tried == []


def test_by_itself_it_tries_a_kernel_only_where_the_bus_is_the_limit(
    monkeypatch: pytest.MonkeyPatch, tried: list[object]
) -> None:
    model = make_model()
    streamer = make(model, packing=PackingMode.AUTO)
    monkeypatch.setattr(Recorder, "_bandwidth", lambda self: 1e15)
    learned(streamer, model)
    step(streamer, model)
    assert tried == []
    planner = streamer.planner
    planner.vram.current.profile = planner.profile = replace(planner.profile, bandwidth=1e6)
    streamer.keep(planner.plan_for(BUDGET))  # As with less memory, of which a step does not learn.
    for _ in range(2):
        assert torch.equal(step(streamer, model), make_model()(X))
        assert len(tried) == 1
    assert streamer.plan.packed


def test_what_failed_is_tried_again_by_the_next_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """There was no memory to time unpacking in."""
    own, failures = packing_choice.unpacked_bytes_per_second, [torch.OutOfMemoryError("no memory is left")]

    def fail_once(*args: object) -> float:
        if failures:
            raise failures.pop()
        return own(*args)

    monkeypatch.setattr(packing_choice, "unpacked_bytes_per_second", fail_once)
    model = make_model()
    streamer = make(model)
    assert learned(streamer, model).packed == frozenset()
    assert why(streamer) == "weights do not stream packed: they cannot be packed (no memory is left)"
    streamer.begin_run()
    assert len(learned(streamer, model).packed) == 4 * PACKED_IN_BLOCK


def test_on_another_device_it_is_found_out_anew(tried: list[object]) -> None:
    """How fast a device unpacks says nothing about another, also where a model is laid out before its first step."""
    model = make_model()
    expected = model(X)
    streamer = make(model)
    learned(streamer, model)
    assert len(tried) == 1
    streamer.move_to(CpuBackend(VirtualMemory(10**9)))
    streamer.take_up(streamer.blocks, streamer.changes())
    assert len(tried) == 1
    assert len(learned(streamer, model).packed) == 4 * PACKED_IN_BLOCK
    assert torch.equal(step(streamer, model), expected)
    assert len(tried) == 2


OBSTACLES: list[tuple[dict[str, object], str]] = [
    ({"copy_streams": 0}, "copies are synchronous"),
    ({"pin_memory": False}, "they are not page-locked"),
    ({"packing": PackingMode.OFF}, ""),
    ({"packing": PackingMode.AUTO, "copy_streams": 0}, ""),
]


@pytest.mark.parametrize(("setting", "reason"), OBSTACLES, ids=str)
def test_where_nothing_may_be_packed_nothing_is(setting: dict[str, object], reason: str) -> None:
    model = make_model()
    expected = model(X)
    streamer = make(model, **setting)
    assert learned(streamer, model).packed == frozenset()
    assert torch.equal(step(streamer, model), expected)
    assert why(streamer) == (f"weights do not stream packed: {reason}" if reason else "")


@pytest.mark.parametrize(("speed", "packs"), [(1e5, False), (1e15, True)])
def test_by_itself_it_packs_only_what_makes_steps_faster(
    monkeypatch: pytest.MonkeyPatch, speed: float, packs: bool
) -> None:
    model = make_model()
    monkeypatch.setattr(packing_choice, "unpacked_bytes_per_second", lambda *args: speed)
    monkeypatch.setattr(Recorder, "_bandwidth", lambda self: 1e6)  # The bus is what takes long.
    streamer = make(model, packing=PackingMode.AUTO)
    assert bool(learned(streamer, model).packed) is packs
    assert torch.equal(step(streamer, model), make_model()(X))
    assert why(streamer) == ""


class Gpu(CpuBackend):
    """A device that is no virtual one, and for which there is no kernel."""

    is_virtual = False


@pytest.mark.parametrize(
    ("dtype", "mode", "compiles"),
    [
        (torch.bfloat16, PackingMode.AUTO, True),
        (torch.bfloat16, PackingMode.OFF, False),
        (torch.float32, PackingMode.ON, False),
    ],
)
def test_kernels_are_compiled_before_anything_is_packed(
    dtype: torch.dtype, mode: PackingMode, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(packing_choice.KERNELS_AHEAD, "compile", asked.append)
    for backend in (CpuBackend(VirtualMemory(10**9)), Gpu(VirtualMemory(10**9))):
        model = make_model().to(dtype)
        streamer = make(model, backend, packing=mode)
        streamer.load(streamer.plan_for(2 * BUDGET))
        assert asked == ([backend.device] if compiles and not backend.is_virtual else [])
        streamer.close()


@pytest.mark.parametrize(
    ("mode", "bandwidth", "speed", "text"),
    [
        (PackingMode.AUTO, 1e6, 1e5, "weights do not stream packed: there is no kernel here that unpacks them"),
        (PackingMode.AUTO, 1e15, 1e5, ""),
        (PackingMode.AUTO, 1e6, 1e15, ""),
        (PackingMode.ON, 1e6, 1e5, "weights are unpacked slowly: there is no kernel here that unpacks them"),
    ],
    ids=["the bus is the limit", "compute is the limit", "it is fast all the same", "it was asked for"],
)
def test_a_gpu_without_a_kernel_is_told_of(
    monkeypatch: pytest.MonkeyPatch, mode: PackingMode, bandwidth: float, speed: float, text: str
) -> None:
    model = make_model()
    monkeypatch.setattr(packing_choice, "unpacked_bytes_per_second", lambda *args: speed)
    monkeypatch.setattr(Recorder, "_bandwidth", lambda self: bandwidth)
    streamer = make(model, Gpu(VirtualMemory(10**9)), packing=mode)
    learned(streamer, model)
    assert torch.equal(step(streamer, model), make_model()(X))
    assert why(streamer) == (f"{text} ({unpackers.unpacker_of(torch.device('cpu')).reason})" if text else "")
    streamer.keep(replace(streamer.plan, forecast=replace(streamer.plan.forecast, seconds=0.0)))
    assert bool(why(streamer)) is (mode is PackingMode.ON), "with another plan copies hide behind compute"
