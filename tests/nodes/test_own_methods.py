"""What stands on modules of ours in the place of their methods is not what somebody has put there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from weightstream.nodes.references import refers_to
from weightstream.nodes.twins import functions_of
from weightstream.streaming.entries import Entries


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def method(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def other(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def replacement(x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.fixture
def block() -> Block:
    return Block()


@pytest.fixture
def entries(block: Block) -> Iterator[Entries]:
    entries = Entries()
    yield entries
    entries.remove()


def watch(entries: Entries, block: Block) -> None:
    entries.watch(block, lambda module, args, kwargs: None, lambda module, args, output: None)


def test_what_others_have_put_on_a_module_is_seen_and_what_is_ours_is_not(block: Block, entries: Entries) -> None:
    watch(entries, block)
    assert functions_of(block) == {}
    entries.remove()
    block.other = replacement
    before = functions_of(block)
    watch(entries, block)
    assert functions_of(block) == before == {"": {"other": (__name__, "replacement")}}


def test_ours_refers_to_its_module_as_a_method_does(block: Block, entries: Entries) -> None:
    """A patch that has kept it would work on that model, and on no other."""
    watch(entries, block)
    kept = block.method
    assert refers_to([lambda: kept], {id(block)})
    entries.remove()
    assert refers_to([lambda: kept], {id(block)})
    other = Block()
    assert not refers_to([kept], {id(other)})
