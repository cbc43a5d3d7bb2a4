"""Hold all memory of a GPU that is free, until the process is killed."""

from __future__ import annotations

import time

import torch


def main(gpu: int) -> None:
    held = []
    size = 1 << 36
    while size >= 1 << 20:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device=f"cuda:{gpu}"))
        except torch.OutOfMemoryError:
            size //= 2
    print("full", flush=True)
    while True:
        time.sleep(1)
