"""What modules hold while no copy is bound, and how writes to it are noticed."""

from __future__ import annotations

import copy
import ctypes
import io
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weightstream.streaming import Checkpoint
from weightstream.streaming.files import checkpoint_file
from weightstream.streaming.model.layout import NamedTensor, Place, Value, make_layout
from weightstream.streaming.model.shown import StandIn, laid_out, shown

NAMES = ("weight", "bias")


def written(path: Path, dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    tensors = {"weight": torch.randn(8, 4, generator=generator), "bias": torch.randn(8, generator=generator)}
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
    return Checkpoint.open(path)


def layer_of(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[nn.Linear, tuple[Value, ...]]:
    """A layer with the weights of a file, which it shows in ``dtype``."""
    layer = nn.Linear(4, 8)
    tensors = checkpoint.state_dict()
    places = [Place(layer._parameters, name, True) for name in NAMES]
    values = make_layout(
        NamedTensor((place.attribute,), tensors[place.attribute], dtype, (place,), checkpoint.locate)
        for place in places
    ).values
    for place, value in zip(places, values, strict=True):
        place.holder[place.attribute] = shown(value)
    return layer, values


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return written(tmp_path / "layer.safetensors")


def test_a_stand_in_tells_shape_and_dtype_without_values(checkpoint: Checkpoint) -> None:
    layer, values = layer_of(checkpoint, torch.float32)
    state = layer.state_dict()
    for held in (layer.weight, state["weight"]):
        assert isinstance(held, StandIn)
        assert (held.shape, held.dtype, held.device.type, held.numel(), held.nbytes) == (
            torch.Size([8, 4]),
            torch.float32,
            "cpu",
            32,
            128,
        )
        assert held.is_contiguous()
    assert isinstance(layer.weight, nn.Parameter)
    assert isinstance(shown(values[0]), StandIn), "asking for all of this has made the values"


@pytest.mark.parametrize("inference", [False, True])
def test_values_take_the_place_of_a_stand_in_when_somebody_needs_them(checkpoint: Checkpoint, inference: bool) -> None:
    layer, values = layer_of(checkpoint, torch.float32)
    expected = checkpoint.state_dict()["weight"].float()
    before = layer.weight
    with torch.inference_mode(inference):
        output = layer(torch.eye(4))
    assert torch.equal(output, expected.T + checkpoint.state_dict()["bias"].float())
    assert type(output) is torch.Tensor
    assert not isinstance(shown(values[0]), StandIn)
    assert torch.equal(before, expected)
    assert laid_out(layer.weight) is values[0].specs[0]
    assert before.data_ptr() == layer.weight.data_ptr()
    assert torch.equal(copy.deepcopy(layer).weight, expected)
    assert type(copy.deepcopy(layer).weight) is nn.Parameter
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved)["weight"], expected)


def by_pointer(tensor: torch.Tensor) -> None:
    ctypes.memset(tensor.data_ptr(), 1, tensor.nbytes)


def by_an_operator(tensor: torch.Tensor) -> None:
    """Of a pack, in C++ say: torch counts nothing of it."""
    with torch.library._scoped_library("shown_by_a_test", "DEF") as library:
        library.define("fill(Tensor x) -> ()")
        library.impl("fill", lambda x: ctypes.memset(x.data_ptr(), 1, x.nbytes) and None, "CPU")
        torch.ops.shown_by_a_test.fill(tensor)


