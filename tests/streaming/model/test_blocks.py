from __future__ import annotations

import pytest
import torch
from models import make_transformer
from torch import nn
from weightstream.streaming import UnsupportedModelError, cut_model, find_blocks


class Pair(nn.Module):
    """Two layers of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = nn.Linear(width, width)
        self.two = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


class Stage(nn.Module):
    """Mostly a list of layers, as a UNet's spatial transformers."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Pair(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x)
        return x


def names_of(**children: nn.Module) -> list[str]:
    root = nn.Module()
    for name, child in children.items():
        root.add_module(name, child)
    return [name for name, _ in find_blocks(root)]


def test_blocks_are_the_modules_in_lists_whatever_their_classes() -> None:
    model = make_transformer(depth=4)
    model.extra = nn.ModuleDict({"first": nn.Linear(2, 2), "second": Pair(2), "activation": nn.GELU()})
    names = [name for name, _ in find_blocks(model)]
    assert names == [f"blocks.{index}" for index in range(4)] + ["extra.first", "extra.second"]


def test_the_children_of_sequences_in_lists_are_blocks_since_they_may_be_called_one_by_one() -> None:
    lists = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Sequential(Pair(4), nn.ModuleList([Pair(4)]))])
    assert names_of(input_blocks=lists) == ["input_blocks.0.0", "input_blocks.1.0", "input_blocks.1.1.0"]


def test_a_sequence_outside_of_lists_has_blocks_but_no_single_layers() -> None:
    assert names_of(middle_block=nn.Sequential(Pair(4), nn.SiLU(), Pair(4))) == ["middle_block.0", "middle_block.2"]
    assert names_of(time_embed=nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))) == []


def test_what_cannot_be_called_is_no_block() -> None:
    space = nn.Module()
    space.block = Pair(4)
    parameters = nn.ParameterList([torch.zeros(4)])
    assert names_of(levels=nn.ModuleList([space, parameters])) == ["levels.0.block"]


def test_a_module_in_a_list_that_mostly_is_a_list_gives_its_layers() -> None:
    stages = nn.ModuleList([Stage(32, 1), Stage(32, 3)])
    assert names_of(stages=stages) == ["stages.0", "stages.1.layers.0", "stages.1.layers.1", "stages.1.layers.2"]


def test_a_module_in_a_list_with_much_besides_its_list_is_a_block() -> None:
    stage = Stage(32, 3)
    stage.attention = nn.Linear(64, 64)
    assert names_of(stages=nn.ModuleList([stage])) == ["stages.0"]


def test_a_model_without_lists_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no list of repeated blocks"):
        cut_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def test_blocks_that_are_small_beside_others_stay_on_the_device() -> None:
    model = make_transformer(depth=2)
    model.switches = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    split = cut_model(model)
    assert [block.name for block in split.blocks] == ["blocks.0", "blocks.1"]
    assert "switches.0.weight" in {spec.name for spec in split.rest.layout.specs}


def test_every_tensor_has_one_owner() -> None:
    model = make_transformer(depth=3)
    split = cut_model(model)
    assert sorted(spec.name for spec in split.specs) == sorted(model.state_dict())
    of_the_rest = {spec.name for spec in split.rest.layout.specs}
    assert {"input.weight", "input.bias", "output.weight", "output.bias"} <= of_the_rest


def test_units_are_the_modules_that_hold_tensors_and_small_ones_stay_on_the_device() -> None:
    model = make_transformer(depth=2)
    split = cut_model(model)
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
    units = {unit.name: unit.module for unit in cut_model(model).units}
    assert units["blocks.0.mlp.0"] is None
    assert units["blocks.1.mlp.0"] is model.blocks[1].mlp[0]


def test_blocks_of_one_class_and_size_are_of_one_kind() -> None:
    model = make_transformer(depth=3)
    model.blocks[1].out = nn.Linear(32, 32, bias=False)
    assert cut_model(model).outline.block_kind == (0, 1, 0)


def test_a_tensor_tied_between_blocks_belongs_to_the_rest() -> None:
    model = make_transformer(depth=3)
    model.blocks[2].qkv.weight = model.blocks[0].qkv.weight
    split = cut_model(model)
    tied = [value for value in split.rest.layout.values if value.name == "blocks.0.qkv.weight"]
    assert len(tied) == 1
    assert len(tied[0].places) == 2


def test_a_module_of_two_blocks_or_of_one_and_others_belongs_to_the_rest() -> None:
    model = make_transformer(depth=3)
    model.blocks[2].qkv = model.blocks[0].qkv
    model.also_called = model.blocks[1].out
    split = cut_model(model)
    of_the_rest = {spec.name for spec in split.rest.layout.specs}
    assert {"blocks.0.qkv.weight", "blocks.1.out.weight"} <= of_the_rest
    assert not {"blocks.0.qkv", "blocks.2.qkv", "blocks.1.out"} & {unit.name for unit in split.units}


def test_a_model_mostly_outside_of_blocks_is_refused() -> None:
    model = make_transformer(depth=2, width=8)
    model.huge = nn.Linear(200, 200)
    with pytest.raises(UnsupportedModelError, match=r"only \d+% of its bytes"):
        cut_model(model)


def test_sparse_tensors_are_refused_by_name() -> None:
    model = make_transformer(depth=2)
    model.blocks[1].register_buffer("mask", torch.eye(4).to_sparse())
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.mask"):
        cut_model(model)


def test_tensors_without_memory_or_a_protocol_are_refused_by_name() -> None:
    class Packed(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, *args: object) -> None:
            raise NotImplementedError

    model = make_transformer(depth=2)
    model.blocks[1]._buffers["packed"] = torch.Tensor._make_wrapper_subclass(Packed, (4,))
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.packed is a Packed"):
        cut_model(model)
