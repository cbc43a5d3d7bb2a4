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
    assert sorted(spec.name for spec in split.specs) == sorted(model.state_dict())
    of_the_rest = {spec.name for spec in split.rest.layout.specs}
    assert {"input.weight", "input.bias", "output.weight", "output.bias"} <= of_the_rest


def test_units_are_the_modules_that_hold_tensors_and_small_ones_stay_on_the_device() -> None:
    model = make_transformer(depth=2)
    split = split_model(model)
    names = ("norm", "qkv", "out", "mlp.0", "mlp.2")
    assert [unit.name for unit in split.units] == [f"blocks.{block}.{name}" for block in range(2) for name in names]
    assert [unit.index for unit in split.units] == list(range(10))
    assert [unit.block for unit in split.units] == [0] * 5 + [1] * 5
    # 128 of 33,000 bytes: no copy is made for that.
    assert "blocks.0.scale" in {spec.name for spec in split.rest.layout.specs}
    assert split.outline.block_kind == (0, 0)


def test_a_unit_with_a_tensor_of_another_module_of_its_block_has_no_module_of_its_own() -> None:
    model = make_transformer(depth=2)
    model.blocks[0].mlp[2].weight = nn.Parameter(model.blocks[0].mlp[0].weight.T)
    model.blocks[0].extra = nn.Linear(32, 64)
    model.blocks[0].extra.weight = model.blocks[0].mlp[0].weight
    units = {unit.name: unit.module for unit in split_model(model).units}
    assert units["blocks.0.mlp.0"] is None
    assert units["blocks.1.mlp.0"] is model.blocks[1].mlp[0]


def test_blocks_of_one_class_and_size_are_of_one_kind() -> None:
    model = make_transformer(depth=3)
    model.blocks[1].out = nn.Linear(32, 32, bias=False)
    assert split_model(model).outline.block_kind == (0, 1, 0)


def test_a_tensor_tied_between_blocks_belongs_to_the_rest() -> None:
    model = make_transformer(depth=3)
    model.blocks[2].qkv.weight = model.blocks[0].qkv.weight
    split = split_model(model)
    tied = [value for value in split.rest.layout.values if value.name == "blocks.0.qkv.weight"]
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


def test_tensors_without_memory_or_a_protocol_are_refused_by_name() -> None:
    class Packed(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, *args: object) -> None:
            raise NotImplementedError

    model = make_transformer(depth=2)
    model.blocks[1]._buffers["packed"] = torch.Tensor._make_wrapper_subclass(Packed, (4,))
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.packed is a Packed"):
        split_model(model)
