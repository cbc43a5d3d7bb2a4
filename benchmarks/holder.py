"""Hold the part of GPUs that a case wants not to be free, until standard input closes.

    python holder.py GPUS [FREE_GB]

Every line on standard input is answered by one line of JSON: bytes ``free`` on the fullest of the first GPUS. Free
counts what the driver gives out now, so a contender's own CUDA context (about 0.5 GB) still has to come out of it. With
0 GPUs it is 0, and nobody asks torch.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GB = 1_000_000_000


def hold(gpu: int, free_gb: float) -> torch.Tensor:
    """Allocate everything but ``free_gb``."""
    import torch

    free, _ = torch.cuda.mem_get_info(gpu)
    surplus = int(free - free_gb * GB)
    if surplus < 0:
        raise SystemExit(f"only {free / GB:.1f} GB are free on GPU {gpu}; cannot leave {free_gb} GB")
    return torch.empty(surplus, dtype=torch.uint8, device=f"cuda:{gpu}")


def free_bytes(gpu: int) -> int:
    import torch

    return torch.cuda.mem_get_info(gpu)[0]


def visible(gpus: int) -> range:
    """As many as there are; those that are missing hold nothing."""
    import torch

    return range(gpus if torch.cuda.is_available() else 0)


def main() -> None:
    gpus, *free_gb = sys.argv[1:]
    there = visible(int(gpus)) if int(gpus) else range(0)
    held = [hold(gpu, float(free_gb[0])) for gpu in there] if free_gb else []
    for _ in sys.stdin:
        print(json.dumps({"free": min(map(free_bytes, there), default=0)}), flush=True)
    del held


if __name__ == "__main__":
    main()
