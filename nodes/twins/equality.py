"""Whether weights have the same values. All are read, on several threads, since a single number may have changed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

# The number of elements that are compared at once, so that what is converted for that takes little memory.
PIECE = 4 * 1024**2
# More threads than these do not read memory faster on the machines that were tried.
MOST_THREADS = 8

Named = tuple[str, torch.Tensor, torch.Tensor]


def first_difference(pairs: Iterable[Named]) -> str:
    """Return the name of the first pair of tensors that differ in shape or values; an empty string if none does.

    A NaN equals a NaN, and tensors of two dtypes are equal if one of them, rounded to the other's dtype, equals that.
    """
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        tasks = [(name, pool.submit(_same_piece, *piece)) for name, *both in pairs for piece in _pieces(*both)]
        for name, task in tasks:
            if not task.result():
                pool.shutdown(cancel_futures=True)
                return name
    return ""


def _pieces(one: torch.Tensor, two: torch.Tensor) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
    if one.shape != two.shape or one.is_meta != two.is_meta:
        yield None, None
    elif not one.is_meta:  # On meta it has no values: no file had it, and nothing has used it.
        yield from zip(one.flatten().split(PIECE), two.flatten().split(PIECE), strict=True)


def _same_piece(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    if one is None or two is None:
        return False
    one, two = one.cpu(), two.cpu()
    if one.dtype == two.dtype:
        return _same_bytes(one, two) or _equal(one, two)
    return _equal(one.to(two.dtype), two) or _equal(one, two.to(one.dtype))


def _same_bytes(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Compare eight bytes at a time if they are aligned, which is several times as fast."""
    bits = [tensor.contiguous().view(torch.uint8) for tensor in (one, two)]
    if all(each.data_ptr() % 8 == 0 and each.numel() % 8 == 0 for each in bits):
        bits = [each.view(torch.int64) for each in bits]
    return torch.equal(*bits)


def _equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.is_floating_point() and one.element_size() < 4:
        one, two = one.float(), two.float()  # Some kinds of float8 cannot be compared.
    return bool(((one == two) | ((one != one) & (two != two))).all())
