"""A process that streams a small model and shares its copies, as it is told by lines of JSON (share_workers.py).

    python share_worker_program.py ROOT FOLDER

Each line is a command and its arguments, and is answered by a line. ``WEIGHTSTREAM_SHARE`` is the broker's address.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
pack = types.ModuleType("weightstream")
pack.__path__ = [str(ROOT)]
sys.modules["weightstream"] = pack
sys.path.insert(0, str(ROOT / "tests" / "streaming"))

import torch  # noqa: E402
from models import Scaled, Stored, learn  # noqa: E402
from packing_workers import PackingWorker  # noqa: E402
from weightstream.streaming import PinBudget  # noqa: E402
from weightstream.streaming.memory import packing  # noqa: E402
from weightstream.streaming.sharing.pages import Draft  # noqa: E402
from weightstream.streaming.sharing.share import NO_SHARE, share_of_environment  # noqa: E402

torch.set_num_threads(1)


class Worker:
    """What the commands do."""

    def __init__(self) -> None:
        self.pins = PinBudget(share=share_of_environment())
        self.stored: Stored | None = None
        self.patches = Scaled({})
        self.measured = 0

    def open(self, seed: int = 0, half: bool = False, **settings: Any) -> None:
        """Open the model; ``half`` casts it on the way."""
        dtype = torch.bfloat16 if half else None
        self.stored = stored = Stored(FOLDER, pins=self.pins, seed=seed, dtype=dtype, **settings)
        share, self.pins.share = self.pins.share, NO_SHARE
        learn(self.streamer, lambda: stored.model(stored.x))  # Alone: later plans stream the same units.
        self.pins.share = share

    def open_packing(self) -> None:
        """Open a model that packs what it loads, and count what it packs."""
        self.stored = PackingWorker(FOLDER, os.environ.get("WEIGHTSTREAM_SHARE", ""), alone=True)
        self.pins, own = self.stored.pins, packing.measure_unit

        def measure_unit(*arguments: Any) -> Any:
            self.measured += 1
            return own(*arguments)

        packing.measure_unit = measure_unit

    def prompt(self, strengths: dict[str, float] | None = None, steps: int = 3) -> list[str]:
        """A whole prompt of a model that packs; returns the output of each step."""
        self.stored.load(strengths)
        self.patches = self.stored.patches
        return self.run(steps)

    def packing(self) -> dict[str, Any]:
        """What streams packed, and how many units were packed here."""
        shared, own = (self.stored.packed(shared=shared) for shared in (True, False))
        return {"shared": len(shared), "own": len(own), "measured": self.measured}

    def load(self, strengths: dict[str, float] | None = None, known: bool = True) -> None:
        """Load it, with weights times ``strengths``, ``known`` to others by these numbers."""
        self.patches = Scaled(strengths or {}, known)
        self.streamer.refresh()
        self.streamer.load(self.stored.least, self.patches)
        self.streamer.begin_prompt()

    def run(self, steps: int = 1) -> list[str]:
        """The output of each step, as a digest."""
        return [self._step() for _ in range(steps)]

    def _step(self) -> str:
        model, x = self.stored.model, self.stored.x
        out = self.streamer.run(lambda: model(x), reload=lambda plan: self.streamer.load(plan, self.patches))
        return hashlib.sha256(out.float().numpy().tobytes()).hexdigest()

    def plain(self, strengths: dict[str, float] | None = None) -> str:
        """What an ordinary model gives, with weights times ``strengths``."""
        plain = copy.deepcopy(self.stored.plain)
        for name, strength in (strengths or {}).items():
            plain.get_parameter(name).mul_(strength)
        return hashlib.sha256(plain(self.stored.x).float().numpy().tobytes()).hexdigest()

    def figures(self) -> dict[str, Any]:
        share, arena = self.pins.share, self.streamer.site.supply.arena
        maps = Path("/proc/self/maps").read_text()
        return {
            "built": share.built,
            "taken": share.taken,
            "reason": share.reason,
            "locked": self.pins.locked,
            "shared": self.pins.shared,
            "arena_shared": arena.shared_bytes,
            "mapped": maps.count("/memfd:weightstream"),
            "writable": sum("/memfd:weightstream" in line and "w" in line.split()[1] for line in maps.splitlines()),
            "staged": self.streamer.snapshot().staged_bytes,
            "units": len(self.streamer.plan.streamed) if self.streamer.plan else 0,
            "streamed": self.streamer.plan.streamed_bytes if self.streamer.plan else 0,
        }

    def hang_at_write(self, number: int) -> None:
        """Stop for ever amid the copy of which this is the piece, and say so."""
        own, count, said = Draft.write, iter(range(1 << 30)), threading.Lock()

        def write(draft: Draft, data: memoryview, offset: int) -> None:
            if next(count) >= number:
                own(draft, data[: len(data) // 2], offset)
                if said.acquire(blocking=False):  # Several threads build.
                    print(json.dumps("hangs"), flush=True)
                threading.Event().wait()
            own(draft, data, offset)

        Draft.write = write

    def unload(self) -> None:
        self.streamer.unload()

    def give_up(self) -> int:
        return self.streamer.give_up_masters(1 << 60)

    def close(self) -> None:
        self.stored.close()

    @property
    def streamer(self) -> Any:
        return self.stored.streamer


def main() -> None:
    worker = Worker()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        command: Callable[..., Any] = getattr(worker, name)
        print(json.dumps(command(**arguments)), flush=True)


main()
