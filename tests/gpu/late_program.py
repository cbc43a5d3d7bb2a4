"""The engine computes the same with units of real size on a device that is late (programs.py).

Kernels, patches and copies begin long after they were queued (``torch.cuda._sleep``), and host memory that is let go of
is overwritten at once, so whatever does not wait computes with something else. On a CPU the same runs in small on a
virtual device.
"""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import programs

# About 5 ms of a GPU: five times what copying 50 MB takes.
LATE_CYCLES = 10_000_000
LATE_SECONDS = 0.0005
SLOTS = 2

if TYPE_CHECKING:
    import torch
    from weightstream.streaming import Backend, Streamer


class Case:
    """A model in a file, a device, and what the model gives when it is an ordinary one there.

    Attributes:
        repeats: of each case.
        late: has what is queued on the current stream from now on begin late.
    """

    def __init__(self, folder: Path, on_gpu: bool) -> None:
        import torch
        from models import make_transformer
        from safetensors.torch import save_model

        self.device = torch.device("cuda:0" if on_gpu else "cpu")
        self.repeats, self.depth, self.width = (9, 3, 2048) if on_gpu else (2, 4, 32)
        self.path = folder / "model.safetensors"
        plain = make_transformer(self.depth, self.width)
        save_model(plain, str(self.path))
        self.x = torch.randn(1, 64, self.width, generator=torch.Generator().manual_seed(1)).to(self.device)
        plain.to(self.device)
        plain(self.x)  # The first of a process may differ from all later ones.
        self.names = {f"blocks.{index}.{layer}.weight" for index in range(self.depth) for layer in ("qkv", "out")}
        self.expected = {False: plain(self.x)}
        for name in self.names:
            plain.get_parameter(name).mul_(2)
        self.expected[True] = plain(self.x)
        self._wrong = torch.zeros((), dtype=torch.int64, device=self.device)

    def late(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda._sleep(LATE_CYCLES)
        else:
            time.sleep(LATE_SECONDS)

    @contextlib.contextmanager
    def streamer(self, **settings: Any) -> Iterator[tuple[Any, Streamer]]:
        """A model whose weights are views of the file, and its streamer."""
        import torch
        from models import make_transformer
        from weightstream.nodes.host.devices import make_backend
        from weightstream.streaming import Checkpoint, Streamer, StreamingConfig, cut_model

        checkpoint = Checkpoint.open(self.path)
        with torch.device("meta"):  # To draw weights that nobody needs takes longer than most cases.
            model = make_transformer(self.depth, self.width)
        model.load_state_dict(checkpoint.state_dict(), assign=True)
        model.requires_grad_(False)
        blocks = cut_model(model, locate=checkpoint.locate)
        config = StreamingConfig(slots=SLOTS, adaptive=False, **settings)
        streamer = Streamer(model, blocks, make_backend(self.device), config)
        yield model, streamer
        streamer.close()
        assert streamer.backend.allocated == 0

    def check(self, model: Any, patched: bool = False) -> None:
        """A step gives what it should. Counted on the device: to compare on the host would let every copy finish."""
        self._wrong += (model(self.x) != self.expected[patched]).sum()

    def agrees(self) -> bool:
        """Whether every step since the last call has given what it should."""
        wrong = int(self._wrong)
        self._wrong.zero_()
        return wrong == 0


def budgets(streamer: Streamer, case: Case) -> Iterator[int]:
    """Everything streamed, everything resident, and what is between."""
    chance = random.Random(5)
    for number in range(case.repeats):
        least, most = streamer.minimum_bytes, streamer.model_bytes
        yield (least, most, chance.randint(least, most))[number % 3]


class LatePatches:
    """Doubles weights, with kernels that begin late."""

    def __init__(self, case: Case, names: set[str]) -> None:
        self._case, self._names = case, names

    def signature(self, name: str) -> object | None:
        return "doubled" if name in self._names else None

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        self._case.late()
        return original * 2


@contextlib.contextmanager
def late_copies(case: Case, backend: Backend) -> Iterator[None]:
    """Copies begin late, on the streams that they are on."""
    import torch

    copy_now = backend._copy_now

    def late(stream: Any, pairs: Any, waits: Any) -> Any:
        if case.device.type == "cuda":
            with torch.cuda.stream(stream or torch.cuda.current_stream(case.device)):
                case.late()
        elif stream is not None:
            stream.submit(case.late)
        return copy_now(stream, pairs, waits)

    backend._copy_now = late
    yield
    del backend._copy_now


def late_kernels(case: Case) -> None:
    """The copy into a slot waits for the kernels that read it."""
    with case.streamer() as (model, streamer):
        for block in model.blocks:
            block.norm.register_forward_pre_hook(lambda *_: case.late())
        for budget in budgets(streamer, case):
            streamer.load(streamer.plan_for(budget))
            case.check(model)
            case.check(model)


def late_patch_kernels(case: Case) -> None:
    """Copies down wait for the kernels of patches, and these for the copies up."""
    with case.streamer() as (model, streamer), late_copies(case, streamer.backend):
        for number, budget in enumerate(budgets(streamer, case)):
            patched = number % 3 != 2
            streamer.load(streamer.plan_for(budget), LatePatches(case, case.names if patched else set()))
            case.check(model, patched)


def late_copies_ahead(case: Case) -> None:
    """Kernels wait for copies, from page-locked memory and through the reader's ring."""
    for pin in (True, False):
        with (
            case.streamer(pin_memory=pin, chunks=3, read_threads=2) as (model, streamer),
            late_copies(case, streamer.backend),
        ):
            for budget in budgets(streamer, case):
                streamer.load(streamer.plan_for(budget))
                case.check(model)
                streamer.finish_building()
                case.check(model)


def late_arrival(case: Case) -> None:
    """Residents that come from the file are waited for, in memory that others had a moment before."""
    import torch

    for _ in range(case.repeats):
        with case.streamer(chunks=4) as (model, streamer), late_copies(case, streamer.backend):
            others = [torch.full_like(case.x, 3.0).repeat(1, 64, 1) for _ in range(4)]
            case.late()
            others = [(other @ other.mT).sum() for other in others]
            del others  # Its kernels are under way, and the memory is free.
            streamer.load(streamer.plan_for(streamer.model_bytes))
            case.check(model)
            case.check(model)


def late_unlocking(case: Case) -> None:
    """Memory is unlocked, and somebody else's, when no copy reads it any more."""
    import torch

    for number in range(case.repeats):
        with case.streamer(chunks=4) as (model, streamer), late_copies(case, streamer.backend):
            streamer.load(streamer.plan_for(streamer.minimum_bytes))
            streamer.finish_building()
            for _ in range(2):
                case.check(model)
                case.late()
                if number % 2:
                    streamer.give_up_masters(1 << 40)
                else:
                    streamer.unload()
                    streamer.site.close()
                other = torch.full((streamer.model_bytes // 4,), 7.0)  # Likely the same memory.
                streamer.load(streamer.plan_for(streamer.minimum_bytes))
                del other


WAYS: dict[str, Callable[[Case], None]] = {
    "kernels": late_kernels,
    "patch kernels": late_patch_kernels,
    "copies": late_copies_ahead,
    "arrival": late_arrival,
    "unlocking": late_unlocking,
}


def cases(found: programs.Found) -> None:
    import torch

    with torch.no_grad():
        parts = found.facts["parts"] = {}
        case = Case(found.folder, on_gpu=not found.small)
        for name, run in WAYS.items():
            began = time.monotonic()
            run(case)
            found.agree[name] = case.agrees()
            parts[name] = round(time.monotonic() - began, 1)
            print(f"{name}: {parts[name]} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    programs.alone(cases)
