"""Workers of one process that pack a small model and share its packed copies, each by a connection of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import PinningBackend, Scaled, Stored, output_with
from packed_models import BUDGET, PACKED_IN_BLOCK, WIDTH
from weightstream.streaming import PinBudget
from weightstream.streaming.config import PackingMode
from weightstream.streaming.memory.unit_copies import UnitCopies
from weightstream.streaming.sharing.share import NO_SHARE, Share

DEPTH = 4
# Units that are packed.
ALL = DEPTH * PACKED_IN_BLOCK
PATCHED = {"blocks.1.qkv.weight": 2.0, "blocks.3.out.weight": 0.5}


class PackingWorker(Stored):
    """What it computes is compared with the plain model, bit by bit.

    Args:
        folder: of the model's file.
        address: of the broker; empty for none.
        alone: prompts that it runs before it shares anything: after the first it packs what it loads.
    """

    def __init__(
        self, folder: Path, address: str, backend: PinningBackend | None = None, alone: bool = False, **settings: Any
    ) -> None:
        self.share = Share(address) if address else NO_SHARE
        pins = PinBudget() if alone else PinBudget(share=self.share)
        packing = {"packing": PackingMode.ON, "stream_all": True, **settings}
        super().__init__(
            folder, backend or PinningBackend(), pins, stored=torch.bfloat16, depth=DEPTH, width=WIDTH, **packing
        )
        self.patches = Scaled({})
        if alone:
            self.prompt()
            self.streamer.unload()
            self.streamer.site.weight_copies.clear_host()
            pins.share = self.share

    def load(self, strengths: dict[str, float] | None = None, known: bool = True) -> None:
        """Load it with these patches, as for a prompt."""
        self.patches = Scaled(strengths or {}, known)
        self.streamer.refresh()
        self.streamer.begin_run()
        self.streamer.load(self.streamer.next_plan(BUDGET), self.patches)
        self.streamer.begin_prompt()

    def run(self) -> torch.Tensor:
        load = self.streamer.load
        return self.streamer.run(lambda: self.model(self.x), reload=lambda plan: load(plan, self.patches))

    def check(self, steps: int = 1) -> None:
        expected = self.wanted_output()
        for _ in range(steps):
            assert torch.equal(self.run(), expected)

    def wanted_output(self) -> torch.Tensor:
        """Of the plain model with these patches."""
        return output_with(self.plain, self.patches.strengths, self.x)

    def prompt(self, strengths: dict[str, float] | None = None, known: bool = True, steps: int = 4) -> None:
        self.load(strengths, known)
        self.check(steps)

    def counts(self) -> tuple[int, int]:
        """Copies that it has built for all and taken from others, since this was asked last."""
        found = self.share.built, self.share.taken
        self.share.built = self.share.taken = 0
        return found

    def copies(self, name: str) -> UnitCopies:
        """Of the unit with this name."""
        number = next(number for number, unit in enumerate(self.streamer.blocks.units) if unit.name == name)
        return self.streamer.site.weight_copies.copies(number)

    def packed(self, shared: bool) -> set[str]:
        """Units that stream packed, from memory that others may have too, or from its own."""
        weights = self.streamer.site.weight_copies
        copies = [weights.copies(unit) for unit in self.streamer.plan.packed]
        return {one.unit.name for one in copies if one.packed.memory.is_shared == shared}

    @property
    def packed_bytes(self) -> int:
        """Of packed copies."""
        weights = self.streamer.site.weight_copies
        return sum(weights.copies(unit).packed.memory.nbytes for unit in self.streamer.plan.packed)

    def close(self) -> None:
        super().close()
        assert (self.pins.shared, self.pins.locked) == (0, 0)
        self.share.give_up("it is over")
