"""Files that ComfyUI's own parser takes, odd as they are: the same model is loaded from them, streamed or not."""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import comfy.utils
import comfy_aimdo.model_mmap
import pytest
import torch
from sampling import MB, MODEL, sample, with_lora
from weightstream.nodes.host.mapped import mapped_loading
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.streaming import CheckpointError, VirtualMemory

pytestmark = pytest.mark.usefixtures("one_thread")


class PlainMapping:
    """Stands in for the mapping that needs a GPU, through which the host's own parser reads."""

    def __init__(self, path: str) -> None:
        with Path(path).open("rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def get(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def get_file_handle(self) -> None:
        """Nobody reads through it here."""


@pytest.fixture(autouse=True)
def plain_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy_aimdo.model_mmap, "ModelMMAP", PlainMapping)


class Parts(NamedTuple):
    """A file taken apart."""

    header: dict[str, Any]
    data: bytes

    @property
    def tensors(self) -> dict[str, Any]:
        return {name: info for name, info in self.header.items() if name != "__metadata__"}

    def moved(self, distance: int, first: int = 0) -> dict[str, Any]:
        """The descriptions, with tensors that begin at ``first`` or behind it ``distance`` bytes further back."""
        moved = {}
        for name, info in self.tensors.items():
            begin, end = info["data_offsets"]
            step = distance if begin >= first else 0
            moved[name] = {**info, "data_offsets": [begin + step, end + step]}
        return moved


def pack(header: dict[str, Any] | str, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def _hole_inside(parts: Parts) -> bytes:
    """128 bytes of nobody in front of the tensor that begins nearest to the middle."""
    begins = sorted(info["data_offsets"][0] for info in parts.tensors.values())
    middle = begins[len(begins) // 2]
    return pack(parts.moved(128, middle), parts.data[:middle] + bytes(128) + parts.data[middle:])


def _with_metadata(value: str) -> Callable[[Parts], bytes]:
    return lambda parts: pack(f'{{"__metadata__":{value},{json.dumps(parts.tensors)[1:]}', parts.data)


ODD: dict[str, Callable[[Parts], bytes]] = {
    "bytes behind": lambda parts: pack(parts.header, parts.data + bytes(16)),
    "a byte behind": lambda parts: pack(parts.header, parts.data + b"\n"),
    "a hole in front": lambda parts: pack(parts.moved(64), bytes(64) + parts.data),
    "an odd hole in front": lambda parts: pack(parts.moved(3), bytes(3) + parts.data),
    "a hole inside": _hole_inside,
    "names in another order": lambda parts: pack(dict(reversed(parts.tensors.items())), parts.data),
    "a name twice": lambda parts: pack(f'{{"img_in.bias":null,{json.dumps(parts.tensors)[1:]}', parts.data),
    "spaces": lambda parts: pack("  " + json.dumps(parts.header, indent=1) + " \n", parts.data),
    "more fields": lambda parts: pack({k: {**v, "note": [1.5]} for k, v in parts.tensors.items()}, parts.data),
    "a tensor without bytes": lambda parts: pack(
        {**parts.header, "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [5, 5]}}, parts.data
    ),
    "metadata of numbers": _with_metadata('{"format":"pt","step":12,"loss":NaN,"tags":["a",{"b":null}]}'),
    "metadata with half a character": _with_metadata('{"title":"\\ud800"}'),
    "metadata that is none": _with_metadata("null"),
    "metadata that is a list": _with_metadata('["a"]'),
    "metadata twice": _with_metadata('{"a":"1"},"__metadata__":{"b":2}'),
    "deep metadata": _with_metadata('{"a":' + "[" * 300 + "]" * 300 + "}"),
}


@pytest.fixture(scope="module")
def parts(models: Path) -> Parts:
    raw = (models / MODEL).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return Parts(json.loads(raw[8 : 8 + length]), raw[8 + length :])


def read_by_host(path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    return comfy.utils.load_safetensors(str(path))


def read_by_us(path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    with mapped_loading():
        return comfy.utils.load_torch_file(str(path), return_metadata=True)


@pytest.mark.parametrize("oddity", ODD)
def test_an_odd_file_has_the_tensors_that_the_host_finds(tmp_path: Path, parts: Parts, oddity: str) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(ODD[oddity](parts))
    (theirs, metadata), (ours, found) = read_by_host(path), read_by_us(path)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)
    if isinstance(metadata, dict):
        assert repr(found or {}) == repr(metadata)  # NaN is no NaN.


@pytest.mark.parametrize("oddity", ["bytes behind", "an odd hole in front", "metadata of numbers"])
def test_an_odd_file_streams(
    models: Path, parts: Parts, plain: torch.Tensor, virtual_device: Callable[[int], VirtualMemory], oddity: str
) -> None:
    path = models / "odd" / f"{oddity}.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(ODD[oddity](parts))
    virtual_device(24 * MB)
    with torch.inference_mode():
        model = load_streamed(str(path), {})
    assert isinstance(model, StreamedModelPatcher)
    assert torch.equal(sample(model), plain)


def test_tensors_that_share_their_bytes_are_patched_one_by_one(
    models: Path, parts: Parts, virtual_device: Callable[[int], VirtualMemory]
) -> None:
    """A LoRA on one of two names that the file has for the same bytes leaves the other alone."""
    shared = dict(parts.tensors)
    for kind in ("weight", "bias"):
        shared[f"double_blocks.1.img_mlp.0.{kind}"] = shared[f"double_blocks.0.img_mlp.0.{kind}"]
    path, apart = models / "shared.safetensors", models / "apart.safetensors"
    path.write_bytes(pack(shared, parts.data))
    tensors, _ = read_by_host(path)
    comfy.utils.save_torch_file({name: tensor.clone() for name, tensor in tensors.items()}, str(apart))
    virtual_device(24 * MB)
    with torch.inference_mode():
        model, expected = load_streamed(str(path), {}), load_streamed(str(apart), {})
    assert torch.equal(sample(with_lora(model, 0.7)), sample(with_lora(expected, 0.7)))
    assert torch.equal(sample(model), sample(expected))


@pytest.mark.parametrize(
    "broken",
    [
        lambda parts: pack(parts.header, parts.data[:-1]),
        lambda parts: pack(json.dumps(parts.header)[:-1], parts.data),
        lambda parts: pack({**parts.header, "img_in.bias": {"dtype": "F32"}}, parts.data),
        lambda parts: pack({**parts.header, "a": {"dtype": "F99", "shape": [0], "data_offsets": [0, 0]}}, parts.data),
        lambda parts: pack({**parts.header, "a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, parts.data),
        lambda parts: pack("[]", parts.data),
        lambda parts: b"",
    ],
)
def test_what_the_host_refuses_is_refused_by_name(
    tmp_path: Path, parts: Parts, broken: Callable[[Parts], bytes]
) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(broken(parts))
    with pytest.raises(Exception):  # noqa: B017, PT011 whatever the host's parser makes of it
        read_by_host(path)
    with pytest.raises(CheckpointError, match=r"broken\.safetensors"):
        read_by_us(path)
