"""Passes on what hooks report while a step runs: to residents, lane, recorder and meters.

A block's residents arrive, if they are still on their way, before its weights are bound to slots. Blocks that are never
entered themselves are entered by their units (by_units.py).
"""

from __future__ import annotations

import time
import weakref
from functools import partial

from torch import nn

from ..errors import GradientError, WeightsMovedError
from ..model.blocks import BlockSet
from ..model.entries import Entries
from ..planning.plan import Plan
from ..planning.planner import Planner
from ..planning.state import State
from .by_units import ByUnits
from .hooks import Hooks
from .recorder import Recorder
from .site import Site


class Steps:
    """Listens to the steps of one model.

    Args:
        root: the module whose forward is one step.
        blocks: the model cut into blocks, units and rest.
        site: where its weights are.
        planner: counts steps.

    Attributes:
        state: what of the model is where.
        last_used: when the model was loaded or began a step, on time's monotonic clock.
    """

    def __init__(self, root: weakref.ref[nn.Module], blocks: BlockSet, site: Site, planner: Planner) -> None:
        self.state = State.UNLOADED
        self.last_used = time.monotonic()
        self._root = root
        self._blocks = blocks
        self._outline = blocks.outline
        self._site = site
        self._planner = planner
        self._plan: Plan | None = None
        self._recorder: Recorder | None = None
        self._by_units: ByUnits | None = None
        self._hooks = Hooks(self)
        self._entries = Entries()

    # -- hooks ---------------------------------------------------------------------------------------------------

    def attach(self, plan: Plan, recorder: Recorder | None) -> None:
        """Hook what ``plan`` streams and what is on its way, and everything while ``recorder`` measures a step."""
        self.detach()
        self._plan, self._recorder = plan, recorder
        root = self._root()
        assert root is not None
        blocks, units = self._blocks.blocks, self._blocks.units
        if recorder is not None:
            block_numbers, unit_numbers = set(range(len(blocks))), set(range(len(units)))
        else:
            arriving = set(self._site.weight_copies.arriving)
            block_numbers = arriving | set(self._site.lane.streamed_blocks if self._site.lane is not None else ())
            unit_numbers = plan.streamed | {unit for block in arriving for unit in self._units_of(block)}
        by_units = self._planner.by_units
        if self._planner.compiled:  # A hook inside of a block would cut its graph up.
            unit_numbers = {unit for unit in unit_numbers if self._outline.unit_block[unit] in by_units}
        self._by_units = ByUnits(by_units) if by_units else None
        modules = [(unit, units[unit].module) for unit in sorted(unit_numbers)]
        self._entries = self._hooks.attach(
            root,
            [(block, blocks[block].module) for block in sorted(block_numbers)],
            [(unit, module) for unit, module in modules if module is not None],
        )

    @property
    def recorder(self) -> Recorder | None:
        """What hooks have a step recorded by."""
        return self._recorder

    def _units_of(self, block: int) -> tuple[int, ...]:
        return self._outline.block_units[block] if block >= 0 else ()

    def detach(self) -> None:
        """Remove the hooks."""
        self._entries.remove()
        self._plan = self._recorder = self._by_units = None

    def settle(self) -> None:
        """No block runs any more, whatever an exception or an interrupt has left behind."""
        self._entries.settle()
        if self._by_units is not None:
            self._by_units.settle()

    # -- what hooks tell -----------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """A forward of the root begins."""
        if self.state is State.REDUCED:
            raise WeightsMovedError(
                "the model has given up weights since the last step; use Streamer.run, or load it anew"
            )
        self.last_used = time.monotonic()
        self.settle()
        if piece := self._planner.vram.piece():
            # Not before the step: when torch gives back what it keeps for one device, it does so for all devices.
            self._site.backend.keep(piece)
        if self._recorder is not None:
            self._site.backend.watch_peak()
        self._site.meters.begin_step()
        if self._site.lane is not None:
            self._site.lane.begin_step()
        if self._recorder is not None:
            self._recorder.begin_step()

    def end_step(self, completed: bool) -> None:
        """A forward of the root ends; ``completed`` is false when it raised."""
        if completed:
            self._end_others(None)
        self._site.meters.step.end(completed)
        if completed:
            self._site.meters.counters.steps += 1
            if self._recorder is not None:
                self._recorder.end_step()
            if self._recorder is None or self._recorder.complete:
                self._planner.vram.stepped()
        else:
            self._site.settle()
            if self._plan is not None and self._site.weight_copies.lacks(self._plan):
                self.state = State.REDUCED  # A resident could not be read; the next step tries again.
        if self._site.lane is not None:
            self._site.lane.end_step(completed)
        self._site.meters.stalls.collect()
        if completed:
            self._site.weight_copies.complete()

    def enter_block(self, block: int) -> None:
        if self._by_units is not None:
            self._end_others(block)
            self._by_units.begin_block(block)
        self._enter(block)

    def leave_block(self, block: int) -> None:
        self._leave(block)
        if self._by_units is not None:
            self._by_units.end_block(block)

    def enter_unit(self, unit: int) -> None:
        if self._by_units is not None:
            self._end_others(block := self._outline.unit_block[unit])
            if self._by_units.begin_unit(block):
                self._enter(block)
        self._arrive(self._outline.unit_block[unit])  # It may run outside of its block.
        lane = self._site.lane
        if lane is not None and (number := lane.segment_of.get(unit)) is not None:
            lane.enter(number)
        if self._recorder is not None:
            self._recorder.begin_unit(unit)

    def leave_unit(self, unit: int) -> None:
        if self._recorder is not None:
            self._recorder.end_unit(unit)
        lane = self._site.lane
        if lane is not None and (number := lane.segment_of.get(unit)) is not None:
            lane.leave(number)
        if self._by_units is not None:
            self._by_units.end_unit(self._outline.unit_block[unit])

    def recorded(self, block: int | None) -> None:
        """Gradients are recorded through ``block``, or a step (None).

        What streams is gone when gradients are computed: torch has kept views of its slot, which holds another block by
        then.

        Raises:
            GradientError: the block streams, or a block of the step does.
        """
        lane = self._site.lane
        streamed = lane.streamed_blocks if lane is not None else ()
        if streamed and (block is None or block in streamed):
            raise GradientError(self._blocks.blocks[streamed[0] if block is None else block].name)

    # -- blocks --------------------------------------------------------------------------------------------------

    def _enter(self, block: int) -> None:
        self._arrive(block)
        if self._site.lane is not None:
            self._site.lane.enter_block(block)
        if self._recorder is not None:
            self._recorder.begin_block(block)

    def _arrive(self, block: int) -> None:
        """Have compute wait for residents of ``block`` that are still on their way."""
        weights, backend = self._site.weight_copies, self._site.backend
        if block in weights.arriving:
            before = backend.moment()
            weights.arrive(block)
            after = backend.moment()
            self._site.meters.stalls.add(partial(backend.seconds, before, after))

    def _leave(self, block: int) -> None:
        if self._recorder is not None:
            self._recorder.end_block(block)
        if self._site.lane is not None:
            self._site.lane.leave_block(block)

    def _end_others(self, block: int | None) -> None:
        """End blocks that are entered by their units, because ``block`` begins, or the step ends."""
        if self._by_units is not None:
            for one in self._by_units.ended_by(block):
                self._leave(one)
