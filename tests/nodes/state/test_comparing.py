"""A step that has changed what outlives it is told from one that has not; nothing is put back."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from stateful import STATES, in_a_variable_without_a_value
from weightstream.nodes.state.step_state import StepModules, StepState

CPU = torch.device("cpu")


def state_of(*roots: Any, modules: torch.nn.Module | None = None) -> StepState:
    return StepState({"a patch": roots}, StepModules(modules or torch.nn.Module()), [CPU])


@pytest.mark.parametrize("make", STATES)
def test_every_state_of_others_shows(make: Callable[[], Callable[[], Any]]) -> None:
    step = make()
    untouched = state_of(step)
    assert untouched.changed() == "", "nothing has run"
    first = step()
    assert untouched.changed(), "it has run"
    if make is not in_a_variable_without_a_value:
        again = state_of(step)
        assert step() != first
        assert again.changed()
    untouched.put_back()


@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.random, lambda: torch.rand(1), lambda: torch.randn(2, generator=torch.default_generator)],
)
def test_a_step_that_draws_random_numbers(draw: Callable[[], Any]) -> None:
    state = state_of()
    draw()
    assert state.changed() == "it has drawn random numbers"
    state.put_back()
    assert state.changed() == ""


def test_of_a_module_only_what_others_have_put_there_counts() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
    modules = StepModules(model)
    state = StepState({}, modules, [CPU])
    model.eval()
    model[0].register_forward_hook(lambda *_: None)
    buffer = model[1].running_mean
    model[1].running_mean = buffer.clone()
    assert state.changed() == "", "a buffer like the one before, as when weights move"
    model[1].running_mean = buffer + 1
    assert "leads to has changed" in state.changed()
    model[1].running_mean = buffer
    model[0].calls = 1
    assert state.changed() == "a Linear that the model leads to has changed"


def test_a_module_of_somebody_else() -> None:
    model = torch.nn.Linear(1, 1)
    state = state_of(model)
    assert state.changed() == ""
    model.weight = torch.nn.Parameter(torch.ones(1, 1))
    assert state.changed() == "a Linear that a patch leads to has changed"


def test_what_nobody_can_look_into_counts_as_changed() -> None:
    class Refusing(dict):
        def __iter__(self) -> Any:
            raise TypeError("not for you")

    assert state_of(Refusing()).changed() == ""
    state = state_of({"lock": memoryview(b"1")})
    assert state.changed() == ""
    written: list[str] = []
    modules = StepModules(torch.nn.Module())
    state = StepState({}, modules, [CPU], lambda: set(written))
    written.append("blocks.0.weight")
    assert state.changed() == "blocks.0.weight, a weight of the model, was written to"
