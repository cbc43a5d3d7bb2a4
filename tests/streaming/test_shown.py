"""What modules hold while no copy is bound, and how writes to it are noticed."""

from __future__ import annotations

import copy
import io
import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weightstream.streaming import Checkpoint, checkpoint_file
from weightstream.streaming.layout import NamedTensor, Place, Value, make_layout
from weightstream.streaming.shown import StandIn, laid_out, shown
from weightstream.streaming.sums import sums

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
    assert before.data_ptr() == layer.weight.data_ptr()
    assert laid_out(layer.weight) is values[0].specs[0]
    assert torch.equal(copy.deepcopy(layer).weight, expected)
    assert type(copy.deepcopy(layer).weight) is nn.Parameter
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved)["weight"], expected)


WRITES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "a view": lambda layer: layer.weight[0].zero_(),
    "state_dict": lambda layer: layer.state_dict()["weight"].add_(1),
    "load_state_dict": lambda layer: layer.load_state_dict({"weight": torch.ones(8, 4)}, strict=False),
    "data": lambda layer: layer.weight.data.mul_(2),
    "other data": lambda layer: setattr(layer.weight, "data", torch.ones(2, 2)),
    "numpy": lambda layer: layer.weight.numpy().fill(3),
    "another dtype": lambda layer: layer.to(torch.float64),
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


def test_sums_tell_any_other_bytes_and_any_other_order() -> None:
    weight = torch.randn(64, 32)
    (value,) = make_layout([NamedTensor(("weight",), weight, weight.dtype, ())]).values
    buffer = torch.zeros(weight.nbytes, dtype=torch.uint8)
    view = value.specs[0].view(buffer)
    view.copy_(weight)
    before = sums(buffer, value)
    assert torch.equal(sums(buffer, value), before)
    for changed in (weight.flip(0), weight.flip(1), weight.roll(1, 0), -weight, weight + torch.eye(64, 32)):
        view.copy_(changed)
        assert not torch.equal(sums(buffer, value), before)
