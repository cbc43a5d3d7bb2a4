"""A code for 16-bit floating-point weights that takes about 0.70 of their bytes, and gives every bit back.

[Note: seven exponents and an escape]
Trained weights have bits that look random in sign and mantissa, and few different exponents: the seven commonest ones
of a tensor cover about 97 % of a bell curve, however wide it is. A value is rotated left by one bit, so that its
exponent comes first. The low byte of the rest is kept as it is. The exponent becomes an index of three bits into a
table of seven; index 7 is an escape, and the exponent is the next byte of a list. So any bit pattern can be packed (NaN
payloads, infinities, subnormals, minus zero), and only the size depends on the values: 11 bits and 8 for each escape in
bfloat16, 3 bits more in float16, whose exponent has 5 bits instead of 8.

A packed tensor consists of these parts, each padded to :data:`PART_ALIGNMENT` bytes:
 1. the table: seven exponents, and one byte that means nothing;
 2. the low byte of each value;
 3. one bit of each value at a time (bit planes; the first of eight values is the lowest bit of a byte): in float16 the
    three bits of the rest that are above the low byte, then the three bits of the index, each from the lowest on;
 4. for each group of :data:`GROUP` values the number of escapes before it (int32), so that groups can be decoded at the
    same time;
 5. the exponents of the escapes, in order.
All offsets follow from the dtype and the number of values, so nothing need be read before decoding begins.

Other codes were measured (docs/packing.md): with 4 bits for the index and exceptions by position the same weights take
0.75, with an entropy code 0.67 to 0.68, which costs the decoder several times as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

# Another number for every change of the format, or of which tensors are packed.
FORMAT_VERSION = 1
# Bits of the exponent, by dtype.
EXPONENT_BITS = {torch.bfloat16: 8, torch.float16: 5}
# Exponents in the table; the index after them is the escape.
TABLE = 7
INDEX_BITS = 3
# Values that lie side by side in a byte of a bit plane. A tensor of another number of values is not packed.
VALUES_PER_BYTE = 8
# Values of a group.
GROUP = 2048
# Parts begin at multiples of this, as kernels load 8 bytes at once.
PART_ALIGNMENT = 16
# Smaller tensors are not worth a kernel of their own.
FEWEST_VALUES = 1 << 14
# Kernels count bytes of a packed tensor in 32 bits.
MOST_VALUES = 1 << 30
# A tensor, or a unit of several, is packed only if that saves at least this part of it.
LEAST_SAVED = 0.05
# Values that are packed or unpacked at once by torch's operations, which take 16 bytes for each to measure, up to 49 to
# pack, and up to 61 to unpack.
CHUNK = GROUP << 10


@dataclass(frozen=True)
class Format:
    """Where the parts of a packed tensor lie.

    Attributes:
        values: how many.
        exponent_bits: of each.
        low: first byte of the low bytes.
        planes: first byte of each bit plane, those of the rest before those of the index.
        starts: first byte of the numbers of escapes before each group.
        escapes: first byte of the escapes.
    """

    values: int
    exponent_bits: int
    low: int
    planes: tuple[int, ...]
    starts: int
    escapes: int

    @property
    def groups(self) -> int:
        return -(-self.values // GROUP)

    @property
    def rest_planes(self) -> int:
        """Bits of each value that are neither exponent nor in the low byte."""
        return 8 - self.exponent_bits


def format_of(values: int, dtype: torch.dtype) -> Format:
    """Return the format of ``values`` values of ``dtype``, which is a key of :data:`EXPONENT_BITS`."""
    bits = EXPONENT_BITS[dtype]
    planes = 8 - bits + INDEX_BITS
    sizes = (TABLE + 1, values, *[-(-values // VALUES_PER_BYTE)] * planes, -(-values // GROUP) * 4)
    ends = list(accumulate(-(-size // PART_ALIGNMENT) * PART_ALIGNMENT for size in sizes))
    return Format(values, bits, ends[0], tuple(ends[1 : planes + 1]), ends[planes + 1], ends[planes + 2])


def may_pack(values: int, dtype: torch.dtype) -> bool:
    """Whether a tensor of so many values is of a dtype and size that :func:`pack` takes."""
    return dtype in EXPONENT_BITS and FEWEST_VALUES <= values <= MOST_VALUES and values % VALUES_PER_BYTE == 0


def pack(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return ``tensor`` packed (uint8, on its device), or None where that would not be worth it.

    Args:
        tensor: one dimension, contiguous, for which :func:`may_pack` holds.
    """
    table, nbytes = measure(tensor)
    if nbytes is None:
        return None
    packed = torch.empty(nbytes, dtype=torch.uint8, device=tensor.device)
    pack_into(tensor, table, packed)
    return packed


def measure(tensor: torch.Tensor) -> tuple[torch.Tensor, int | None]:
    """Return the table of ``tensor``, and how many bytes it takes packed; None where that would not be worth it.

    Of two exponents that are equally common the smaller one comes first, so that the same values give the same bytes.
    """
    form = format_of(tensor.numel(), tensor.dtype)
    counts = sum(
        torch.bincount(_exponents(chunk, form), minlength=1 << form.exponent_bits)
        for chunk in tensor.view(torch.int16).split(CHUNK)
    )
    order = counts.argsort(descending=True, stable=True)
    return order[:TABLE].to(torch.uint8), packed_bytes(form, int(counts[order[TABLE:]].sum()))


