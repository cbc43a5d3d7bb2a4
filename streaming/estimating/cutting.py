"""Cuts a model into blocks and units by the names of its tensors, as ``model/blocks.py`` cuts one that was built.

``double_blocks.3.img_attn.qkv.weight`` lies in block 3 of the list ``double_blocks``, in the unit ``img_attn.qkv``. A
model may be built otherwise than its file is named (a layer that the host merges, a list inside of a list), so this is
close to what will be, and not the same.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UnsupportedModelError
from ..planning.profile import Outline
from .tensors import Tensor

PLACE = re.compile(r"(?P<list>.+?)\.(?P<number>[0-9]{1,9})\.(?P<rest>.+)")
# As in model/blocks.py: what is smaller than this part of its block, or a block than this part of the largest, stays.
SMALL_SHARE = 1 / 256
MINIMUM_SHARE = 0.5
# A plan for more takes minutes. Large models have some thousands.
MOST_UNITS = 20_000
# ComfyUI computes in 16 bits where the file has 32.
BYTES_KEPT = {"F32": 0.5, "F64": 0.25}
# What 16-bit weights take when they are packed (docs/packing.md).
PACKED_SHARE = {"BF16": 0.71, "F16": 0.90, "F32": 0.71}


@dataclass(frozen=True)
class Cut:
    """A model as its file's header shows it.

    Attributes:
        outline: blocks, units and the rest, for a plan.
        lists: the lists of blocks by name, each with their number.
        dtypes: bytes in the file of each dtype, the most first.
        packed_share: bytes of packed weights as a part of all weights.
    """

    outline: Outline
    lists: dict[str, int]
    dtypes: dict[str, int]
    packed_share: float

    @property
    def file_bytes(self) -> int:
        return sum(self.dtypes.values())


def cut(tensors: Iterable[Tensor]) -> Cut:
    """Cut a model.

    Raises:
        UnsupportedModelError: most of its bytes lie in no repeated block.
    """
    blocks: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    rest = 0
    dtypes: Counter[str] = Counter()
    packed = kept = 0.0
    for tensor in tensors:
        nbytes = int(tensor.nbytes * BYTES_KEPT.get(tensor.dtype, 1.0))
        dtypes[tensor.dtype] += tensor.nbytes
        kept += nbytes
        packed += nbytes * PACKED_SHARE.get(tensor.dtype, 1.0)
        if match := PLACE.fullmatch(tensor.name):
            blocks[match["list"], int(match["number"])][match["rest"].rpartition(".")[0]] += nbytes
        else:
            rest += nbytes
    counts = Counter(name for name, _ in blocks)
    place = {name: number for number, name in enumerate(counts)}
    largest = max((units.total() for units in blocks.values()), default=0)
    sizes: list[tuple[int, ...]] = []
    lists: Counter[str] = Counter()
    for (name, _), units in sorted(blocks.items(), key=lambda item: place[item[0][0]]):
        least = SMALL_SHARE * units.total()
        large = tuple(nbytes for nbytes in units.values() if nbytes >= least)
        # A single layer has a number in a sequence of layers, which is no list of blocks.
        is_layer = set(units) == {""}
        if is_layer or counts[name] < 2 or units.total() < SMALL_SHARE * largest:
            rest += units.total()
            continue
        rest += units.total() - sum(large)
        sizes.append(large)
        lists[name] += 1
    total = sum(map(sum, sizes))
    if total < MINIMUM_SHARE * (rest + total) or not total:
        raise UnsupportedModelError("most of its bytes lie in no repeated block, so it would not stream")
    if (units := sum(map(len, sizes))) > MOST_UNITS:
        raise UnsupportedModelError(f"its blocks have {units} parts, and no model has so many: it may be damaged")
    kinds = {size: number for number, size in enumerate(dict.fromkeys(sizes))}
    outline = Outline(
        tuple(nbytes for block in sizes for nbytes in block),
        tuple(number for number, block in enumerate(sizes) for _ in block),
        tuple(kinds[block] for block in sizes),
        rest,
    )
    return Cut(outline, dict(lists), dict(dtypes.most_common()), packed / kept)
