"""Finds blocks into which other code has put something: functions, hooks, or tensors that are no part of the model.

It looks before each step, because wrappers put such things there for one step. So it looks at dictionaries alone: a
microsecond or less for each module.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..model.entries import Method, is_ours

# The attributes of a module itself, and its hooks before and after a call.
_Module = tuple[dict[str, Any], dict[int, Any], dict[int, Any]]


class Strangers:
    """What other code has put into the blocks of one model."""

    def __init__(self) -> None:
        self._blocks: list[tuple[nn.Module, list[_Module]]] = []
        self._always: set[nn.Module] = set()
        self._now: set[nn.Module] = set()

    def watch(self, blocks: Iterable[nn.Module]) -> None:
        """Remember what is in these blocks."""
        self._blocks, self._always = [], set()
        for block in blocks:
            modules = list(block.modules())
            if any(map(_holds_something, modules)):
                self._always.add(block)
            found = [(vars(one), one._forward_pre_hooks, one._forward_hooks) for one in modules]
            self._blocks.append((block, found))

    def look(self) -> None:
        """A step begins: see which blocks hold any."""
        self._now = self._always | {block for block, modules in self._blocks if _are_strange(modules)}

    @property
    def found(self) -> list[nn.Module]:
        """Blocks that held any."""
        return [block for block, _ in self._blocks if block in self._now]

    def are_in(self, block: nn.Module) -> bool:
        """Whether the block held any when the step began."""
        return block in self._now


def _are_strange(modules: list[_Module]) -> bool:
    for held, begins, ends in modules:
        if "forward" in held or (begins and _others(begins)) or (ends and _others(ends)):
            return True
    return False


def _holds_something(module: nn.Module) -> bool:
    """Whether it has a tensor that is neither parameter nor buffer, or something in the place of a method."""
    return any(
        isinstance(value, torch.Tensor) or (isinstance(value, Method) and value.instead_of is not None)
        for value in vars(module).values()
    )


def _others(hooks: dict[int, Any]) -> bool:
    """Whether hooks of other code are among them."""
    return not all(map(is_ours, hooks.values()))
