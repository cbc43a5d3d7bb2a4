"""The life cycle of a streamed model: load -> (run a step)* -> unload.

[Note: who keeps whom alive]
The model owns its streamer. The streamer refers to the root weakly, and to the blocks, their dictionaries of
parameters and buffers, and hook handles. The hooks refer to the streamer weakly; its runner is given it with each call
and keeps it no longer. There is no cycle, so a model is freed, and its page-locked memory with it, when the last
reference to it goes.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from .arena import PinBudget
from .backend import Backend, DeviceMemory, is_out_of_memory
from .blocks import BlockSet
from .config import StreamingConfig, format_bytes
from .lane import Lane
from .masters import NoPatches, Patches
from .placement import Placement
from .plan import Plan
from .planner import Planner
from .profile import Profile
from .reader import Reader
from .report import explain, take_snapshot
from .runner import Runner
from .spread import order_of_residency
from .state import Standing, State
from .steps import Steps
from .supply import Supply, Watch
from .telemetry import Counters, Meters, Snapshot
from .verify import NoVerifier, Verifier

logger = logging.getLogger(__name__)

T = TypeVar("T")

# No room for a plan: the next one is by this part smaller.
NO_ROOM_SHARE = 0.1


class Streamer:
    """Streams one model to one device. One for each loaded model, shared by all who use the model.

    Args:
        root: the module whose forward is one step; its blocks run inside it.
        blocks: the model cut into blocks, units and rest (:func:`streaming.blocks.split_model`).
        backend: the device.
        config: settings.
        pins: page-locked memory that this model shares with others; None is a budget of its own without limit.
        evictable: tells how many bytes others on a device would give up for us, beside what is free.
        watch: is told how far loading is, and may cancel it.
    """

    def __init__(
        self,
        root: nn.Module,
        blocks: BlockSet,
        backend: Backend,
        config: StreamingConfig,
        pins: PinBudget | None = None,
        evictable: Callable[[torch.device], int] = lambda device: 0,
        watch: Watch = lambda progress: None,
    ) -> None:
        self.blocks = blocks
        self.outline = blocks.outline
        self.backend = backend
        self.config = config
        self.counters = Counters()
        self.plan: Plan | None = None
        self._root = weakref.ref(root)
        self._guard = threading.RLock()
        self._depth = 0
        self._lent = False
        self._unbuilt = False
        self._steps_before = 0
        self._pins = pins
        self._evictable = evictable
        self._watch = watch
        self._planner = Planner(self.outline, config)
        self._verifier = self._make_verifier()
        self._equip(backend)

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What of the model is where."""
        return self._steps.state

    @property
    def last_used(self) -> float:
        """When it was loaded or began a step, on time's monotonic clock."""
        return self._steps.last_used

    @property
    def model_bytes(self) -> int:
        return self.outline.model_bytes

    @property
    def minimum_bytes(self) -> int:
        """The least device memory with which this model streams; less once the order of its parts is known."""
        return self._planner.minimum_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes on the device now."""
        return self.backend.allocated

    @property
    def holders(self) -> set[int]:
        """Identities of the dictionaries of parameters and buffers whose tensors this streamer places."""
        return {id(place.holder) for value in self.blocks.values for place in value.places}

    def memory(self) -> DeviceMemory:
        """What the device has left, with what others would give up counted as free."""
        free, cached = self.backend.memory()
        return DeviceMemory(free + self._evictable(self.backend.device), cached)

    # -- plans ---------------------------------------------------------------------------------------------------

    @property
    def profile(self) -> Profile:
        """What is known of the next step."""
        return self._planner.profile

    @property
    def standing(self) -> Standing:
        """How the model stands on the device now."""
        device_bytes = self.device_bytes
        if self.plan is not None and self._steps.lane is None:
            device_bytes += self.plan.staging_bytes  # Slots that went with the master copies come back.
        return Standing(self.state, self.plan, device_bytes, self.backend.budget)

    def prompt_budget(self, offered: float) -> float:
        """Bytes to use for the next prompt: ``offered``, or what earlier steps have shown to be possible."""
        return self._planner.prompt_budget(self.memory(), self.device_bytes, offered)

    def plan_for(self, budget: float) -> Plan:
        """The plan that :meth:`load` would carry out with ``budget`` bytes, the configured limit respected.

        Raises:
            BudgetError: too little for the least that streams.
        """
        return self._planner.plan_for(budget)

    def next_plan(self, budget: float) -> Plan:
        """The plan in effect, where that fits into ``budget`` and another would gain too little; else a new one."""
        return self._planner.next_plan(budget, self.standing)

    # -- load and unload -----------------------------------------------------------------------------------------

    def load(self, plan: Plan, patches: Patches | None = None) -> None:
        """Bring the model into the state that ``plan`` describes, with ``patches`` in its weights.

        Only differences to the present state cost anything: a second call with the same arguments does nothing.
        After an error the model is unloaded and all device memory is given back.
        """
        with self._occupied():
            self._load(plan, patches or NoPatches())

    def _load(self, plan: Plan, patches: Patches) -> None:
        self._steps.last_used = time.monotonic()
        if self._is_as_wished(plan, patches):
            self._put_away()
            return self.keep(plan)
        try:
            self._halt()
            self._steps.drop_lane()
            unread = self._placement.unread_bytes(plan)
            if self.state is State.UNLOADED:
                self._supply.begin(unread)
                self._steps_before = self.counters.steps
            self._supply.arena.begin()
            self.backend.open(self.config.copy_streams)
            self.plan = plan
            self._placement.carry_out(plan, patches)
            self._unbuilt = True
            if self._has_run:
                self._build()
            self._placement.bake(plan, patches)
            self._placement.bind()
            if plan.segments:
                self._steps.lane = self._make_lane(plan)
            self.attach_hooks()
            if self._steps.lane is not None:
                self._steps.lane.prefetch()
            self._steps.state = State.LOADED
            seconds = time.monotonic() - self._steps.last_used
            logger.debug("loaded in %.3f s; %s had no copy before", seconds, format_bytes(unread))
            self._put_away()
        except BaseException:
            self.unload()
            raise

    def _is_as_wished(self, plan: Plan, patches: Patches) -> bool:
        if self.state is not State.LOADED or plan != self.plan:
            return False
        return not (self._placement.is_stale(plan, patches) or self._placement.lacks(plan))

    def prepare(self, budget: float) -> None:
        """The model will be loaded with at most ``budget`` bytes: begin to build what streams then.

        Which that is follows from one order of residency, so what a smaller budget streams includes it.
        """
        if self.state is State.UNLOADED:
            plan = self._planner.plan_within(budget)
            self._supply.builder.stop()  # Called again: two may not build the same.
            self._placement.adopt()
            self._supply.build_behind(self._placement.unbuilt(plan), self)

    def build(self) -> None:
        """Before a step that is not the first: build what nobody has tried to (builder.py, Note: when to build)."""
        if self._unbuilt and self._has_run:
            self.finish_building()

    @property
    def _has_run(self) -> bool:
        """Whether a whole step has run since the model was loaded."""
        return self.counters.steps > self._steps_before

    def _build(self) -> None:
        assert self.plan is not None
        try:
            self._supply.build(self._placement.unbuilt(self.plan), self)
            self._unbuilt = False
        finally:
            self._placement.adopt()

    @property
    def reader(self) -> Reader:
        """Brings to the device what has no page-locked master copy."""
        return self._supply.reader

    @property
    def building(self) -> bool:
        """Whether master copies are being built, or will be before the next step."""
        return self._unbuilt or self._supply.builder.active

    @property
    def arriving(self) -> bool:
        """Whether residents are still on their way."""
        return bool(self._placement.arriving)

    def arrive_all(self) -> None:
        """Wait until every resident is there."""
        self._placement.arrive_all()

    def finish_building(self) -> None:
        """Build all master copies that are wanted and missing, those before the second step included."""
        self._supply.builder.wait(self._supply.tick)
        if self._unbuilt:
            self.drain()
            self._build()
            self._placement.bind()
            if self._steps.lane is not None:
                self._steps.lane.refresh()

    def _put_away(self) -> None:
        """Give the reader's ring back once everything streams from page-locked memory."""
        if self._supply.reader.ring_bytes and not self._placement.arriving:
            self._placement.adopt()
            if self._placement.pinned_bytes(self.plan) == self.plan.streamed_bytes:
                self._supply.reader.flush()
                self._supply.reader.close()

    def load_within(self, plan: Plan, load: Callable[[Plan], None] | None = None) -> None:
        """Load ``plan``; where there is no room for it after all, the next smaller one, down to the least.

        ``load`` calls :meth:`load` with the plan that it is given and the patches that are in the weights. By default
        there are none.
        """
        load = load or self.load
        while True:
            try:
                return load(plan)
            except Exception as error:
                if not is_out_of_memory(error) or plan.device_bytes <= self.minimum_bytes:
                    raise
                logger.warning("no room for %s of weights on %s", format_bytes(plan.device_bytes), self.backend.name)
            plan = self._planner.plan_within(plan.device_bytes * (1 - NO_ROOM_SHARE))

    def keep(self, plan: Plan) -> None:
        """``plan`` is the one in effect; its forecast may be another."""
        self.plan = plan

    def expect_compiled(self, compiled: bool) -> None:
        """Whether torch.compile runs the steps of later plans (hooks.py, Note: compiled models)."""
        self._planner.expect_compiled(compiled)

    def begin_prompt(self) -> None:
        """The host has loaded the model, and may have tidied the device up: what torch keeps now says nothing.

        What could not be page-locked before may be possible now.
        """
        self._planner.begin_prompt()
        if self.plan is not None and self._placement.unbuilt(self.plan):
            self._supply.arena.begin()
            self._unbuilt = True

    def give_way(self, nbytes: int) -> int:
        """Give up residents until ``nbytes`` are free, at once and without making anything in their place.

        Gives the bytes that were freed; fewer where residents were not enough.
        """
        if self.state is State.UNLOADED or self.plan is None or nbytes <= 0:
            return 0
        before = self.device_bytes
        if self._placement.arriving:
            self._halt()  # What is still on its way need not come.
        else:
            self.drain()
        resident = set(self.plan.resident)
        for unit in reversed(order_of_residency(self.outline, self.profile)):
            if before - self.device_bytes >= nbytes:
                break
            if unit in resident:
                self._placement.drop_residents([unit])
        freed = before - self.device_bytes
        if freed or self._placement.lacks(self.plan):
            self._steps.state = State.REDUCED
        return freed

    def step_down(self) -> None:
        """Copy synchronously from now on, also in the middle of a step. Nothing is on its way afterwards."""
        self._supply.reader.flush()
        self.backend.synchronize()
        if self.config.synchronous:
            return
        self.config = replace(self.config, copy_streams=0)
        self.backend.open(0)
        self._planner.configure(self.config)
        if self._steps.lane is not None:
            self._steps.lane.copy_nothing_ahead()

    def unload(self) -> None:
        """Take everything off the device; the modules use the originals again. Master copies stay."""
        self._halt()
        self._runner.finish(self)
        self._planner.begin_prompt()
        self._steps.detach()
        self._steps.drop_lane()
        self._placement.clear_device()
        self._supply.reader.close()
        self.plan = None
        self._steps.state = State.UNLOADED
        self._unbuilt = False

    def give_up_masters(self, nbytes: int) -> int:
        """Free at least ``nbytes`` of page-locked memory, or all, for another model; gives what was freed.

        Nothing while a step runs or a plan is carried out, on this thread or another, and while somebody has written to
        the master copies. The next load, or the next step, makes what this model needs instead.
        """
        if not self._guard.acquire(blocking=False):
            return 0
        try:
            return 0 if self._depth or self._lent else self._give_up_masters(nbytes)
        finally:
            self._guard.release()

    def _give_up_masters(self, nbytes: int) -> int:
        self._halt()
        before = self._supply.reader.ring_bytes
        self._supply.reader.close()
        freed = before + self._placement.drop_masters(nbytes)
        if freed and self.state is not State.UNLOADED:
            self._steps.drop_lane()
            self._steps.state = State.REDUCED
        return freed

    @contextmanager
    def _occupied(self) -> Iterator[None]:
        """While this lasts nobody takes master copies away."""
        with self._guard:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def make_masters(self, names: Collection[str]) -> None:
        """Somebody will write to these tensors where the modules point, which must not be what was loaded."""
        if self.state is State.UNLOADED or self.plan is None:
            return
        self._placement.arrive_all()
        self._halt()
        try:
            self._placement.make_masters(names)
        finally:
            self._placement.bind()
            if self._steps.lane is not None:
                self._steps.lane.refresh()
            self._unbuilt = True

    def lend_masters(self) -> None:
        """Somebody has written to master copies: they stay until :meth:`take_masters_back`."""
        self._lent = True

    def take_masters_back(self) -> None:
        """What somebody has written to master copies is undone."""
        self._lent = False

    def invalidate(self) -> None:
        """Weights were changed in place, by somebody else, on the device or in master copies: copy them anew."""
        if self._steps.lane is not None:
            self.drain()
            self._steps.lane.forget()

    @contextmanager
    def originals(self) -> Iterator[None]:
        """Point the modules at the weights as loaded, for code that reads them; not while a block runs."""
        self.settle()
        self._placement.check_sources()
        self._placement.bind_originals()
        try:
            yield
        finally:
            if self.state is not State.UNLOADED:
                self._placement.bind()

    def move_to(self, backend: Backend) -> None:
        """Stream to another device from the next load on."""
        self.close()
        self._finalizer.detach()
        self.backend = backend
        self._equip(backend)
        self._planner.change_device()

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
            self._planner = Planner(self.outline, config)
            self.move_to(self.backend)

    def close(self) -> None:
        """Unload, free the master copies, end the copy streams. The streamer can be loaded again."""
        self.unload()
        self._supply.close()
        self._placement.clear_host()
        self.backend.close()

    def drain(self) -> None:
        """Let every copy and every kernel that uses our memory finish (lane.py, Note: two events guard a slot, 4)."""
        self.settle()
        self._supply.reader.flush()
        self.backend.synchronize()

    def _halt(self) -> None:
        """As :meth:`drain`, but what is not queued yet is given up, and nothing is being built any more."""
        self.settle()
        self._supply.halt()
        self.backend.synchronize()
        self._placement.adopt()
        self._placement.stop_awaiting()

    def _equip(self, backend: Backend) -> None:
        """Have what it takes to stream to ``backend``."""
        largest = max(unit.nbytes for unit in (*self.blocks.units, self.blocks.rest))
        self._supply = Supply(backend, self.config, largest, self._pins, self._watch)
        self._placement = Placement(self.blocks, backend, self._supply, self._verifier)
        self._supply.arena.budget.join(self)
        self._meters = Meters(backend, self.counters)
        self._steps = Steps(self._root, self.blocks, self._placement, self._planner, self._meters)
        self._runner = Runner(self._planner, self._meters.stalls)
        self._finalizer = _close_at_end(self, self._supply, backend)

    def _make_verifier(self) -> NoVerifier:
        return Verifier(self.blocks, self.counters, self.step_down) if self.config.verify else NoVerifier()

    def _make_lane(self, plan: Plan) -> Lane:
        streams = self.config.copy_streams
        supply, meters = self._supply, self._meters
        return self._verifier.make_lane(
            self.backend, plan, self._placement.copies, supply.reader, streams, meters, supply.tick
        )

    def attach_hooks(self) -> None:
        """Hear of what is streamed, and of everything while a step is measured."""
        assert self.plan is not None
        self._steps.attach(self.plan, self._runner.recorder)

    def settle(self) -> None:
        """Release what an exception or an interrupt left bound. Harmless when there is nothing."""
        self._steps.settle()

    # -- one step ------------------------------------------------------------------------------------------------

    def run(
        self,
        forward: Callable[[], T],
        shape: Hashable = None,
        reload: Callable[[Plan], None] | None = None,
        estimate: Callable[[], int] | None = None,
    ) -> T:
        """Run one step, ``forward``, and make good use of what the steps before it have shown.

        A step that runs out of device memory is run again: at first with what torch keeps for later given back, which
        may only have been cut up badly; then with a little less on the device, with much less, and with the least that
        works. Whatever happens, no unit stays bound to a slot.

        Args:
            forward: calls the root; it may be called again after it has run out of memory.
            shape: equal for steps that need the same memory and time.
            reload: calls :meth:`load` with the plan that it is given and the patches that are in the weights. By
                default there are none.
            estimate: gives the bytes that activations may take, for a shape that has not run yet.
        """
        with self._occupied():
            return self._runner.run(self, forward, shape, reload or self.load, estimate)

    # -- telling -------------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """The plan in effect and where what it streams comes from, in a line."""
        return explain(self.standing, self._placement, self._supply, self.building, self._verifier.finding)

    def snapshot(self) -> Snapshot:
        """The state now, for any thread. Waits for nothing and changes nothing."""
        now = self.standing  # Once: another thread may load or unload meanwhile.
        told = (self.config, self.profile, self._meters.step.seconds, self.counters, self.building)
        told = (*told, self._verifier.finding)
        return take_snapshot(now, self._placement, self._supply, self.backend, *told)


def _close_at_end(streamer: Streamer, supply: Supply, backend: Backend) -> weakref.finalize:
    """End threads and streams before the streamer's memory goes, also when a model is dropped without unloading."""
    finalizer = weakref.finalize(streamer, _close, supply, backend)
    finalizer.atexit = False
    return finalizer


def _close(supply: Supply, backend: Backend) -> None:
    supply.forsake()
    backend.close()
