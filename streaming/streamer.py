"""The life cycle of a streamed model: load -> (run a step)* -> unload.

[Note: who keeps whom alive]
The model owns its streamer. The streamer refers to the root weakly, and to the blocks, their dictionaries of
parameters and buffers, and hook handles. The hooks refer to the streamer weakly. There is no cycle, so a model is
freed, and its page-locked memory with it, when the last reference to it goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from .config import StreamingConfig
from .loading import Loading
from .measuring import Measuring
from .memory.changes import Changes
from .model.blocks import BlockSet
from .planning.packing import Refusals
from .planning.plan import Plan
from .planning.state import State
from .report import Findings, explain, take_snapshot
from .run.step_log import RunLog
from .run.steps import Steps
from .run.telemetry import Activity, Run, Snapshot
from .run.trace import NamedTrace
from .runner import run_step

T = TypeVar("T")


class Streamer(Loading):
    """Streams one model to one device. There is one for each loaded model, shared by all that use the model.

    Args: those of :class:`Loading`.
    """

    # -- what others do to the model -----------------------------------------------------------------------------

    def written(self) -> list[str]:
        """Names of weights that were written to or exchanged since the model was loaded; not while a block runs. Small
        buffers are left out, and so is everything while hooks of the host are in the weights."""
        return [] if self._lent else self.site.weight_copies.written()

    def show(self, changes: Changes) -> None:
        """Have the modules hold what they would hold unloaded, ``changes`` included, to be laid out anew."""
        self.site.halt()
        self.site.drop_lane()
        self._steps.detach()
        if self.state is State.LOADED:
            self._steps.state = State.REDUCED
        self.site.weight_copies.show()
        changes.show()

    def take_up(self, blocks: BlockSet, changes: Changes) -> None:
        """From the next load on stream ``blocks``: the same model, cut anew after :meth:`show`.

        Copies of units with the same layout and weights are kept; the others have nothing on the device.
        """
        loaded, same = self.state is not State.UNLOADED, blocks.outline == self.outline
        self._verifier = self._make_verifier(blocks)
        if loaded and not same:
            self.measuring.finish(self.drain)
            self.planner.vram.begin_prompt()
            self.plan = None
        self.blocks, self.outline = blocks, blocks.outline
        self.site.take_up(blocks, self._verifier, changes)
        if loaded and not same:
            self.site.clear_device()
            loaded = False
        self.planner.take_up(blocks.outline)
        self.packing_choice.take_up(blocks)
        if not same:
            self.measuring = Measuring(self.planner, self.group)
        self._steps = Steps(self._root, self.blocks, self.site, self.planner)
        self._steps.state = State.REDUCED if loaded else State.UNLOADED

    def make_masters(self, names: Collection[str]) -> None:
        """Other code will write to these tensors where the modules point: have modules point at copies of them."""
        if self.state is State.UNLOADED or self.plan is None:
            return
        # What is written to these copies must be what streams.
        held = self.site.weight_copies.holding(names)
        self.planner.refusals |= Refusals(written=held)
        if self.plan.packed & held:  # Another plan comes with the next step.
            self.site.halt()
            self.site.drop_lane()
            self._steps.state = State.REDUCED
        self.site.make_masters(names)

    def bare(self, names: Collection[str]) -> set[str]:
        """Those of these tensors of which only the original exists."""
        return self.site.weight_copies.bare(names)

    def lend_masters(self) -> None:
        """Other code has written to master copies: they stay until :meth:`take_masters_back`."""
        self._lent = True

    def take_masters_back(self) -> None:
        """What other code had written to master copies is undone."""
        if self._lent:
            self.site.weight_copies.settle()
        self._lent = False

    def invalidate(self) -> None:
        """Other code has changed weights in place, on the device or in master copies: copy them anew."""
        self.site.forget_copies()

    @contextmanager
    def originals(self) -> Iterator[None]:
        """Point the modules at the weights as loaded, for code that reads them; not while a block runs."""
        self.settle()
        self.check_files()
        changes = self.changes()
        self.site.weight_copies.bind_originals()
        changes.show()
        try:
            yield
        finally:
            self.site.weight_copies.bind_again()
            changes.put_back()

    def take_blocks(self, blocks: BlockSet) -> None:
        """Stream these blocks of the same root from the next load on; nothing of what was built is kept."""
        self.unload()
        self.blocks, self.outline = blocks, blocks.outline
        self.planner, self._verifier = self._make_planner(), self._make_verifier()
        self.move_to(self.backend)
        self.site.weight_copies.show()

    def configure(self, config: StreamingConfig) -> None:
        """Stream with other settings from the next load on. Where they differ, nothing of what was built is kept.

        Copies that are synchronous because some were corrupted stay so.
        """
        if self._verifier.finding:
            config = replace(config, copy_streams=0)
        if config != self.config:
            before, self.config = self.config, config
            if config.verify != before.verify:
                self._verifier = self._make_verifier()
            self.planner = self._make_planner()
            self.move_to(self.backend)

    def expect_compiled(self, compiled: bool) -> None:
        """Whether torch.compile runs the steps of later plans (hooks.py, Note: compiled models)."""
        self.planner.expect_compiled(compiled)

    def expect_writes(self, expected: bool) -> None:
        """Whether other code will write to weights while they are loaded, such as hooks of the host: none is packed."""
        self.planner.writes_expected = expected

    def refresh(self) -> None:
        """Call this before the model is loaded: if its files were touched since the last time, copies are dropped.

        Raises:
            CheckpointChangedError: a file has other contents than when the model was loaded.
        """
        with self._occupied():
            touches = self.check_files()
            if touches != self._touches:
                self._touches = touches
                self.close()

    def check_files(self) -> int:
        """Raise if a file has other contents than when the model was loaded; returns how often files were touched."""
        return self.site.weight_copies.check_sources()

    # -- one step ------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """A forward of the root has begun before there were hooks to tell of it."""
        self._steps.begin_step()

    def run(
        self,
        forward: Callable[[], T],
        shape: Hashable = None,
        reload: Callable[[Plan], None] | None = None,
        estimate: Callable[[], int] | None = None,
    ) -> T:
        """Run one step, ``forward``, with a plan that is fitted to what the steps before it have shown.

        A step that runs out of device memory is run again: at first with torch's cached memory given back, which may
        only have been fragmented; then with a little less on the device, with much less, and with the least that works.
        Whatever happens, no unit stays bound to a slot.

        Args:
            forward: calls the root; it may be called again after it has run out of memory.
            shape: equal for steps that need the same memory and time.
            reload: calls :meth:`load` with the plan that it is given and the patches that are in the weights. By
                default there are none.
            estimate: returns the bytes that activations may take, for a shape that has not run yet.
        """
        with self._occupied():
            return run_step(self, forward, shape, reload or self.load, estimate)

    # -- telling -------------------------------------------------------------------------------------------------

    def begin_run(self) -> None:
        """The host is about to load the model, for steps that are counted apart from those before."""
        self.site.meters.stalls.collect()  # Those of the last step belong to the run before.
        if (run := self._run()).counters.steps:
            self._last_run = run
        self._run_began = replace(self.counters)
        self.site.meters.step.begin_run()
        self.counters.runs += 1
        self.planner.begin_run()
        self.packing_choice.begin_run()

    def end_run(self) -> None:
        """The host has run the last step of a run: wait for it, and count it."""
        self.backend.synchronize()
        self.site.meters.end_run()

    def logged_runs(self) -> list[RunLog]:
        """The steps of the last runs, the oldest run first, for any thread."""
        return self.site.meters.step.runs()

    @property
    def trace(self) -> NamedTrace | None:
        """The last step that was recorded as a whole, for any thread; None before there is one."""
        blocks, trace = self.blocks, self.measuring.trace
        return trace and NamedTrace(self.backend.name, [block.name for block in blocks.blocks], trace)

    def ask_for_trace(self) -> bool:
        """Have the next step recorded, on any thread; returns False where that is not done, as of a compiled model."""
        self.group.ask_for_trace()
        return not self.planner.compiled

    @property
    def never_entered(self) -> list[str]:
        """Names of blocks that are never entered although their units run (by_units.py)."""
        return [self.blocks.blocks[block].name for block in sorted(self.planner.by_units)]

    @property
    def _findings(self) -> str:
        """What turned out to be unexpected in the model and its copies, in words."""
        names = self.never_entered
        by_units = f"nobody calls {len(names)} of its blocks ({names[0]}), so layers in them tell when" if names else ""
        return "; ".join(filter(None, (self._verifier.finding, by_units)))

    def _why_unpacked(self, plan: Plan | None) -> str:
        """Why weights do not stream packed, where that was asked for or would help."""
        return "" if plan is None else self.packing_choice.explain(plan)

    def explain(self) -> str:
        """The plan in effect, and where its streamed weights come from, in a line."""
        now, findings = self.standing, Findings(self._findings, self._why_unpacked(self.plan))
        return explain(now, self.site.weight_copies, self.site.supply, self.building, findings)

    def snapshot(self) -> Snapshot:
        """The state now, for any thread. Waits for nothing and changes nothing."""
        while True:
            site, blocks = self.site, self.blocks
            now = self.standing  # Read last: another thread that unloads drops a plan before its site and its blocks.
            told = (self.config, self.profile, self._activity(), site.building)
            try:
                findings = Findings(self._findings, self._why_unpacked(now.plan))
                found = take_snapshot(now, site.weight_copies, site.supply, site.backend, *told, findings)
            except IndexError:
                if site is self.site and blocks is self.blocks:
                    raise
                continue
            if site is self.site and blocks is self.blocks:
                return found

    def _activity(self) -> Activity:
        times, run = self.site.meters.step.times(), self._run()
        idle_seconds = time.monotonic() - self.last_used
        busy = self._depth > 0 or times.computing
        return Activity(busy, idle_seconds, times.last, replace(self.counters), run, self._last_run)

    def _run(self) -> Run:
        began = self._run_began  # Read first: counters read before it could come out negative.
        counters, latest = self.counters.since(began), self.logged_runs()[-1:]
        # Before its first step was timed the log has the run before.
        return Run.of(counters, next((run for run in latest if run.number == self.counters.runs), None))
