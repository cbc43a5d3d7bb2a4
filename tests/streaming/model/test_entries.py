"""Who is told that a module is entered: by its call, and by any other method of it."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from weightstream.streaming.model.entries import Entries, Method, entry_methods, is_ours


class Stop(BaseException):
    """Like the host's interrupt: no ``Exception``."""


class Base(nn.Module):
    def inherited(self, x: Any) -> Any:
        return self.layer(x) + 2


class Block(Base):
    """Entered by its call, or by methods, some of which call one another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("seen", None)

    def forward(self, x: Any) -> Any:
        return self._attend(x) + 1

    def _attend(self, x: Any) -> Any:
        return self.layer(x)

    def by_method(self, x: Any, *, times: int = 1) -> Any:
        return self._attend(x) * times

    def by_call(self, x: Any) -> Any:
        return self(x) + self._attend(x)

    def nothing(self) -> None:
        """Gives nothing."""

    def fail(self, error: BaseException) -> None:
        raise error

    def later(self) -> Iterator[int]:
        yield 1

    async def much_later(self) -> None:
        """Runs when somebody waits for it."""

    @property
    def width(self) -> int:
        return 4

    @staticmethod
    def standing(x: Any) -> Any:
        return x

    @classmethod
    def of_class(cls) -> str:
        return cls.__name__

    def __len__(self) -> int:
        return 4

    def extra_repr(self) -> str:
        return "small"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor, by_method: bool) -> torch.Tensor:
        for block in self.blocks:
            x = block.by_method(x, times=2) if by_method else block(x)
        return x


class Told:
    """What was told, and changes for arguments and output."""

    def __init__(
        self,
        before: Callable[[tuple, dict], Any] = lambda args, kwargs: None,
        after: Callable[[Any], Any] = lambda _: None,
    ) -> None:
        self.events: list[str] = []
        self._before, self._after = before, after

    def begins(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.events.append("in")
        return self._before(args, kwargs)

    def ends(self, module: nn.Module, args: object, output: Any) -> Any:
        self.events.append("failed" if output is None else "out")
        return self._after(output)

    def take(self) -> list[str]:
        taken, self.events = self.events, []
        return taken


ONCE = ["in", "out"]
X = torch.linspace(-1, 1, 8).reshape(2, 4)


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block().requires_grad_(False)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def entries(block: Block, told: Told) -> Entries:
    entries = Entries()
    entries.watch(block, told.begins, told.ends)
    return entries


def test_methods_of_the_class_are_entries_and_nothing_else() -> None:
    expected = {"_attend", "by_method", "by_call", "nothing", "fail", "inherited"}
    assert set(entry_methods(Block)) == expected
    assert entry_methods(nn.Module) == ()


@pytest.mark.usefixtures("entries")
def test_every_way_in_is_told_once_and_gives_what_it_gives(block: Block, told: Told) -> None:
    plain = Block().requires_grad_(False)
    plain.load_state_dict(block.state_dict())
    ways = {
        "call": lambda one: one(X),
        "method": lambda one: one.by_method(X, times=3),
        "private": lambda one: one._attend(X),
        "inherited": lambda one: one.inherited(X),
        "a method that calls the module": lambda one: one.by_call(X),
    }
    for name, way in ways.items():
        assert torch.equal(way(block), way(plain)), name
        assert told.take() == ONCE, name
    assert block.nothing() is None
    assert told.take() == ONCE


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize("error", [ValueError, Stop])
@pytest.mark.parametrize("way", ["method", "call"])
def test_an_error_leaves_no_entry_behind(
    block: Block, told: Told, entries: Entries, error: type[BaseException], way: str
) -> None:
    if way == "call":
        block._attend = lambda x: block.fail(error())
    with pytest.raises(error):
        block.fail(error()) if way == "method" else block(X)
    assert told.take() == (["in", "failed"] if error is ValueError else ["in"])
    if error is Stop:
        entries.settle()
    if way == "call":
        del block._attend
    block.by_method(X)
    block(X)
    assert told.take() == ONCE * 2


@pytest.mark.usefixtures("entries")
def test_an_interrupt_of_a_method_needs_no_settling(block: Block, told: Told) -> None:
    with pytest.raises(Stop):
        block.fail(Stop())
    told.take()
    block(X)
    assert told.take() == ONCE


def test_who_is_not_told_of_failures_is_told_of_what_comes_next(block: Block, told: Told) -> None:
    Entries().watch(block, told.begins, told.ends, always_ends=False)
    with pytest.raises(ValueError):  # noqa: PT011
        block.fail(ValueError())
    block.nothing()
    assert told.take() == ["in", *ONCE]


@pytest.mark.parametrize("way", ["method", "call"])
def test_arguments_and_outputs_may_be_exchanged(block: Block, way: str) -> None:
    expected = block.by_method(X * 2, times=2) if way == "method" else block(X * 2)
    told = Told(lambda args, kwargs: ((args[0] * 2,), dict.fromkeys(kwargs, 2)), lambda output: output * 10)
    entries = Entries()
    entries.watch(block, told.begins, told.ends)
    assert torch.equal(block.by_method(X, times=7) if way == "method" else block(X), expected * 10)


@pytest.mark.parametrize("bound", [True, False])
def test_what_somebody_has_put_in_place_of_a_method_is_called(block: Block, told: Told, bound: bool) -> None:
    function = (lambda self, x: self.layer(x) * 5).__get__(block) if bound else (lambda x: block.layer(x) * 5)
    block.by_method = function
    entries = Entries()
    entries.watch(block, told.begins, told.ends)
    assert torch.equal(block.by_method(X), block.layer(X) * 5)
    assert told.take() == ONCE
    assert block.by_method.instead_of is function
    entries.remove()
    assert vars(block)["by_method"] is function


def test_what_somebody_puts_there_meanwhile_stays(block: Block, told: Told, entries: Entries) -> None:
    """It calls what it has found there, which is ours; and later that is put back."""
    found = block.by_method
    block.by_method = lambda x: found(x) + 1
    expected = block.layer(X) + 1
    assert torch.equal(block.by_method(X), expected)
    assert told.take() == ONCE
    entries.remove()
    assert torch.equal(block.by_method(X), expected)
    again = Entries()
    again.watch(block, told.begins, told.ends)
    assert torch.equal(block.by_method(X), expected)
    assert told.take() == ONCE
    again.remove()
    block.by_method = found
    assert torch.equal(block.by_method(X), block.layer(X))
    assert told.take() == []
    again.watch(block, told.begins, told.ends)
    block.by_method(X)
    assert told.take() == ONCE
    again.remove()
    assert "by_method" not in vars(block)


def test_a_class_that_is_changed_meanwhile_counts(
    block: Block, told: Told, entries: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Block, "_attend", lambda self, x: x)
    assert torch.equal(block.by_method(X), X)
    assert told.take() == ONCE


def test_nothing_is_left_when_it_is_taken_off(block: Block, told: Told) -> None:
    before = dict(vars(block))
    entries = Entries()
    entries.watch(block, told.begins, told.ends)
    kept = block.by_method
    entries.remove()
    assert vars(block) == before
    kept(X)
    block(X)
    assert told.take() == []


@pytest.mark.parametrize("first", [0, 1])
def test_two_that_are_told_come_and_go_in_any_order(block: Block, first: int) -> None:
    told = [Told(), Told()]
    entries = [Entries(), Entries()]
    for each, one in zip(entries, told, strict=True):
        each.watch(block, one.begins, one.ends)
    for _ in range(20):
        for number in (first, 1 - first):
            entries[number].remove()
            block.by_method(X)
            assert [one.take() for one in told] == ([ONCE, []] if number == 1 else [[], ONCE])
            entries[number].watch(block, told[number].begins, told[number].ends)
            block.by_method(X)
            assert [one.take() for one in told] == [ONCE, ONCE]
    depth, one = 0, vars(block)["by_method"]
    while isinstance(one, Method):
        depth, one = depth + 1, one._beneath
    assert depth <= 4, "those that were taken off pile up"
    for each in entries:
        each.remove()
    block.by_method(X)
    assert [one.take() for one in told] == [[], []]


@pytest.mark.parametrize("by_method", [False, True])
@pytest.mark.parametrize("others", [1, 2])
def test_the_outermost_is_told_first_and_last_of_an_entry_whoever_comes_later(
    block: Block, others: int, by_method: bool
) -> None:
    order: list[str] = []
    expected = block.by_method(X) if by_method else block(X)

    def watch(name: str, entries: Entries) -> None:
        told = Told(lambda *_: order.append(f"{name} in"), lambda _: order.append(f"{name} out"))
        entries.watch(block, told.begins, told.ends)

    def run() -> list[str]:
        order.clear()
        assert torch.equal(block.by_method(X) if by_method else block(X), expected)
        return order

    outer, inner = Entries(outermost=True), [Entries() for _ in range(others)]
    watch("outer", outer)
    for _ in range(3):
        for number, each in enumerate(inner):
            each.remove()
            watch(str(number), each)
        run()
        assert (order[0], order[-1], len(order)) == ("outer in", "outer out", 2 + 2 * others)
    outer.remove()
    assert len(run()) == 2 * others
    for each in inner:
        each.remove()
    assert run() == []
    assert "by_method" not in vars(block)


@dataclass
class Unhashable:
    """A hook as other packs may have it: as it can be compared, it has no hash."""

    calls: int = 0

    def __call__(self, *_: object) -> None:
        self.calls += 1


def test_hooks_of_other_code_need_no_hash(block: Block, told: Told, entries: Entries) -> None:
    hooks = Unhashable(), Unhashable()
    block.register_forward_pre_hook(hooks[0])
    block.register_forward_hook(hooks[1])
    more = Entries()
    more.watch(block, told.begins, told.ends)
    block(X)
    assert told.take() == ["in", "in", "out", "out"]
    assert [hook.calls for hook in hooks] == [1, 1]
    assert not is_ours(hooks[0])


def test_it_looks_like_a_method(block: Block, entries: Entries) -> None:
    ours, plain = block.by_method, Block().by_method
    assert ours.__self__ is block
    assert ours.__func__ is plain.__func__
    assert ours.__name__ == "by_method"
    assert inspect.signature(ours) == inspect.signature(plain)


def test_a_copy_of_the_module_is_one_of_its_own(block: Block, told: Told, entries: Entries) -> None:
    twin = copy.deepcopy(block)
    twin.layer.weight.zero_()
    twin.layer.bias.zero_()
    told.take()
    assert twin.by_method(X).abs().sum() == 0
    assert told.take() == []
    assert twin.by_method.__self__ is twin


def test_a_module_that_is_watched_is_freed_with_its_last_reference(told: Told) -> None:
    block = Block()
    entries = Entries()
    entries.watch(block, told.begins, told.ends)
    gone, method = weakref.ref(block), block.by_method
    gc.disable()
    try:
        del block
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="by_method"):
        method(X)
    entries.remove()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("by_method", [False, True])
def test_methods_are_hidden_from_the_compiler(by_method: bool) -> None:
    """Blocks of one class are one graph, and methods that they call themselves cut nothing."""
    model, told = Model().requires_grad_(False), Told()
    expected = model(X, by_method)
    compiled = torch.compile(model, backend="eager")
    for _ in range(10):
        entries = Entries()
        for block in model.blocks:
            entries.watch(block, told.begins, told.ends)
        assert torch.equal(compiled(X, by_method), expected)
        assert told.take() == ONCE * 3
        entries.remove()
    assert torch.equal(compiled(X, by_method), expected)
    assert told.take() == []
    assert graphs() <= 2


class Giving(Block):
    """Its methods give weights of its own, and what is not."""

    def weight(self) -> Any:
        return self.layer.weight

    def view(self) -> Any:
        return self.layer.weight.mT[1:]

    def several(self) -> Any:
        return (self.layer.bias, [self.layer.weight[0], 3], {"bias": self.layer.bias})

    def other(self, x: Any) -> Any:
        return [x, (x,)]


def test_weights_that_a_method_gives_are_copies() -> None:
    """They may be on the device only until the module is left."""
    block, entries = Giving().requires_grad_(False), Entries()
    plain = block.weight(), block.view(), *block.several()
    entries.watch(block, lambda *_: None, lambda *_: None)
    given = block.weight(), block.view(), *block.several()
    block.layer.weight.data.zero_()
    block.layer.bias.data.zero_()
    assert given[0].data_ptr() != block.layer.weight.data_ptr()
    assert given[0].abs().sum() > 0
    assert torch.equal(given[0].mT[1:], given[1])
    assert torch.equal(given[3][0], given[0][0])
    assert given[2].abs().sum() > 0
    assert given[3][1] == 3
    assert torch.equal(given[4]["bias"], given[2])
    assert plain[0].abs().sum() == 0
    x = torch.ones(2)
    found = block.other(x)
    assert found[0] is x
    assert found[1][0] is x
    entries.remove()
    assert block.weight() is block.layer.weight


def test_a_method_in_whose_place_is_something_else_is_left_alone() -> None:
    block, entries = Block(), Entries()
    block.by_method = None
    entries.watch(block, lambda *_: None, lambda *_: None)
    assert block.by_method is None
    entries.remove()
    assert block.by_method is None
