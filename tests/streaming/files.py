"""Checkpoint files as they are, and the bytes that tensors have in them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from weightstream.streaming import FileSlice

POSIX = pytest.mark.skipif(os.name != "posix", reason="an open file cannot be replaced or deleted here")
PREADV = pytest.mark.skipif(not hasattr(os, "preadv"), reason="no positioned reads here")
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: Any, data: bytes = bytes(8), length: int | None = None) -> Path:
    """A file with this header (text, or what becomes JSON), as it is."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def read(place: FileSlice | None) -> bytes:
    assert place is not None
    target = bytearray(place.nbytes)
    place.read_into(memoryview(target))
    return bytes(target)


def memory(tensor: torch.Tensor) -> bytes:
    """The bytes of a dense tensor in the order of its memory."""
    flat = torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())
    return bytes(flat.view(torch.uint8).numpy())
