"""What a unit's weights are, as a key: two processes that find the same key have the same bytes in the same places."""

from __future__ import annotations

import hashlib

import torch

from .layout import Layout, TensorSpec

# Another number for every change of what read_range (contents.py) makes of the same file.
RAW_VERSION = 1

KEY_BYTES = 32


def identity_of(layout: Layout) -> bytes | None:
    """Return the key of a unit as it was loaded; None where a tensor is in this process's memory alone.

    It is made of the file as it is on the disk now, the part of it that each tensor is, and where that lies in the
    unit, in which dtype. Names do not count.
    """
    digest = hashlib.blake2b(f"raw {RAW_VERSION} {torch.__version__} {layout.nbytes}".encode(), digest_size=KEY_BYTES)
    for spec in layout.specs:
        if (found := _identity(spec)) is None:
            return None
        digest.update(found)
    return digest.digest()


def patched_identity(raw: bytes, patches: list[tuple[int, bytes]]) -> bytes:
    """Return the key of a unit with patches in it.

    Args:
        raw: its key as it was loaded.
        patches: the number of each value that has some, and what they are known by.
    """
    digest = hashlib.blake2b(raw, digest_size=KEY_BYTES, person=b"patched")
    for number, identity in sorted(patches):
        digest.update(repr((number, identity)).encode())
    return digest.digest()


def packed_identity(key: bytes, version: str) -> bytes:
    """Return the key of a unit that is packed, in this ``version`` of the format, by its key as it is."""
    return hashlib.blake2b(key + version.encode(), digest_size=KEY_BYTES, person=b"packed").digest()


def _identity(spec: TensorSpec) -> bytes | None:
    lies = (spec.offset, spec.nbytes, tuple(spec.shape), spec.stride, str(spec.dtype))
    if not spec.nbytes or spec.original.is_meta:  # Nothing, or zeros.
        return repr(("zeros", lies)).encode()
    if spec.source is None or spec.original.stride() != spec.stride:
        return None
    return repr((spec.source.identity(), lies, str(spec.original.dtype))).encode()