WRITES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "a view": lambda layer: layer.weight[0].zero_(),
    "state_dict": lambda layer: layer.state_dict()["weight"].add_(1),
    "load_state_dict": lambda layer: layer.load_state_dict({"weight": torch.ones(8, 4)}, strict=False),
    "data": lambda layer: layer.weight.data.mul_(2),
    "other data": lambda layer: setattr(layer.weight, "data", torch.ones(2, 2)),
    "numpy": lambda layer: layer.weight.numpy().fill(3),
    "another dtype": lambda layer: layer.to(torch.float64),
    "its bytes": lambda layer: layer.weight.view(torch.uint8).zero_(),
    "its storage": lambda layer: layer.weight.untyped_storage().fill_(0),
    "its old storage": lambda layer: layer.weight._typed_storage()._untyped_storage.fill_(0),
    "a pointer": lambda layer: by_pointer(layer.weight),
    "an operator": lambda layer: by_an_operator(layer.weight),
    "DLPack": lambda layer: torch.from_dlpack(layer.weight).zero_(),
    "__dlpack__": lambda layer: torch.utils.dlpack.from_dlpack(layer.weight.__dlpack__()).zero_(),
    "np.asarray": lambda layer: np.asarray(layer.weight).fill(3),
    "numpy of a view": lambda layer: layer.weight.flatten().numpy().fill(3),
    "numpy of a row": lambda layer: layer.weight.unbind()[1].numpy().fill(3),
    "a part of the old kind": lambda layer: torch.unsafe_split(layer.weight, 2)[0].zero_(),
    "data of a part": lambda layer: layer.weight.contiguous().chunk(2)[0].data.zero_(),
    "another class": lambda layer: layer.weight.as_subclass(torch.Tensor).zero_(),
    "memory of another": lambda layer: layer.weight.set_(torch.ones_like(layer.weight)),
    "detach, in place": lambda layer: layer.weight.detach().zero_(),
    "detach, numpy": lambda layer: layer.weight.detach().numpy().fill(3),
    "detach, pointer": lambda layer: by_pointer(layer.weight.detach().detach()),
    "detach, its bytes": lambda layer: layer.weight.detach()[1:].view(torch.uint8).zero_(),
    "state_dict, numpy": lambda layer: layer.state_dict()["weight"].numpy().fill(3),
    "a new parameter": lambda layer: nn.Parameter(layer.weight, requires_grad=False).mul_(2),
    "a new parameter, numpy": lambda layer: nn.Parameter(layer.weight, requires_grad=False).numpy().fill(3),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_way_to_write_is_noticed(tmp_path: Path, dtype: torch.dtype, inference: bool, write: str) -> None:
    """Of weights that modules have as the file has them, and of others."""
    layer, _ = layer_of(written(tmp_path / "layer.safetensors", torch.float16), dtype)
    untouched = layer.bias if write != "another dtype" else None
    with torch.inference_mode(inference), torch.no_grad():
        WRITES[write](layer)
    assert laid_out(layer.weight) is None
    assert untouched is None or laid_out(untouched) is not None


READS = {
    "shape": lambda layer: (layer.weight.shape, layer.weight.nbytes, layer.weight.is_pinned(), repr(layer.weight)),
    "parts": lambda layer: (layer.weight[1], layer.weight.view(-1)[3:].unbind()[0], torch.flatten(layer.weight)),
    "values": lambda layer: (layer.weight.mean().item(), layer.weight.tolist(), layer.weight.sort(), layer.weight + 1),
    "run": lambda layer: layer(torch.eye(4, dtype=layer.weight.dtype)),
    "state_dict": lambda layer: [value.clone() for value in layer.state_dict().values()],
    "saved": lambda layer: torch.save(layer.state_dict(), io.BytesIO()),
    "copied": lambda layer: copy.deepcopy(layer).weight.zero_(),
    "other data of an alias": lambda layer: setattr(layer.state_dict()["weight"], "data", torch.ones(2)),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_who_reads_has_not_written(tmp_path: Path, dtype: torch.dtype, inference: bool, read: str) -> None:
    layer, values = layer_of(written(tmp_path / "layer.safetensors", torch.float16), dtype)
    with torch.inference_mode(inference), torch.no_grad():
        READS[read](layer)
    assert [laid_out(held) for held in layer.parameters()] == [value.specs[0] for value in values]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_new_parameter_around_a_weight_is_laid_out_as_the_weight(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    layer, values = layer_of(checkpoint, dtype)
    expected = checkpoint.state_dict()["weight"].to(dtype)
    layer.weight = nn.Parameter(layer.weight, requires_grad=False)
    assert laid_out(layer.weight) is values[0].specs[0]
    before = layer.weight
    layer.weight = nn.Parameter(before)
    assert (layer.weight.requires_grad, before.requires_grad) == (True, False)
    assert torch.equal(layer.weight, expected)
    assert laid_out(layer.weight) is values[0].specs[0]
    layer.weight.data = torch.ones(8, 4)
    assert laid_out(layer.weight) is None
    assert torch.equal(before, expected)


def test_a_weight_has_its_storage_for_itself(checkpoint: Checkpoint) -> None:
    layer, values = layer_of(checkpoint, torch.bfloat16)
    for held, value in zip(layer.parameters(), values, strict=True):
        assert held.storage_offset() == 0
        assert held.untyped_storage().nbytes() == held.nbytes
        assert held.data_ptr() == value.original.data_ptr()


def test_what_may_only_be_read_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where a write to the mapping would end the process."""
    monkeypatch.setattr(checkpoint_file, "_NO_RESERVE", 0)
    monkeypatch.setattr(checkpoint_file, "_ACCESS", mmap.ACCESS_READ)
    checkpoint = written(tmp_path / "layer.safetensors")
    layer, _ = layer_of(checkpoint, torch.bfloat16)
    expected = checkpoint.state_dict()["weight"].clone()
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer.weight, expected * 2)
    assert torch.equal(checkpoint.state_dict()["weight"], expected)