def packed_bytes(form: Format, escaped: int) -> int | None:
    """Return the bytes of a packed tensor with so many escapes; None where packing would not be worth it."""
    nbytes = form.escapes + escaped
    return nbytes if nbytes <= 2 * form.values * (1 - LEAST_SAVED) else None


def expected_bytes(values: int, sample: torch.Tensor) -> float:
    """Return how many bytes ``values`` values take packed, if they are like ``sample``: one dimension, on the host."""
    form = format_of(values, sample.dtype)
    counts = torch.bincount(_exponents(sample.view(torch.int16), form), minlength=TABLE + 1)
    escaped = 1 - int(counts.topk(TABLE).values.sum()) / sample.numel()
    return form.escapes + values * escaped


def pack_into(tensor: torch.Tensor, table: torch.Tensor, packed: torch.Tensor) -> None:
    """Fill ``packed``, which has as many bytes as this takes, with ``tensor``; what means nothing is zero."""
    form = format_of(tensor.numel(), tensor.dtype)
    packed[: form.escapes] = 0
    packed[:TABLE] = table
    found = form.escapes
    for number, chunk in enumerate(tensor.view(torch.int16).split(CHUNK)):
        found += _pack_chunk(chunk, form, table, packed, number * CHUNK, found)


def _pack_chunk(
    words: torch.Tensor, form: Format, table: torch.Tensor, packed: torch.Tensor, begin: int, found: int
) -> int:
    """Pack the values from number ``begin`` on, with escapes from byte ``found`` on; returns how many these are."""
    count = words.numel()
    exponents, rest = _exponents(words, form), _rotated(words) & ((1 << (16 - form.exponent_bits)) - 1)
    packed[form.low + begin :][:count] = (rest & 0xFF).to(torch.uint8)
    index = torch.full_like(exponents, TABLE)
    for number in range(TABLE):
        index.masked_fill_(exponents == table[number], number)
    bits = [rest >> (8 + bit) for bit in range(form.rest_planes)] + [index >> bit for bit in range(INDEX_BITS)]
    for plane, bit in zip(form.planes, bits, strict=True):
        packed[plane + begin // VALUES_PER_BYTE :][: count // VALUES_PER_BYTE] = _to_plane(bit)
    escapes = exponents[index == TABLE]
    packed[found:][: escapes.numel()] = escapes.to(torch.uint8)
    starts = packed[form.starts : form.escapes].view(torch.int32)[begin // GROUP : begin // GROUP + -(-count // GROUP)]
    is_escape = torch.nn.functional.pad((index == TABLE).to(torch.int32), (0, -count % GROUP))
    ends = is_escape.view(-1, GROUP).sum(1).cumsum(0)
    starts.copy_(torch.nn.functional.pad(ends[:-1], (1, 0)) + (found - form.escapes))
    return escapes.numel()


def unpack(packed: torch.Tensor, out: torch.Tensor) -> None:
    """Fill ``out`` with the values that ``packed`` was made of, by torch's operations.

    Args:
        packed: what :func:`pack` has returned.
        out: one dimension, contiguous, of the packed tensor's dtype and number of values, on the same device.
    """
    form = format_of(out.numel(), out.dtype)
    table = packed[: TABLE + 1].to(torch.int32)
    starts = packed[form.starts : form.escapes].view(torch.int32)
    words = out.view(torch.int16)
    for begin in range(0, form.values, CHUNK):
        count = min(CHUNK, form.values - begin)
        planes = [
            _from_plane(packed[plane + begin // VALUES_PER_BYTE :][: count // VALUES_PER_BYTE]) for plane in form.planes
        ]
        rest = packed[form.low + begin :][:count].to(torch.int32)
        for bit in range(form.rest_planes):
            rest |= planes[bit] << (8 + bit)
        index = sum(plane << bit for bit, plane in enumerate(planes[form.rest_planes :]))
        exponents = table[index]
        is_escape = index == TABLE
        first = starts[begin // GROUP].long()
        number = is_escape.cumsum(0) - 1 + first
        # Where nothing is escaped, some byte is read and not used.
        last = packed.numel() - 1
        exponents = torch.where(is_escape, packed[(number + form.escapes).clamp_(max=last)].to(torch.int32), exponents)
        rotated = exponents << (16 - form.exponent_bits) | rest
        words[begin : begin + count] = (rotated >> 1 | (rotated & 1) << 15).to(torch.int16)


def _rotated(words: torch.Tensor) -> torch.Tensor:
    """Values as int32 from 0 to 65535, rotated left by one bit: exponent, mantissa, sign."""
    values = words.to(torch.int32) & 0xFFFF
    return (values << 1 & 0xFFFF) | values >> 15


def _exponents(words: torch.Tensor, form: Format) -> torch.Tensor:
    return _rotated(words) >> (16 - form.exponent_bits)


def _weights(device: torch.device) -> torch.Tensor:
    return torch.arange(VALUES_PER_BYTE, dtype=torch.int32, device=device)


def _to_plane(bits: torch.Tensor) -> torch.Tensor:
    """The lowest bit of each value, eight in a byte."""
    return ((bits & 1).view(-1, VALUES_PER_BYTE) << _weights(bits.device)).sum(1).to(torch.uint8)


def _from_plane(plane: torch.Tensor) -> torch.Tensor:
    return (plane.to(torch.int32)[:, None] >> _weights(plane.device) & 1).flatten()
