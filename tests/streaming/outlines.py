"""Outlines and profiles of models that exist only as numbers."""

from __future__ import annotations

from collections.abc import Sequence

from weightstream.streaming import Outline, Profile, StreamingConfig

MB = 1_000_000


def make_outline(blocks: Sequence[Sequence[int]], rest: int = 0) -> Outline:
    """``blocks`` gives the bytes of each block's units."""
    kinds: dict[tuple[int, ...], int] = {}
    return Outline(
        tuple(size for block in blocks for size in block),
        tuple(number for number, block in enumerate(blocks) for _ in block),
        tuple(kinds.setdefault(tuple(block), len(kinds)) for block in blocks),
        rest,
    )


def make_profile(
    outline: Outline, seconds: Sequence[float], bandwidth: float, other: float = 0.0, learned: bool = True
) -> Profile:
    """Every unit runs once, in the order of definition."""
    runs = tuple(tuple((unit, 1) for unit in units) for units in outline.block_units)
    order = tuple(range(outline.blocks))
    return Profile(tuple(seconds), other, bandwidth, runs if learned else None, block_order=order, measured=True)


def linear(inputs: int, outputs: int) -> int:
    """Bytes of a linear layer in bfloat16."""
    return 2 * outputs * (inputs + 1)


def flux() -> Outline:
    """FLUX.1-dev: 19 double blocks of 680 MB and 38 single blocks of 283 MB."""
    h = 3072
    side = [linear(h, 6 * h), linear(h, 3 * h), linear(h, h), linear(h, 4 * h), linear(4 * h, h)]
    single = [linear(h, 3 * h), linear(h, 7 * h), linear(5 * h, h)]
    return make_outline([side * 2] * 19 + [single] * 38, rest=130 * MB)


def flux_profile(bandwidth: float = 55.4e9, learned: bool = True) -> Profile:
    """As an H200 runs it at 1024^2: 0.174 s."""
    return make_profile(flux(), [0.0036] * 19 + [0.0027] * 38, bandwidth, other=0.003, learned=learned)


FULL = StreamingConfig()
