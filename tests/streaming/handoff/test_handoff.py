"""Blocks on other devices: on virtual ones what they compute, on fake GPUs that no operation mixes two."""

from __future__ import annotations

import contextlib
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from weightstream.streaming.handoff.away import Away
from weightstream.streaming.handoff.boundary import Boundary
from weightstream.streaming.split.links import Links


class CountingLinks(Links):
    def __init__(self) -> None:
        super().__init__()
        self.to: list[str] = []

    def move(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.to.append(f"{tuple(tensor.shape)} to {device}")
        return super().move(tensor, device)


class Pair(NamedTuple):
    cos: torch.Tensor
    sin: torch.Tensor


class Block(nn.Module):
    """Takes tensors in all kinds of containers, and writes to some."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, device=device)
        self.seen: list[torch.device] = []

    def forward(self, x: torch.Tensor, pair: Pair, *, options: dict[str, Any], mask: Any = None) -> Any:
        self.seen = [t.device for t in (x, pair.cos, options["tables"][0], *(() if mask is None else (mask,)))]
        x = x + self.linear(x * pair.cos + pair.sin) * options["tables"][0]
        options["tables"].append(x.mean(-1, keepdim=True))
        options["last"] = {"x": x[:1]}
        return x, (pair.sin, [x * 0.5])


class Model(nn.Module):
    """``between``: after which block the model itself computes something."""

    def __init__(self, between: int = 3, devices: Sequence[torch.device] = (torch.device("cpu"),) * 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8, device) for device in devices)
        self.between = between

    def forward(self, x: torch.Tensor, skip: int = -1) -> torch.Tensor:
        pair = Pair(torch.cos(x), torch.sin(x))
        options: dict[str, Any] = OrderedDict(tables=[torch.ones_like(x[:, :1])], empty=[], name="a")
        tables = options["tables"]
        mask = torch.zeros_like(x)
        for number, block in enumerate(self.blocks):
            if number == skip:
                continue
            x, (_, others) = block(x, pair, options=options, mask=mask)
            if number == self.between:
                x = x + others[0]
                x[:, 1:] += 0.25
        assert options["tables"] is tables
        assert len(tables) == 1 + len(self.blocks) - (skip >= 0)
        return x + sum(tables) + options["last"]["x"]


def split(model: Model, devices: list[torch.device]) -> tuple[Boundary, CountingLinks]:
    links = CountingLinks()
    boundary = Boundary(devices[0], links)
    boundary.attach(model, list(zip(model.blocks, devices, strict=True)))
    return boundary, links


@pytest.fixture(params=[False, True], ids=["", "inference mode"], autouse=True)
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.inference_mode(request.param):
        yield


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
SPLITS = {
    "one": [0, 0, 0, 0, 0, 0],
    "runs": [0, 0, 0, 1, 1, 1],
    "three runs": [0, 0, 1, 1, 2, 2],
    "in turn": [0, 1, 0, 1, 0, 1],
    "three in turn": [0, 1, 2, 0, 1, 2],
}


@pytest.mark.parametrize("between", [-1, 0, 3, 5])
@pytest.mark.parametrize("runs", SPLITS)
def test_what_is_computed_is_the_same(runs: str, between: int) -> None:
    torch.manual_seed(4)
    model = Model(between)
    expected = model(X)
    boundary, _ = split(model, [torch.device("cpu", index) for index in SPLITS[runs]])
    for _ in range(2):
        output = model(X)
        assert type(output) is torch.Tensor
        assert torch.equal(output, expected)
    assert torch.equal(model(X, skip=4), model(X, skip=4))
    boundary.detach()
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("runs", SPLITS)
def test_no_operation_mixes_devices(runs: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=False):
        devices = [torch.device("cuda", index) for index in SPLITS[runs]]
        model = Model(devices=devices)
        boundary, links = split(model, devices)
        links.is_sound = lambda source, target: True
        output = model(torch.randn(4, 8, device=devices[0]))
        assert output.device == devices[0]
        assert [{*block.seen} for block in model.blocks] == [{device} for device in devices]
        boundary.detach()


def test_what_several_blocks_get_moves_once_and_what_goes_on_stays() -> None:
    model = Model(between=-1)
    here, there = torch.device("cpu", 0), torch.device("cpu", 1)
    _, links = split(model, [here, here, there, there, there, there])
    model(X)
    into = [move for move in links.to if move.endswith("cpu:1")]
    assert len(into) == 5, "x; cos, sin and mask; of the tables the one that blocks read"
    assert len(links.to) - len(into) == 6, "x, four tables, and what the last block has left of x"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_block_leaves_arguments_as_they_were(error: type[BaseException]) -> None:
    here, there = torch.device("cpu", 0), torch.device("cpu", 1)
    model = Model()
    expected = model(X)
    boundary, _ = split(model, [here, there, here, there, here, there])

    def fail(*_: object) -> None:
        raise error

    handle = model.blocks[3].linear.register_forward_pre_hook(fail)
    options = {"tables": [torch.ones(4, 1)]}
    first = options["tables"][0]
    with pytest.raises(error):
        model.blocks[3](X, Pair(X, X), options=options)
    boundary.settle()
    assert options["tables"][0] is first
    with pytest.raises(error):
        model(X)
    handle.remove()
    assert torch.equal(model(X), expected)


def test_a_boundary_that_is_gone_moves_nothing() -> None:
    model = Model()
    expected = model(X)
    boundary, links = split(model, [torch.device("cpu", index % 2) for index in range(6)])
    del boundary
    gc.collect()
    assert torch.equal(model(X), expected)
    assert links.to == []


def test_what_a_block_gives_is_away_until_somebody_looks() -> None:
    model = Model()
    boundary, links = split(model, [torch.device("cpu", 0), *[torch.device("cpu", 1)] * 5])
    x, (sin, others) = model.blocks[1](X, Pair(X, X), options={"tables": [X[:, :1]]})
    assert {type(x), type(sin), type(others[0])} == {Away}
    before = len(links.to)
    assert x.shape == X.shape
    assert len(links.to) == before
    boundary.detach()


# -- what is in objects ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Modulation:
    shift: torch.Tensor
    scale: torch.Tensor
    name: str = "both"


class Slots:
    __slots__ = ("data", "size")

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.size = data, data.size(0)


class Modulated(nn.Module):
    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, device=device)

    def forward(self, x: torch.Tensor, modulations: tuple[Modulation, None], slots: Slots) -> tuple[Any, ...]:
        modulation = modulations[0]
        x = self.linear(x * modulation.scale + modulation.shift) * slots.data
        slots.data = x + slots.size
        return x, Modulation(x, x * 2)


def modulate(device: torch.device | None = None, links: Links | None = None) -> list[torch.Tensor]:
    torch.manual_seed(4)
    home = torch.device("cpu", 0) if device is None or device.type == "cpu" else torch.device("cuda", 0)
    block = Modulated(None if links is None else device)
    x = torch.randn(4, 8, device=None if links is None else home)
    modulation, slots = Modulation(x.cos(), x.sin()), Slots(x * 3)
    shift = modulation.shift
    if links is not None:
        boundary = Boundary(home, links)
        boundary.attach(nn.ModuleList([block]), [(block, device)])
    x, given = block(x, (modulation, None), slots)
    assert modulation.shift is shift
    return [x + 1, given.scale + slots.data + modulation.scale]


def test_objects_hold_what_is_there_while_a_block_runs() -> None:
    expected = modulate()
    links = CountingLinks()
    assert all(map(torch.equal, modulate(torch.device("cpu", 1), links), expected))
    assert [move for move in links.to if "cpu:1" in move] == ["(4, 8) to cpu:1"] * 4, (
        "x; shift and scale; what is in slots"
    )


def test_objects_of_fake_gpus() -> None:
    with FakeTensorMode():
        links = CountingLinks()
        links.is_sound = lambda source, target: True
        assert {tensor.device.index for tensor in modulate(torch.device("cuda", 1), links)} == {0}


class Cache:
    """Keeps what a block has computed for those after it, functions among it."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def __call__(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


class Cached(nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, device=device)

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        x = self.linear(x)
        gather, both = cache("functions", lambda: self.functions(x))
        assert cache("self", lambda: both) is both
        return gather(both(x)) + cache("mean", lambda: x.mean(-1, keepdim=True))

    def functions(self, x: torch.Tensor) -> tuple[Callable, Callable]:
        order, scale = x[:, 0].argsort(), [x.cos()]

        def scaled(y: torch.Tensor) -> torch.Tensor:
            return y * scale[0] if y.dim() > 1 else scaled(y[None])

        return lambda y: y[order], lambda y: scaled(y) + scale[0]


class CachedModel(nn.Module):
    def __init__(self, devices: Sequence[torch.device]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Cached(device) for device in devices)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cache = Cache()
        for block in self.blocks:
            x = block(x, cache)
        gather, _ = cache.kept["functions"]
        return gather(x)


@pytest.mark.parametrize("runs", SPLITS)
def test_what_a_cache_and_its_functions_keep_is_where_a_block_is(runs: str) -> None:
    torch.manual_seed(6)
    devices = [torch.device("cpu", index) for index in SPLITS[runs]]
    model = CachedModel(devices)
    expected = model(X)
    split(model, devices)
    assert torch.equal(model(X), expected)
    with FakeTensorMode(allow_non_fake_inputs=False):
        devices = [torch.device("cuda", index) for index in SPLITS[runs]]
        model = CachedModel(devices)
        _, links = split(model, devices)
        links.is_sound = lambda source, target: True
        assert model(torch.randn(4, 8, device=devices[0])).device == devices[0]


def test_objects_in_dictionaries_are_left_alone() -> None:
    home, there = torch.device("cpu", 0), torch.device("cpu", 1)
    links = CountingLinks()
    boundary, block = Boundary(home, links), nn.Identity()
    boundary.attach(nn.ModuleList([block]), [(block, there)])
    block({"state": Slots(X), "function": lambda: X})
    assert links.to == []


# -- functions that blocks call ----------------------------------------------------------------------------------------


class Patched(nn.Module):
    """Calls what it finds among its options, as models of the field do."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, device=device)
        self.device: torch.device | None = None

    def forward(self, x: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        x = self.linear(x)
        for kind, patch in options["patches"]["attention"]:
            assert isinstance(kind, type)
            out = patch(x, {"k": x, "options": options}, scale=x[:, :1])
            x = out.get("x", x) * out["scale"]
            self.device = x.device
        return options["replace"](x) + options["left"]


class Patch:
    """Has a tensor of its own, and treats what it gets in many ways."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.devices: set[torch.device] = set()

    def __call__(self, x: torch.Tensor, more: dict[str, Any], scale: torch.Tensor) -> dict[str, Any]:
        assert more["k"] is x
        self.devices |= {x.device, scale.device}
        x[:, 1:] += self.tensor[:, 1:]
        more["options"]["left"] = x + self.tensor
        return {"scale": scale, "mask": None}


class PatchedModel(nn.Module):
    def __init__(self, devices: Sequence[torch.device | None]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Patched(device) for device in devices)

    def forward(self, x: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, options)
        return x + options.pop("left")


def patched(devices: Sequence[torch.device | None], home: torch.device | None = None) -> tuple[torch.Tensor, Patch]:
    torch.manual_seed(5)
    model = PatchedModel(devices)
    x, patch = torch.randn(4, 8, device=home), Patch(torch.randn(4, 8, device=home))
    attention, replace = [(Patched, patch), (Patched, patch)], torch.nn.functional.silu
    options = {"patches": {"attention": attention}, "replace": replace}
    if home is not None:
        links = CountingLinks()
        links.is_sound = lambda source, target: True
        boundary = Boundary(home, links, ["patches"])
        boundary.attach(model, list(zip(model.blocks, devices, strict=True)))
    output = model(x, options)
    assert attention == [(Patched, patch)] * 2
    assert options == {"patches": {"attention": attention}, "replace": replace}
    if home is not None:
        assert [block.device for block in model.blocks if home.type != "cpu"] == [
            d for d in devices if home.type != "cpu"
        ]
    return output, patch


@pytest.mark.parametrize("runs", SPLITS)
def test_what_functions_at_home_do_is_done(runs: str) -> None:
    """They write to what they get, and to options."""
    devices = [torch.device("cpu", index) for index in SPLITS[runs]]
    expected, _ = patched([None] * 6)
    assert torch.equal(patched(devices, devices[0])[0], expected)


@pytest.mark.parametrize("runs", SPLITS)
def test_functions_run_at_home(runs: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=False):
        devices = [torch.device("cuda", index) for index in SPLITS[runs]]
        output, patch = patched(devices, devices[0])
        assert patch.devices == {output.device} == {devices[0]}


def test_functions_by_other_names_run_where_blocks_do() -> None:
    """What a model computes attention with, say."""
    home, there = torch.device("cpu", 0), torch.device("cpu", 1)
    links = CountingLinks()
    boundary, block = Boundary(home, links, ["patches"]), Patched()
    boundary.attach(nn.ModuleList([block]), [(block, there)])
    seen = []
    block(X, {"patches": {"attention": []}, "replace": lambda x: seen.append(x) or x, "left": 0})
    assert [type(x) for x in seen] == [torch.Tensor]
    assert links.to == ["(4, 8) to cpu:1"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_function_leaves_options_as_they_were(error: type[BaseException]) -> None:
    home, there = torch.device("cpu", 0), torch.device("cpu", 1)
    boundary, block = Boundary(home, Links(), ["patches"]), Patched()
    boundary.attach(nn.ModuleList([block]), [(block, there)])

    def fail(*_: object, **__: object) -> None:
        raise error

    attention = [(Patched, fail)]
    options = {"patches": {"attention": attention}, "replace": torch.relu, "left": X}
    with pytest.raises(error):
        block(X, options)
    boundary.settle()
    assert attention == [(Patched, fail)]
    assert options == {"patches": {"attention": attention}, "replace": torch.relu, "left": X}


class Current:
    """Stands for the device that is current."""

    index = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.before, Current.index = Current.index, self.device.index

    def __exit__(self, *_: object) -> None:
        Current.index = self.before


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_device_that_was_current_is_so_again(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(Current, "index", 0)
    seen = []

    class Fails(nn.Module):
        def forward(self) -> int:
            seen.append(Current.index)
            if error is not None:
                raise error
            return 1

    root = nn.Sequential(Fails())
    root.forward = lambda: root[0]()
    boundary = Boundary(torch.device("cuda", 0), Links())
    boundary.attach(root, [(root[0], torch.device("cuda", 1))])
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        root()
    boundary.settle()  # As who runs steps does: of an interrupt torch tells no hook.
    assert (seen, Current.index) == ([1], 0)
