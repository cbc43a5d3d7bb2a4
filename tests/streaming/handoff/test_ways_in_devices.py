"""Blocks that are entered by methods or by their layers alone, on several devices."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from counting_links import CountingLinks
from models import X, make_streamer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from ways_in import ByMethods, LayerByLayer, Stop, make, run
from weightstream.streaming.handoff.boundary import Boundary


def test_what_methods_are_given_and_give_crosses_between_devices() -> None:
    model, links = make(ByMethods), CountingLinks()
    expected = model(X)
    devices = [torch.device("cpu", index % 2) for index in range(6)]
    boundary = Boundary(devices[0], links)
    boundary.attach(model, list(zip(model.blocks, devices, strict=True)))
    for _ in range(2):
        assert torch.equal(model(X), expected)
    # In each step: to each of three blocks once, what both methods get, and home, what the second one gives.
    assert links.moves == 2 * (3 + 3)
    boundary.detach()
    assert not any("keys" in vars(block) for block in model.blocks)


def test_methods_stream_on_two_devices() -> None:
    model = make(ByMethods)
    expected = model(X)
    devices = [torch.device("cpu", index % 2) for index in range(6)]
    boundary = Boundary(devices[0], CountingLinks())
    streamer = make_streamer(model)
    for _ in range(3):
        streamer.load(streamer.plan_for(streamer.minimum_bytes))
        boundary.attach(model, list(zip(model.blocks, devices, strict=True)))
        for _ in range(3):
            assert torch.equal(run(streamer, model), expected)
        streamer.unload()
    boundary.detach()
    assert not any("keys" in vars(block) for block in model.blocks)


class Small(nn.Module):
    """A block on a device; whoever computes with its layers needs nothing else of it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8, device=device)
        self.mlp = nn.Sequential(nn.Linear(8, 16, device=device), nn.GELU(), nn.Linear(16, 8, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x)) * 0.5


class Spread(nn.Module):
    """Some blocks are called, of others the layers: ``whole`` has the numbers of the former."""

    def __init__(self, devices: list[torch.device], whole: set[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Small, devices))
        self.whole = whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x) if number in self.whole else x + block.mlp(block.norm(x)) * 0.5
        return x


def hooked(module: nn.Module) -> int:
    return sum(len(one._forward_pre_hooks) for one in module.modules())


@pytest.mark.parametrize("whole", [set(), {0, 3}, set(range(6))], ids=["none", "some", "all"])
def test_layers_of_blocks_that_nobody_enters_run_where_they_are(whole: set[int]) -> None:
    """On fake GPUs, where no operation mixes two; and what is watched for that is watched once."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        devices = [torch.device("cuda", index % 3) for index in range(6)]
        model, links = Spread(devices, whole), CountingLinks()
        links.is_sound = lambda source, target: True
        boundary = Boundary(devices[0], links)
        for _ in range(2):
            boundary.attach(model, list(zip(model.blocks, devices, strict=True)))
            for _ in range(3):
                output = model(torch.randn(2, 3, 8, device=devices[0]))
                assert output.device == devices[0]
                alone = [n for n, block in enumerate(model.blocks) if hooked(block) > 1]
                assert alone == [n for n in range(6) if n % 3 and n not in whole]
            boundary.detach()
        assert hooked(model) == 0


@pytest.mark.parametrize("error", [Stop, ValueError])
def test_an_error_in_a_layer_of_a_block_that_nobody_enters(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(LayerByLayer)
    expected, links = model(X), CountingLinks()
    devices = [torch.device("cpu", index % 2) for index in range(6)]
    boundary = Boundary(devices[0], links)
    boundary.attach(model, list(zip(model.blocks, devices, strict=True)))

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise error

    for layer in (model.blocks[3].mlp[1], model.blocks[1].out):
        with monkeypatch.context() as patch:
            patch.setattr(layer, "forward", fail)
            with pytest.raises(error):
                model(X)
        boundary.settle()
        before = links.moves
        assert torch.equal(model(X), expected)
        assert links.moves > before
    boundary.detach()


def test_a_model_that_is_compiled_is_watched_at_its_blocks_alone() -> None:
    model = make(LayerByLayer)
    boundary = Boundary(torch.device("cpu", 0), CountingLinks())
    boundary.attach(model, [(block, torch.device("cpu", 1)) for block in model.blocks], compiled=True)
    assert all(hooked(block) == 1 for block in model.blocks)
    boundary.detach()


# -- decisions -------------------------------------------------------------------------------------------------------
