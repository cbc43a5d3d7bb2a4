"""Hold the part of a GPU that a case wants not to be free, until standard input closes.

    python holder.py [FREE_GB]

Every line on standard input is answered by one line of JSON: bytes ``free`` and ``total`` on the device. Free counts
what the driver gives out now, so a contender's own CUDA context (about 0.5 GB) still has to come out of it.
"""

from __future__ import annotations

import json
import sys

import torch

GB = 1_000_000_000


def hold(free_gb: float) -> torch.Tensor:
    """Allocate everything but ``free_gb``."""
    free, _ = torch.cuda.mem_get_info()
    surplus = int(free - free_gb * GB)
    if surplus < 0:
        raise SystemExit(f"only {free / GB:.1f} GB are free; cannot leave {free_gb} GB")
    return torch.empty(surplus, dtype=torch.uint8, device="cuda")


def device_memory() -> dict[str, int]:
    if not torch.cuda.is_available():
        return {"free": 0, "total": 0}
    free, total = torch.cuda.mem_get_info()
    return {"free": free, "total": total}


def main() -> None:
    held = hold(float(sys.argv[1])) if len(sys.argv) > 1 else None
    for _ in sys.stdin:
        print(json.dumps(device_memory()), flush=True)
    del held


if __name__ == "__main__":
    main()
