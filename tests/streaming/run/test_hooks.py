"""Hooks tell one listener what a model does, and are made once."""

from __future__ import annotations

import torch
from torch import nn
from weightstream.streaming.run.hooks import Hooks


class Told:
    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def begin_step(self) -> None:
        self.told.append(("begin_step", 0))

    def end_step(self, completed: bool) -> None:
        self.told.append(("end_step", completed))

    def enter_block(self, block: int) -> None:
        self.told.append(("enter_block", block))

    def leave_block(self, block: int) -> None:
        self.told.append(("leave_block", block))

    def enter_unit(self, unit: int) -> None:
        self.told.append(("enter_unit", unit))

    def leave_unit(self, unit: int) -> None:
        self.told.append(("leave_unit", unit))

    def recorded(self, block: int | None) -> None:
        raise AssertionError("no gradients are recorded here")


def hooks_on(module: nn.Module) -> list[object]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


@torch.inference_mode()
def test_hooks_of_a_layer_are_the_same_whenever_they_are_attached() -> None:
    root, told = nn.Sequential(nn.Linear(2, 2)), Told()
    hooks, seen = Hooks(told), []
    for _ in range(2):
        entries = hooks.attach(root, [], [(7, root[0])])
        seen.append(hooks_on(root[0]))
        root(torch.ones(1, 2))
        entries.remove()
        assert hooks_on(root[0]) == []
    assert len(seen[0]) == 2
    assert seen[0] == seen[1]
    assert told.told == [("begin_step", 0), ("enter_unit", 7), ("leave_unit", 7), ("end_step", True)] * 2
