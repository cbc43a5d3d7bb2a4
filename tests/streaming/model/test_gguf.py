"""Models from GGUF files, written and unpacked by the real package, on a virtual device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from models import Transformer, budgets, make_streamer, make_transformer
from packed import PackedTensor, WeightPatches, load_gguf, unpack, write_gguf
from torch import nn

pytestmark = pytest.mark.usefixtures("watched")

NAME = "blocks.1.qkv.weight"
WIDE = 256  # Kinds with a K in their name pack so many values at once.

Load = Callable[..., Transformer]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(kind: Kind, wrapped: bool = True) -> Transformer:
        width = WIDE if kind.name.endswith("K") else 32
        path = tmp_path / "model.gguf"
        if not path.exists():
            write_gguf(path, make_transformer(depth=3, width=width), kind)
        model = make_transformer(depth=3, width=width, seed=1)
        load_gguf(path, model, wrapped)
        return model

    return load


def input_of(model: Transformer) -> torch.Tensor:
    width = model.input.in_features
    return torch.linspace(-1, 1, 3 * width).reshape(1, 3, width)


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [True, False], ids=["parameters", "bare"])
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q5_1, Kind.Q4_0, Kind.BF16, Kind.Q4_K, Kind.Q6_K])
def test_packed_weights_stream_as_bytes(load: Load, kind: Kind, wrapped: bool) -> None:
    model = load(kind, wrapped)
    x = input_of(model)
    expected = model(x)
    original = model.blocks[1].qkv.weight
    streamer = make_streamer(model)
    assert original.tensor_type == kind
    assert sum(unit.nbytes for unit in streamer.blocks.units) < sum(
        value.numel() * 4 for value in make_transformer(depth=3, width=x.shape[-1]).blocks.parameters()
    )
    for budget in budgets(streamer):
        streamer.load(streamer.plan_for(budget))
        for _ in range(2):
            assert torch.equal(streamer.run(lambda: model(x)), expected)
    assert streamer.plan.segments
    assert streamer.counters.streamed_bytes > 0
    streamer.finish_building()
    assert torch.equal(streamer.run(lambda: model(x)), expected)
    bound = model.blocks[1].qkv.weight
    assert type(bound) is PackedTensor
    assert isinstance(bound, nn.Parameter) is wrapped
    assert (bound.tensor_type, bound.shape) == (kind, original.shape)
    assert torch.equal(unpack(bound), unpack(original)), "between steps a weight has its values"
    streamer.close()
    assert model.blocks[1].qkv.weight is original


@pytest.mark.parametrize("wrapped", [True, False], ids=["parameters", "bare"])
def test_patches_on_weights_come_and_go(load: Load, wrapped: bool) -> None:
    model, reference = load(Kind.Q4_0, wrapped), load(Kind.Q4_0, wrapped)
    x = input_of(model)
    plain = model(x)
    streamer = make_streamer(model)
    for budget in budgets(streamer):
        plan = streamer.plan_for(budget)
        for strength in (0.01, -0.005):
            patches = WeightPatches({NAME: torch.full((96, 32), strength)})
            reference.blocks[1].qkv.weight.patches = [(patches.changes[NAME], NAME)]
            expected = reference(x)
            assert not torch.equal(expected, plain)
            streamer.load(plan, patches)
            assert torch.equal(model(x), expected)
        streamer.load(plan)
        assert torch.equal(model(x), plain)
        assert model.blocks[1].qkv.weight.patches == []
    streamer.close()
