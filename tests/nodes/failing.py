"""Blocks that fail in the middle of a step, as they do where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

OUT_OF_MEMORY = torch.OutOfMemoryError("no room")


@contextmanager
def failing(block: torch.nn.Module, *calls: int, error: Exception = OUT_OF_MEMORY) -> Iterator[list[int]]:
    """``block`` fails when it is called for the first time (0), or for others; gives which have come to pass.

    By a hook of torch, because what that counts stays counted.
    """
    numbers = iter(range(10**6))
    failed: list[int] = []

    def fail(*_: Any) -> None:
        number = next(numbers)
        if number in calls:
            failed.append(number)
            raise type(error)(*error.args)  # One that is kept would keep the frames that it went through.

    handle = block.register_forward_pre_hook(fail)
    try:
        yield failed
    finally:
        handle.remove()
