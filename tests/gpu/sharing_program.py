"""Two processes page-lock the same memory files and copy from them to the device at once, packed weights too
(programs.py).

What only a GPU can show is whether the driver page-locks a mapping that is read-only (``cudaHostRegister`` with
``cudaHostRegisterReadOnly``), in several processes, and copies from it as from any other. On a CPU the same runs in
small, with virtual devices, which need no page-locking.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import types
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from programs import Found
    from weightstream.streaming import Backend

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 3
CHILD_SECONDS = 120


class User:
    """A process that has copies of some weights, as an arena has them."""

    def __init__(self, address: str, on_gpu: bool) -> None:
        import torch
        from weightstream.streaming import CpuBackend, CudaBackend, PinBudget, VirtualMemory
        from weightstream.streaming.memory.arena import Arena
        from weightstream.streaming.sharing.share import Share

        self.share = Share(address)
        device = torch.device("cuda:0")
        self.backend: Backend = CudaBackend(device) if on_gpu else CpuBackend(VirtualMemory(1 << 30))
        self.arena = Arena(self.backend, True, PinBudget(share=self.share))
        self.count, self.nbytes = (8, 132_157_440) if on_gpu else (3, 1 << 16)
        self.buffers: list[Any] = []

    def content(self, number: int) -> torch.Tensor:
        """What is in a copy, the same in every process."""
        import torch

        generator = torch.Generator().manual_seed(number)
        return torch.randint(0, 256, (self.nbytes,), dtype=torch.uint8, generator=generator)

    def claim(self) -> None:
        """Build the copies, or take them, and page-lock them."""
        from weightstream.streaming.memory.shared_buffer import claim_shared
        from weightstream.streaming.memory.transfer import copies_from

        for number in range(self.count):
            buffer = claim_shared(self.arena, bytes([number + 1]) * 32, self.nbytes)
            self.buffers.append(buffer)
            if not buffer.is_there:
                buffer.fill(0, self.nbytes, copies_from(self.content(number)))
                buffer.finish()
            self.arena.lock(buffer)

    def copies_are_right(self) -> bool:
        """Whether what arrives on the device is what it should be, when copies go as those of a step do."""
        import torch

        self.backend.open(2)
        target = self.backend.allocate(self.nbytes)
        right = True
        for _ in range(ROUNDS):
            for number, buffer in enumerate(self.buffers):
                target.zero_()
                self.backend.wait(self.backend.copy([(target, buffer.memory)], [self.backend.mark()], fine=True))
                right &= torch.equal(target.cpu(), self.content(number))
        self.backend.free(target)
        return right

    def let_go(self) -> None:
        self.backend.synchronize()
        while self.buffers:
            self.arena.release(self.buffers.pop())
        self.backend.close()

    def facts(self) -> dict[str, Any]:
        pins = self.arena.budget
        return {
            "built": self.share.built,
            "taken": self.share.taken,
            "locked": pins.locked,
            "shared": pins.shared,
            "reason": self.share.reason or self.arena.reason or "",
        }


def cases(found: Found) -> None:
    from weightstream.streaming.sharing.pages import why_not_here

    if why_not_here() is None:
        _share(found)
    else:
        found.check("this system cannot share", True)


def _share(found: Found) -> None:
    from weightstream.streaming.sharing.broker import Broker

    broker = Broker(f"@weightstream-{uuid.uuid4().hex}")
    thread = threading.Thread(target=broker.run, daemon=True)
    thread.start()
    try:
        _use_from_two_processes(found, broker.address)
        _pack_in_two_processes(found, broker.address)
    finally:
        broker.stop()
        thread.join()


def _use_from_two_processes(found: Found, address: str) -> None:
    from weightstream.streaming.sharing.share import ask_status

    first = User(address, on_gpu=not found.small)
    first.claim()
    total = first.count * first.nbytes
    facts = first.facts()
    found.facts["first"] = facts
    found.check("the first builds and page-locks", (facts["built"], facts["locked"]) == (first.count, total))
    found.check("all of it is shared", facts["shared"] == total)
    second = _start_second(found, address)
    found.check("copies of the first, beside the second", first.copies_are_right())
    facts = _told_by(second)
    found.facts["second"] = facts
    found.check("the second builds nothing", (facts["built"], facts["taken"]) == (0, first.count))
    found.check("the second page-locks the same", (facts["locked"], facts["shared"]) == (total, total))
    found.check("copies of the second", facts["right"])
    found.check("it is there once", ask_status(address)["bytes"] == total)
    found.check("copies after the second has ended", first.copies_are_right())
    first.let_go()
    found.check("nothing is locked any more", first.facts()["locked"] == 0)
    first.share.moves()  # What is asked on this connection comes behind what was told on it.
    found.check("and the memory is gone", ask_status(address)["copies"] == 0)
    first.share.give_up("it is over")


def _pack_in_two_processes(found: Found, address: str) -> None:
    from sharing_packed import PackingUser, write_model
    from weightstream.streaming.sharing.share import ask_status

    path = found.folder / "packed.safetensors"
    write_model(path, on_gpu=not found.small)
    first = PackingUser(address, not found.small, path)
    found.check("packed, steps of the first", first.run())
    facts = first.facts()
    found.facts["first, packed"] = facts
    found.check("the first shares what it packs", 0 < facts["shared"] == facts["packed"] <= facts["built"])
    nbytes = ask_status(address)["bytes"]
    found.check("master copies of what is packed are gone", nbytes == facts["shared_bytes"])
    second = _start_second(found, address, str(path))
    found.check("packed, steps of the first beside the second", first.run())
    other = _told_by(second)
    found.facts["second, packed"] = other
    found.check("packed, steps of the second", other["right"])
    found.check("the second shares all that is packed", other["shared"] == other["packed"] == facts["packed"])
    found.check("packed, it is there once", other["there"] == nbytes == other["shared_bytes"])
    found.check("packed, both page-lock the same", other["locked"] <= 1.05 * facts["locked"])
    found.check("packed, steps after the second has ended", first.run())
    first.let_go()
    first.share.moves()
    found.check("and the packed memory is gone", ask_status(address)["copies"] == 0)
    first.share.give_up("it is over")


def _start_second(found: Found, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--second", "cpu" if found.small else "cuda", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _told_by(second: subprocess.Popen[str]) -> dict[str, Any]:
    told, _ = second.communicate(timeout=CHILD_SECONDS)
    return json.loads(told.splitlines()[-1])


def _second(device: str, address: str, path: str = "") -> None:
    """The other process; with the file of a model it packs that."""
    pack = types.ModuleType("weightstream")
    pack.__path__ = [str(ROOT)]
    sys.modules["weightstream"] = pack
    if path:
        _second_packs(device, address, Path(path))
        return
    user = User(address, on_gpu=device == "cuda")
    user.claim()
    right = user.copies_are_right()
    print(json.dumps({**user.facts(), "right": right}))
    user.let_go()


def _second_packs(device: str, address: str, path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "streaming"))
    from sharing_packed import PackingUser
    from weightstream.streaming.sharing.share import ask_status

    user = PackingUser(address, device == "cuda", path)
    right = user.run()
    print(json.dumps({**user.facts(), "right": right, "there": ask_status(address)["bytes"]}))
    user.let_go()


if __name__ == "__main__":
    if sys.argv[1] == "--second":
        _second(*sys.argv[2:])
    else:
        import programs

        programs.alone(cases)
