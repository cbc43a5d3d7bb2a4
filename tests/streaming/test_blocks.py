from __future__ import annotations

import pytest
import torch
from models import make_transformer
from torch import nn
from weightstream.streaming import UnsupportedModelError, find_blocks, split_model


def test_blocks_are_the_outermost_lists_of_like_layers() -> None:
    model = make_transformer(depth=4)
    model.extra = nn.ModuleList(
        [nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(2))}), nn.Identity()]
    )
    names = [name for name, _ in find_blocks(model)]
    assert names == [f"blocks.{index}" for index in range(4)] + ["extra.0.layers.0", "extra.0.layers.1"]


def test_containers_single_layers_mixed_and_empty_lists_are_no_blocks() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.ModuleList([nn.Linear(4, 4)])
            self.mixed = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
            self.containers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))])
            self.empty = nn.ModuleList([nn.GELU(), nn.GELU()])
            layer = nn.Linear(4, 4)
            self.same = nn.ModuleList([layer, layer])

    assert find_blocks(Model()) == []
    with pytest.raises(UnsupportedModelError, match="no list of repeated blocks"):
        split_model(Model())


def test_every_tensor_has_one_owner() -> None:
    model = make_transformer(depth=3)
    split = split_model(model)
    names = [spec.name for block in (*split.blocks, split.rest) for spec in block.layout.specs]
    assert sorted(names) == sorted(model.state_dict())
    assert [spec.name for spec in split.rest.layout.specs] == [
        "input.weight", "input.bias", "output.weight", "output.bias"
    ]  # fmt: skip


def test_a_tensor_tied_between_blocks_belongs_to_the_rest() -> None:
    model = make_transformer(depth=3)
    model.blocks[2].qkv.weight = model.blocks[0].qkv.weight
    split = split_model(model)
    tied = [spec for spec in split.rest.layout.specs if spec.name == "blocks.0.qkv.weight"]
    assert len(tied) == 1
    assert len(tied[0].places) == 2


def test_a_model_mostly_outside_of_blocks_is_refused() -> None:
    model = make_transformer(depth=2, width=8)
    model.huge = nn.Linear(200, 200)
    with pytest.raises(UnsupportedModelError, match=r"only \d+% of its bytes"):
        split_model(model)


def test_sparse_tensors_are_refused_by_name() -> None:
    model = make_transformer(depth=2)
    model.blocks[1].register_buffer("mask", torch.eye(4).to_sparse())
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.mask"):
        split_model(model)


def test_tensor_subclasses_are_refused_by_name() -> None:
    class Packed(torch.Tensor):
        pass

    model = make_transformer(depth=2)
    model.blocks[1].register_buffer("packed", torch.zeros(4).as_subclass(Packed))
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.packed is a Packed"):
        split_model(model)
