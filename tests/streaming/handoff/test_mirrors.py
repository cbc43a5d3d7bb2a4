"""What is written to a tensor that several blocks share is seen by all, whoever writes, and on whatever device.

Virtual devices: a tensor on another one is a copy, so what is not handed on is lost.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from counting_links import CountingLinks
from torch import nn
from weightstream.streaming.handoff.boundary import Boundary
from weightstream.streaming.handoff.mirrors import Mirrors

HOME, SECOND, THIRD = (torch.device("cpu", index) for index in range(3))
SPLITS = {
    "home": [0] * 6,
    "runs": [0, 0, 0, 1, 1, 1],
    "away": [1] * 6,
    "three runs": [0, 0, 1, 1, 2, 2],
    "in turn": [0, 1, 0, 1, 0, 1],
    "three in turn": [0, 1, 2, 0, 1, 2],
}


@pytest.fixture(params=[False, True], ids=["", "inference mode"], autouse=True)
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.inference_mode(request.param):
        yield


class Block(nn.Module):
    """Does to its arguments what it was made for."""

    def __init__(self, number: int, act: Callable[..., Any]) -> None:
        super().__init__()
        self.number, self.act = number, act

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.act(self.number, x, *args, **kwargs)


class Model(nn.Module):
    def __init__(self, act: Callable[..., Any], run: Callable[..., Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(number, act) for number in range(6))
        self.run = run

    def forward(self, x: torch.Tensor, state: Any) -> Any:
        return self.run(self.blocks, x, state)


def ramp(*shape: int) -> torch.Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape) / 8


def results(
    act: Callable[..., Any], run: Callable[..., Any], make: Callable[[], Any], split: str | None, steps: int = 2
) -> tuple[list[torch.Tensor], CountingLinks]:
    """What steps give, and what they leave in a state that outlives them."""
    model, links, state = Model(act, run), CountingLinks(), make()
    boundary = Boundary(HOME, links, ["patches"])
    if split is not None:
        boundary.attach(model, [(b, torch.device("cpu", d)) for b, d in zip(model.blocks, SPLITS[split], strict=True)])
    found = [model(ramp(2, 4), state).clone() for _ in range(steps)]
    boundary.detach()
    return found + [tensor.clone() for tensor in tensors(state)], links


def tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        return [found for _, value in sorted(state.items()) for found in tensors(value)]
    if isinstance(state, (list, tuple)):
        return [found for value in state for found in tensors(value)]
    return tensors(vars(state)) if hasattr(state, "__dict__") else []


def check(act: Callable[..., Any], run: Callable[..., Any], make: Callable[[], Any], split: str) -> CountingLinks:
    expected, _ = results(act, run, make, None)
    found, links = results(act, run, make, split)
    assert len(found) == len(expected)
    assert all(type(one) is torch.Tensor for one in found)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    return links


# -- who writes --------------------------------------------------------------------------------------------------------


def one_after_another(blocks: nn.ModuleList, x: torch.Tensor, state: Any) -> torch.Tensor:
    for block in blocks:
        x = block(x, state)
    return x


def adds(number: int, x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    return x + shared * (number + 1)


def writes(number: int, x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    shared[:, number % 3] += x[:, 0]
    return x + shared


def reads_or_writes(number: int, x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    return writes(number, x, shared) if number in (0, 3) else adds(number, x, shared)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("act", [adds, writes, reads_or_writes])
def test_blocks_write(split: str, act: Callable[..., Any]) -> None:
    check(act, one_after_another, lambda: ramp(2, 4), split)


@pytest.mark.parametrize("split", SPLITS)
def test_the_model_writes_between_blocks(split: str) -> None:
    def run(blocks: nn.ModuleList, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(blocks):
            x = block(x, state)
            if number % 2 == 0:
                state.mul_(1.25)
        return x

    check(adds, run, lambda: ramp(2, 4), split)


@pytest.mark.parametrize("split", SPLITS)
def test_a_view_is_written_to_between_blocks(split: str) -> None:
    def run(blocks: nn.ModuleList, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        part = state[:, 1:3]
        for block in blocks:
            x = block(x, state)
            part.add_(0.5)
        return x

    check(adds, run, lambda: ramp(2, 4), split)


@pytest.mark.parametrize("split", SPLITS)
def test_an_output_is_the_argument_that_was_written_to(split: str) -> None:
    """And somebody has the argument."""

    def act(number: int, x: torch.Tensor, state: Any) -> torch.Tensor:
        x += number
        return x

    def run(blocks: nn.ModuleList, x: torch.Tensor, state: Any) -> torch.Tensor:
        first = x * 1
        y = first
        for number, block in enumerate(blocks):
            y = block(y, state)
            if number == 3:
                y[:, :2] *= 2
        return first + y

    check(act, run, lambda: ramp(1), split)


@pytest.mark.parametrize("split", SPLITS)
def test_somebody_has_a_view_of_an_argument_that_is_gone(split: str) -> None:
    def act(number: int, x: torch.Tensor, state: Any) -> torch.Tensor:
        x.mul_(1.5)
        return x + number

    def run(blocks: nn.ModuleList, x: torch.Tensor, state: Any) -> torch.Tensor:
        views, x = [], x * 1
        for block in blocks:
            views.append(x[:, :1])
            x = block(x, state)
        return x + sum(views)

    check(act, run, lambda: ramp(1), split)


@pytest.mark.parametrize("split", SPLITS)
def test_functions_at_home_write_to_what_blocks_get(split: str) -> None:
    """By their arguments, and by what they have themselves."""

    def act(number: int, x: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        x = x + options["shared"]
        x = options["patches"]["attention"](x, options)
        return x * options["shared"] + options["other"]

    def run(blocks: nn.ModuleList, x: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        shared, other = options["shared"], options["other"]

        def patch(y: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
            shared.mul_(1.25)
            given["other"].add_(y.mean())
            y[:, 0] += other[:, 1]
            return y

        options["patches"] = {"attention": patch}
        x = one_after_another(blocks, x, options)
        del options["patches"]
        return x

    check(act, run, lambda: {"shared": ramp(2, 4), "other": ramp(2, 4) + 3}, split)


# -- what holds it -----------------------------------------------------------------------------------------------------


class Holder:
    def __init__(self) -> None:
        self.caches = [ramp(2, 4) for _ in range(6)]
        self.shared = ramp(2, 4)


HOLDERS: dict[str, tuple[Callable[[], Any], Callable[[Any, int], torch.Tensor]]] = {
    "list": (lambda: [ramp(2, 4) for _ in range(6)], lambda held, n: held[n]),
    "dictionary": (lambda: {"k": [ramp(2, 4) for _ in range(6)]}, lambda held, n: held["k"][n]),
    "dictionaries": (lambda: {"a": [{"k": ramp(2, 4)} for _ in range(6)]}, lambda held, n: held["a"][n]["k"]),
    "tuple": (lambda: ({"k": ramp(2, 4)}, [ramp(2, 4)] * 2), lambda held, n: held[1][0] if n % 2 else held[0]["k"]),
    "object": (Holder, lambda held, n: held.shared if n % 2 else held.caches[n]),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_caches_stay_written(holder: str, split: str) -> None:
    make, cache_of = HOLDERS[holder]

    def act(number: int, x: torch.Tensor, held: Any) -> torch.Tensor:
        cache = cache_of(held, number)
        cache[:, number % 4] = x[:, 0]
        return x + cache

    check(act, one_after_another, make, split)


@pytest.mark.parametrize("split", SPLITS)
def test_new_entries_stay(split: str) -> None:
    def act(number: int, x: torch.Tensor, held: Any) -> torch.Tensor:
        held["list"].append(x[:1])
        held.setdefault("of block", {})[number] = [x * 2, held["list"][0]]
        if number:
            held["of block"][number - 1][0].add_(1)
        return x + sum(value[0] for value in held["of block"].values()) + held["list"][-1]

    check(act, one_after_another, lambda: {"list": [ramp(1, 4)]}, split)


@pytest.mark.parametrize("split", SPLITS)
def test_a_tensor_and_a_view_of_it_in_one_call(split: str) -> None:
    def act(number: int, x: torch.Tensor, held: dict[str, torch.Tensor]) -> torch.Tensor:
        first, second = ("window", "whole") if number % 2 else ("whole", "window")
        held[first] += x[:, : held[first].shape[1]]
        return x + held[second].sum() + held[first].sum()

    def make() -> dict[str, torch.Tensor]:
        whole = ramp(2, 4).t().contiguous().t()
        return {"whole": whole, "window": whole[:, 1:3]}

    check(act, one_after_another, make, split)


# -- what it costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "moves"), [("runs", 1), ("in turn", 1), ("three runs", 2), ("three in turn", 2)])
def test_what_nobody_writes_to_moves_once(split: str, moves: int) -> None:
    _, links = results(adds, one_after_another, lambda: ramp(2, 4), split, steps=1)
    of_x = {"runs": 2, "in turn": 6, "three runs": 3, "three in turn": 6}[split]
    assert links.moves == moves + of_x


@pytest.mark.parametrize(("split", "moves"), [("runs", 2), ("in turn", 6), ("three runs", 3), ("three in turn", 6)])
def test_hidden_states_that_are_written_to_move_as_often_as_others(split: str, moves: int) -> None:
    def act(number: int, x: torch.Tensor, state: Any) -> torch.Tensor:
        x += number
        return x

    def run(blocks: nn.ModuleList, x: torch.Tensor, state: Any) -> torch.Tensor:
        return one_after_another(blocks, x * 1, state)

    _, links = results(act, run, list, split, steps=1)
    assert links.moves == moves


def test_copies_go_with_their_originals() -> None:
    mirrors = Mirrors(HOME, lambda tensor, device: tensor.clone())
    tensor = ramp(2, 4)
    copy, mirror = mirrors.bring(tensor, SECOND)
    assert mirrors.bring(tensor, SECOND)[0] is copy
    del tensor
    assert (len(mirrors), mirror.copies) == (0, {})


def test_a_copy_of_a_tensor_that_is_gone_is_never_another_ones() -> None:
    mirrors, other = Mirrors(HOME, lambda tensor, device: tensor.clone()), ramp(2, 4)
    _, mirror = mirrors.bring(ramp(2, 4) * 2, SECOND)
    mirrors._of[id(other)] = mirror
    assert torch.equal(mirrors.bring(other, SECOND)[0], other)


# -- any program -------------------------------------------------------------------------------------------------------

SEEDS = range(60)


def program(seed: int) -> tuple[Callable[..., Any], Callable[..., Any], Callable[[], Any]]:
    """Blocks and code between them that read and write at random what they get, in all kinds of containers."""
    choose = random.Random(seed)
    names = ["a", "b", "c", "view"]
    in_blocks = [[(choose.choice(names), choose.choice("rwn")) for _ in range(3)] for _ in range(6)]
    between = [(choose.choice(names), choose.choice("rw--")) for _ in range(6)]
    in_place = [choose.random() < 0.5 for _ in range(6)]

    def tensor_of(state: dict[str, Any], name: str) -> torch.Tensor:
        return state["deep"][0]["b"] if name == "b" else state[name]

    def act(number: int, x: torch.Tensor, state: dict[str, Any], a: torch.Tensor) -> torch.Tensor:
        for name, what in in_blocks[number]:
            tensor = a if name == "a" else tensor_of(state, name)
            if what == "w":
                tensor.mul_(0.75).add_(x.mean().sin())
            elif what == "n" and name == "c":
                state["c"] = x + tensor
            x = x + tensor.mean()
        if in_place[number]:
            x[:, number % 4] += 1
        return x

    def run(blocks: nn.ModuleList, x: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        kept = []
        for number, block in enumerate(blocks):
            kept.append(x)
            x = block(x, state, state["a"])
            name, what = between[number]
            if what == "w":
                tensor_of(state, name)[:, :2] -= x[:, :2]
            elif what == "r":
                x = x * tensor_of(state, name).mean().cos()
        return x + sum(kept)

    def make() -> dict[str, Any]:
        a = ramp(2, 4)
        return {"a": a, "view": a[:, 1:], "deep": [{"b": ramp(2, 4) * 3}], "c": ramp(2, 4) - 1}

    return act, run, make


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_any_program_gives_what_it_gives_on_one_device(split: str) -> None:
    for seed in SEEDS:
        check(*program(seed), split)
