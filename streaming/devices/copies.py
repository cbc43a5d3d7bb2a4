"""Copies between a host and its devices: the types that all code shares which queues copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

# Every tensor starts on a 512-byte boundary, as torch's CUDA allocator gives it: matrix libraries choose their
# kernels by alignment, and another kernel may round differently.
ALIGNMENT = 512

# Opaque to all but the backends: a torch.cuda.Event or a Future.
Event = Any
# A function that returns the seconds that compute waited, or None while the device has not got there. A wait with a
# begin and an end is a partial of Backend.seconds with both moments (moments_of).
Stall = Callable[[], float | None]
# A moment of compute, opaque like an event: a torch.cuda.Event with a time, or seconds.
Moment = Any
# Where to copy, and from where.
Pair = tuple[torch.Tensor, torch.Tensor]


class CopyTime(NamedTuple):
    """A copy that was timed: bytes, and the moments at which it began and ended on its stream."""

    nbytes: int
    begin: Moment
    end: Moment


class Unpacking(partial[float | None]):
    """As a wait with a begin and an end, of time in which weights are unpacked."""


def moments_of(stall: Stall) -> tuple[Moment, Moment] | None:
    """Return when a wait begins and ends; None of one that is known to have taken no time."""
    return (stall.args[0], stall.args[1]) if isinstance(stall, partial) else None


def aligned(nbytes: int) -> int:
    """Return the bytes after which the next tensor begins, behind one of ``nbytes``."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def count_bytes(pairs: Sequence[Pair]) -> int:
    return sum(target.nbytes for target, _ in pairs)


def cut(pairs: Sequence[Pair], parts: int) -> list[list[Pair]]:
    """Divide copies into at most ``parts`` lists of about equally many bytes.

    If the sizes of all tensors are multiples of 512 bytes, so are the offsets at which they are cut.
    """
    total = sum(target.nbytes for target, _ in pairs)
    share = max(ALIGNMENT, -(-total // (parts * ALIGNMENT)) * ALIGNMENT)
    found: list[list[Pair]] = [[]]
    left = share
    for target, source in pairs:
        start = 0
        while start < target.nbytes:
            if left <= 0 and len(found) < parts:
                found.append([])
                left = share
            stop = target.nbytes if len(found) == parts else min(target.nbytes, start + left)
            found[-1].append((target[start:stop], source[start:stop]))
            left -= stop - start
            start = stop
    return found
