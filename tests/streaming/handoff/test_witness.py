"""Who reads and writes between blocks is seen, whatever modes others use, and what they put into blocks is found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from weightstream.streaming.errors import StreamingError
from weightstream.streaming.handoff.boundary import Boundary
from weightstream.streaming.handoff.strangers import Strangers
from weightstream.streaming.handoff.witness import Witness
from weightstream.streaming.model.entries import Entries
from weightstream.streaming.split.links import Links

HOME, THERE = torch.device("cpu", 0), torch.device("cpu", 1)


class Other(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def seen() -> list[tuple[tuple[int, ...], bool]]:
    return []


@pytest.fixture
def witness(seen: list) -> Iterator[Witness]:
    witness = Witness(lambda tensor, writes: seen.append((tuple(tensor.shape), writes)))
    yield witness
    witness.remove()
    assert _get_current_dispatch_mode_stack() == []


@pytest.mark.parametrize("inference", [False, True])
def test_reads_and_writes_are_told(witness: Witness, seen: list, inference: bool) -> None:
    with torch.inference_mode(inference):
        one, two = torch.zeros(1), torch.zeros(2)
        assert witness.on()
        assert not witness.on()
        two.add_(one)
        torch.add(one, two, out=two)
        torch.cat([one, two])
        two[0] = 1
        assert witness.off()
        two.mul_(2)
    assert seen[:2] == [((2,), True), ((1,), False)]
    assert seen[2:5] == [((1,), False), ((2,), False), ((2,), True)]
    assert seen[5:7] == [((1,), False), ((2,), False)]
    assert ((), True) in seen[7:], "of what is written to by an index it is a view"


def test_modes_of_others_stay(witness: Witness, seen: list) -> None:
    below, above = Other(), Other()
    with below:
        witness.on()
        with above:
            assert not witness.off(), "it stays beneath"
            torch.zeros(3).neg()
            witness.remove()
            assert _get_current_dispatch_mode_stack() == [below, above]
    assert seen == [((3,), False)]


def test_it_is_beneath_what_has_come_since_the_step_began(witness: Witness, seen: list) -> None:
    with Other() as before:
        witness.begin()
        with Other() as since:
            witness.on()
            assert _get_current_dispatch_mode_stack() == [before, witness, since]
            assert not witness.off()
        assert witness.off()
        assert _get_current_dispatch_mode_stack() == [before]


def test_somebody_who_takes_it_off_is_told(witness: Witness) -> None:
    witness.on()
    torch.utils._python_dispatch._pop_mode()
    with pytest.raises(StreamingError, match="nobody has seen what was written between blocks"):
        witness.off()
    assert witness.on()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.inside = False

    def forward(self, x: torch.Tensor, shared: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        for patch in options.get("patches", {}).values():
            x = patch(x)
        return self.linear(x) + shared


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor, shared: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, shared, options)
        return x


def test_a_function_that_runs_another_block_is_watched_behind_it() -> None:
    model = Model()
    with torch.inference_mode():

        def run() -> torch.Tensor:
            shared = torch.ones(1, 2)

            def patch(x: torch.Tensor) -> torch.Tensor:
                x = model.blocks[2](x, shared, {})
                shared.mul_(2)
                return x + shared

            return model(torch.ones(1, 2), shared, {"patches": {"one": patch}})

        expected = run()
        for places in ((1, 1, 1), (1, 0, 1), (0, 1, 0), (1, 1, 0)):
            boundary = Boundary(HOME, Links(), ["patches"])
            boundary.attach(model, [(b, (HOME, THERE)[p]) for b, p in zip(model.blocks, places, strict=True)])
            assert torch.equal(run(), expected)
            boundary.detach()
        assert _get_current_dispatch_mode_stack() == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_between_blocks_takes_it_off(error: type[BaseException]) -> None:
    model = Model()
    boundary = Boundary(HOME, Links())
    boundary.attach(model, [(block, THERE) for block in model.blocks[:2]])

    def fail(*_: Any) -> None:
        raise error

    model.blocks[2].forward = fail
    with torch.inference_mode(), pytest.raises(error):
        model(torch.ones(1, 2), torch.ones(1, 2), {})
    boundary.settle()  # As who runs steps does: of an interrupt torch tells no hook.
    assert _get_current_dispatch_mode_stack() == []


def test_strangers_are_found() -> None:
    model, strangers = Model(), Strangers()
    first, second, third = model.blocks
    first.linear.scale = torch.ones(1)
    Entries().watch(third.linear, lambda *_: None, lambda *_: None)
    strangers.watch(model.blocks)
    strangers.look()
    assert strangers.found == [first], "a tensor that is no parameter"
    handle = second.linear.register_forward_hook(lambda *_: None)
    third.forward = third.forward
    strangers.look()
    assert strangers.found == [first, second, third]
    handle.remove()
    del third.forward
    strangers.look()
    assert strangers.found == [first]


class Doubles:
    """An object of somebody's own, which has a tensor of the model and writes to it; what it has nobody can see."""

    __slots__ = ("_what",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._what = lambda: tensor.mul_(2)

    def __call__(self) -> None:
        self._what()


class Sharing(nn.Module):
    """Blocks that add what all of them get. The second has an object in its options, which writes to that."""

    class Block(nn.Module):
        def forward(self, x: torch.Tensor, shared: torch.Tensor, options: dict[str, Doubles]) -> torch.Tensor:
            for act in options.values():
                act()
            return x + shared

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x, shared, {"of anybody": Doubles(shared)} if number == 1 else {})
        return x


@pytest.mark.parametrize("places", [(1, 0, 1), (0, 0, 1), (1, 0, 0)])
def test_what_an_object_in_a_block_writes_is_seen(places: tuple[int, ...]) -> None:
    """In a block with such an object the witness stays on."""
    model = Sharing()
    with torch.inference_mode():
        expected = model(torch.ones(1, 2), torch.ones(1, 2))
        boundary = Boundary(HOME, Links())
        boundary.attach(model, [(b, (HOME, THERE)[p]) for b, p in zip(model.blocks, places, strict=True)])
        assert torch.equal(model(torch.ones(1, 2), torch.ones(1, 2)), expected)
        boundary.detach()


def test_what_blocks_are_brought_is_not_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[torch.Tensor] = []
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    boundary = Boundary(HOME, Links())
    boundary.attach(model, [(block, place) for block, place in zip(model, (THERE, HOME, THERE), strict=True)])
    monkeypatch.setattr(boundary._witness, "_touched", lambda tensor, writes: told.append(tensor))
    with torch.inference_mode():
        model(torch.ones(1, 2))
    assert told == []
    boundary.detach()
