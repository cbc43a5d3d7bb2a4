"""The table behind a packed unit that processes share: it says how large each tensor is packed.

[Note: a table that is not believed]
Where the tensors of a packed unit lie follows from its layout, which every process has, and from how large each one
is packed. That depends on its values, so whoever takes a copy cannot know it without packing the weights itself;
packed tensors do not say it either, as their last part has no end. So the sizes travel with the bytes: behind them,
in the same sealed memory file. Nothing else need be sent, and bytes and table are whole at the same time and gone at
the same time.

The reader takes the table for what anybody may have written. It has the sizes that the unit's layout allows, or the
copy is not used: a tensor has its own bytes, or is of a kind that is packed and has at least those before its escapes
and at most those that are worth packing. Everything else is computed of the sizes, and must come out at the table's
own place. The numbers of escapes that a decoder adds to an address are looked at too: they grow, by no more than a
group has values, up to the tensor's end. The file is sealed, so nothing changes after that. What the values are is
believed, as it is of master copies: it is what a process of the same user has put under a key that says which weights
these are.

The version of the format is in the key (shared_packed.py), so that processes of two versions do not meet at all; that
it is in the table too is to tell people what is wrong.
"""

from __future__ import annotations

import struct

import torch

from ..devices.copies import aligned
from ..errors import SharingError
from ..packing.codec import FORMAT_VERSION, GROUP, Format, format_of, may_pack, packed_bytes
from .layout import Layout, TensorSpec
from .packed_units import PackedLayout, PackedPart

# Another number for every change of the table.
TABLE_VERSION = 1
VERSION = FORMAT_VERSION << 16 | TABLE_VERSION

_MAGIC = b"wspacked"
# Magic, version, tensors, bytes of the packed unit.
_HEADER = struct.Struct("<8sIIQ")
_SIZE = struct.Struct("<Q")


def table_bytes(layout: Layout) -> int:
    """How large the table of a unit is."""
    return _HEADER.size + len(layout.specs) * _SIZE.size


def table_of(packed: PackedLayout) -> bytes:
    """The table of a packed unit, which comes behind its bytes."""
    header = _HEADER.pack(_MAGIC, VERSION, len(packed.parts), packed.nbytes)
    return header + b"".join(_SIZE.pack(part.nbytes) for part in packed.parts)


def read_table(layout: Layout, memory: torch.Tensor) -> PackedLayout:
    """Return where the tensors of a unit lie in ``memory``: uint8, a packed unit and its table.

    Raises:
        SharingError: they cannot lie there (Note: a table that is not believed).
    """
    begin = memory.nbytes - table_bytes(layout)
    if begin < 0:
        raise SharingError("it is shorter than its table")
    found = memory[begin:].numpy().tobytes()
    magic, version, count, nbytes = _HEADER.unpack_from(found)
    if magic != _MAGIC:
        raise SharingError("it has no table")
    if version != VERSION:
        raise SharingError(f"its table is of version {version} instead of {VERSION}")
    if (count, nbytes) != (len(layout.specs), begin):
        raise SharingError("its table is of another unit")
    parts: list[PackedPart] = []
    offset = 0
    for spec, (size,) in zip(layout.specs, _SIZE.iter_unpack(found[_HEADER.size :]), strict=True):
        form = _form(spec, size)
        parts.append(PackedPart(spec, offset, size, form is not None))
        offset += aligned(size)
        if offset > nbytes:
            raise SharingError("its tensors have more bytes than it has")
        if form is not None:
            _check_escapes(form, parts[-1].bytes_in(memory))
    if offset != nbytes:
        raise SharingError("its tensors have less bytes than it has")
    return PackedLayout(tuple(parts), nbytes)


def _form(spec: TensorSpec, size: int) -> Format | None:
    """The format of a tensor that has so many bytes; None where it is not packed."""
    if size == spec.nbytes:
        return None
    if may_pack(spec.shape.numel(), spec.dtype):
        form = format_of(spec.shape.numel(), spec.dtype)
        if size >= form.escapes and packed_bytes(form, size - form.escapes) is not None:
            return form
    raise SharingError(f"{spec.name} cannot have {size} bytes in it")


def _check_escapes(form: Format, packed: torch.Tensor) -> None:
    """Raise unless the escapes of each group lie inside of the packed tensor."""
    starts = packed[form.starts :][: 4 * form.groups].view(torch.int32)
    ends = torch.cat([starts, torch.tensor([packed.nbytes - form.escapes], dtype=torch.int32)])
    counts = ends.diff()
    if int(starts[0]) or int(counts.min()) < 0 or int(counts.max()) > GROUP:
        raise SharingError("the places of its escapes are not in it")
