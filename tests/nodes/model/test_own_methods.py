"""What stands on modules of ours in the place of their methods is not what somebody has put there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn
from weightstream.nodes.state.references import refers_to
from weightstream.nodes.twins.likeness import difference, held_by
from weightstream.streaming.model.entries import Entries


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


def is_alike(one: nn.Module, other: nn.Module) -> bool:
    cpu = torch.device("cpu")
    return not difference(*(held_by(ModelPatcher(model, cpu, cpu)) for model in (one, other)))


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
    plain, replaced = Block(), Block()
    for other in (plain, replaced):
        other.load_state_dict(block.state_dict())
    replaced.other = replacement
    watch(entries, block)
    assert is_alike(block, plain)
    assert not is_alike(block, replaced)
    entries.remove()
    block.other = replacement
    watch(entries, block)
    assert is_alike(block, replaced)
    assert not is_alike(block, plain)


def test_ours_refers_to_its_module_as_a_method_does(block: Block, entries: Entries) -> None:
    """A patch that has kept it would work on that model, and on no other."""
    watch(entries, block)
    kept = block.method
    assert refers_to([lambda: kept], {id(block)})
    entries.remove()
    assert refers_to([lambda: kept], {id(block)})
    other = Block()
    assert not refers_to([kept], {id(other)})
