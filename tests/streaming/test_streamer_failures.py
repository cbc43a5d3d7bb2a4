"""Interrupts, failed copies, failed loads: an error may come at any time, a wrong weight never."""

from __future__ import annotations

import itertools
from contextlib import suppress

import pytest
import torch
from models import Transformer, X, hand_plan, make_streamer, make_transformer, units_of
from torch import nn
from weightstream.streaming import (
    CpuBackend,
    DeviceMemoryError,
    State,
    Streamer,
    StreamingConfig,
    VirtualMemory,
    cut_model,
)
from weightstream.streaming.run.schedule import Schedule


class Stop(BaseException):
    """Like the host's interrupt: no ``Exception``, so torch runs no hooks for it."""


def run_into(kind: type[BaseException], model: Transformer, layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``model`` until ``layer``, which raises ``kind``."""

    def interrupt(x: torch.Tensor) -> torch.Tensor:
        raise kind

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", interrupt)
        with pytest.raises(kind):
            model(X)


@pytest.mark.parametrize("kind", [Stop, ValueError])
@pytest.mark.parametrize("block", range(6))
def test_an_interrupted_block_is_let_go_of(
    block: int, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_transformer()
    expected = model(X)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    run_into(kind, model, model.blocks[block].mlp[1], monkeypatch)
    streamer.settle()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert torch.equal(model(X), expected)
    assert torch.equal(model(X), expected)


def test_an_interrupt_without_settling_heals_with_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    run_into(Stop, model, model.blocks[3].out, monkeypatch)
    assert torch.equal(model(X), expected)


def test_an_interrupt_in_a_resident_block_teaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_transformer()
    streamer = make_streamer(model)
    streamer.load(hand_plan(streamer, units_of(streamer, (0, 1, 3, 5)), 2))
    run_into(Stop, model, model.blocks[4].out, monkeypatch)
    for _ in range(3):
        model(X)
    assert streamer.site.lane is not None
    assert streamer.site.lane._schedule.order == [0, 1, 2, 3]
    assert streamer.counters.misses == 0


def test_after_an_interrupt_modules_do_not_hold_what_is_copied_over() -> None:
    model = make_transformer()
    streamer = make_streamer(model, learned=True)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    model(X)

    def stop(*_: object) -> None:
        raise Stop

    handle = model.blocks[2].out.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        model(X)
    handle.remove()
    streamer.settle()
    ring = streamer.site.lane._ring._memory
    memory = range(ring.data_ptr(), ring.data_ptr() + ring.nbytes)
    assert not [name for name, weight in model.blocks.named_parameters() if weight.data_ptr() in memory]


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("name", ["next_copy", "enter", "leave"])
def test_an_interrupt_between_two_lines_costs_no_more_than_its_step(
    name: str, after: bool, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl+C does: before a call has done its work, or before anybody knows that it has."""
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model, copy_streams=2 if ahead else 0)
    streamer.load(hand_plan(streamer, units_of(streamer, range(6)), 3))
    method = getattr(Schedule, name)
    for wanted in range(1, 8):
        calls = itertools.count(1)

        def interrupted(*args: object, calls: itertools.count[int] = calls, wanted: int = wanted) -> object:
            stops = next(calls) == wanted
            done = method(*args) if after or not stops else None
            if stops:
                raise Stop
            return done

        with monkeypatch.context() as patch:
            patch.setattr(Schedule, name, interrupted)
            with suppress(Stop):
                model(X)
        streamer.settle()
        for _ in range(2):
            assert torch.equal(model(X), expected)
        misses = streamer.counters.misses
        assert torch.equal(model(X), expected)
        assert streamer.counters.misses - misses == (0 if ahead else 6)


class FailingBackend(CpuBackend):
    """The n-th copy fails: ``at_once`` when it is queued, else later, on its worker."""

    def __init__(self, failing_copy: int, at_once: bool) -> None:
        super().__init__(VirtualMemory(10**9))
        self.copies = 0
        self.failing_copy = failing_copy
        self.at_once = at_once

    def _copy_now(self, stream, pairs, waits):
        self.copies += 1
        if self.copies != self.failing_copy:
            return super()._copy_now(stream, pairs, waits)
        for target, _ in pairs:
            target.fill_(255)  # A slot that was half written must never be taken for a block.
        if self.at_once:
            raise OSError("the copy failed")
        return stream.submit(self._fail)

    @staticmethod
    def _fail() -> None:
        raise OSError("the copy failed")


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("failing_copy", range(1, 10))
def test_a_failed_copy_is_an_error_and_never_a_wrong_weight(failing_copy: int, at_once: bool) -> None:
    model = make_transformer()
    expected = model(X)
    backend = FailingBackend(10**9, at_once)
    streamer = Streamer(model, cut_model(model), backend, StreamingConfig())
    streamer.load(streamer.plan_for(streamer.minimum_bytes + streamer.outline.block_bytes(0)))
    streamer.finish_building()
    assert torch.equal(model(X), expected)
    streamer.drain()
    backend.copies, backend.failing_copy = 0, failing_copy
    errors = 0
    for _ in range(4):
        try:
            assert torch.equal(model(X), expected)
        except OSError:
            errors += 1
    assert errors == 1


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("failing_copy", range(1, 20))
def test_a_failed_staged_copy_is_made_again_or_an_error(failing_copy: int, at_once: bool) -> None:
    """What fails ahead of time is copied once more; what fails for good fails the load or the step."""
    model = make_transformer()
    expected = model(X)
    backend = FailingBackend(failing_copy, at_once)
    streamer = Streamer(model, cut_model(model), backend, StreamingConfig(pin_memory=False))
    errors = 0
    for _ in range(4):
        try:
            streamer.load(streamer.plan_for(streamer.minimum_bytes + streamer.outline.block_bytes(0)))
            assert torch.equal(model(X), expected)
        except OSError:
            errors += 1
    assert errors <= 1
    assert backend.copies > failing_copy
    streamer.close()
    assert backend.allocated == backend.store.allocated == 0


def test_a_failed_first_copy_unloads_the_model() -> None:
    model = make_transformer()
    expected = model(X)
    backend = FailingBackend(1, at_once=True)
    streamer = Streamer(model, cut_model(model), backend, StreamingConfig())
    with pytest.raises(OSError, match="the copy failed"):
        streamer.load(streamer.plan_for(streamer.minimum_bytes))
    assert streamer.state is State.UNLOADED
    assert backend.allocated == 0
    assert torch.equal(model(X), expected)


def test_a_failed_load_gives_everything_back() -> None:
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model, budget=200_000)
    plan = streamer.plan_for(10**9)
    assert plan.device_bytes > 200_000
    with pytest.raises(DeviceMemoryError, match="gpu:0 has"):
        streamer.load(plan)
    assert streamer.state is State.UNLOADED
    assert streamer.backend.allocated == 0
    assert torch.equal(model(X), expected)
