"""A model that streams to a device, from load to unload: where its weights are, and what that costs in memory."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from .config import StreamingConfig, format_bytes
from .devices.backend import Backend, is_out_of_memory
from .group import Group
from .measuring import Measuring
from .memory.changes import Changes
from .memory.host_memory import PinBudget
from .memory.reader import Reader
from .memory.supply import Watch
from .memory.weights import NoPatches, Patches
from .model.blocks import BlockSet
from .packing_choice import PackingChoice
from .planning.packing import Refusals
from .planning.plan import Plan
from .planning.planner import Planner
from .planning.profile import Profile
from .planning.spread import order_of_residency
from .planning.state import Standing, State
from .planning.vram_budget import DeviceMemory
from .run.site import Site
from .run.step_log import StepLog
from .run.steps import Steps
from .run.telemetry import Counters, Run
from .run.verify import ChecksumVerifier, Verifier
from .sharing.share import NoShare

logger = logging.getLogger(__name__)

# When there is no room for a plan, the next one is smaller by this share.
NO_ROOM_SHARE = 0.1

# A host that is late takes about as long to launch a step as the step, and longer for one that is measured. One that
# takes more than this has a device that takes as long: it is not late there.
HEAD_START = 1.5
MOST_HEAD_START = 0.75


class Loading:
    """Brings the weights of a model where plans want them. :class:`Streamer` runs the steps.

    Args:
        root: the module whose forward is one step; its blocks run inside it.
        blocks: the model cut into blocks, units and rest (:func:`streaming.model.blocks.cut_model`).
        backend: the device.
        config: settings.
        pins: page-locked memory that this model shares with others; None makes a budget of its own without limit.
        evictable: returns how many bytes others on a device would give up for us, beside what is free.
        watch: is called with the progress of loading, and may raise to cancel it.
        group: the streamers of a model on several devices; what one computes, and waits for, lies between the blocks of
            the others. None for a streamer alone.
        share: where copies come from that others have too; None takes that of ``pins``.

    Attributes:
        group: see above.
        planner: decides what to have on the device.
        measuring: measures steps that teach it something.
        packing_choice: finds out whether weights should stream packed.
        site: where the weights are.
        plan: in effect; None while unloaded.
        moves: how often weights were loaded, given up or unloaded.
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
        group: Group | None = None,
        share: NoShare | None = None,
    ) -> None:
        self.blocks = blocks
        self.outline = blocks.outline
        self.backend = backend
        self.config = config
        self.counters = Counters()
        self.step_log = StepLog()
        self.moves = 0
        self._run_began = Counters()
        self._last_run: Run | None = None
        self.plan: Plan | None = None
        self._root = weakref.ref(root)
        self._guard = threading.RLock()
        self._depth = 0
        self._lent = False
        self._touches = 0
        self._steps_before = 0
        self._pins = pins
        self._share = share
        self._evictable = evictable
        self._watch = watch
        self.group = Group() if group is None else group
        self._seconds_of = self.group.join(self)
        self.planner = self._make_planner()
        self._verifier = self._make_verifier()
        self._equip(backend)
        self.site.weight_copies.show()

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Whether the model is unloaded, loaded or reduced."""
        return self._steps.state

    @property
    def shares_copies(self) -> bool:
        """Whether others may have its copies, or it theirs, so that patches need identities (weights.py)."""
        return bool(self.site.supply.arena.share.address)

    @property
    def root(self) -> nn.Module:
        """The module whose forward is one step."""
        root = self._root()
        assert root is not None
        return root

    @property
    def has_model(self) -> bool:
        """Whether the model still exists."""
        return self._root() is not None

    @property
    def running(self) -> bool:
        """Whether a step runs, or a plan is carried out."""
        return self._depth > 0

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
        return self.planner.minimum_bytes

    @property
    def least_limit_bytes(self) -> int:
        """The least limit of device memory that may be set: with it the model streams from its first step on."""
        return self.planner.least_limit_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes on the device now."""
        return self.backend.allocated

    def memory(self) -> DeviceMemory:
        """What the device has left, with what others would give up counted as free."""
        free, cached = self.backend.memory()
        return DeviceMemory(free + self._evictable(self.backend.device), cached)

    # -- plans ---------------------------------------------------------------------------------------------------

    @property
    def profile(self) -> Profile:
        """What is known of the next step."""
        return self.planner.profile

    @property
    def doubts(self) -> bool:
        """Whether a step was over sooner than its compute alone was measured to take."""
        return self.planner.doubts(self.site.meters.step.times().last)

    @property
    def head_start(self) -> float:
        """Seconds by which the host is to be ahead of the device in the next step, if that is measured once more."""
        last = self.site.meters.step.times().last
        return min(HEAD_START * (last or 0.0), MOST_HEAD_START) if self.planner.vram.current.doubts else 0.0

    def measure_again(self) -> None:
        """The next step teaches its times once more."""
        self.planner.measure_again()

    def learn(self) -> None:
        """Keep what the step before has shown, if it was measured; waits for the device then. No step runs."""
        self.measuring.learn(self.drain)
        if self.packing_choice.learn(self.plan):
            self.measuring.expect_plan()  # Not always after a step that was measured: less memory makes plans longer.

    @property
    def standing(self) -> Standing:
        """How the model stands on the device now."""
        device_bytes = self.device_bytes
        if self.plan is not None and self.site.lane is None:
            # The next load allocates the slots again.
            device_bytes += self.plan.staging_bytes + self.plan.unpacking_bytes
        return Standing(self.state, self.plan, device_bytes, self.backend.budget)

    def prompt_budget(self, offered: float) -> float:
        """Bytes to use for the next prompt: ``offered``, or what earlier steps have shown to be possible."""
        return self.planner.vram.prompt_budget(self.memory(), self.device_bytes, offered)

    def plan_for(self, budget: float) -> Plan:
        """The plan that :meth:`load` would carry out with ``budget`` bytes, the configured limit respected.

        Raises:
            BudgetError: too little for the least that streams.
        """
        return self.planner.plan_for(budget)

    def next_plan(self, budget: float) -> Plan:
        """The plan in effect, where that fits into ``budget`` and another would gain too little; else a new one."""
        return self.planner.next_plan(budget, self.standing)

    # -- load and unload -----------------------------------------------------------------------------------------

    def load(self, plan: Plan, patches: Patches | None = None) -> None:
        """Bring the model into the state that ``plan`` describes, with ``patches`` in its weights.

        Only differences to the present state cost anything: a second call with the same arguments does nothing.
        After an error the model is unloaded and all device memory is given back.
        """
        patches = patches or NoPatches()
        with self._occupied():
            try:
                plan = self._plan_what_may_fit(plan, patches)
                while refused := self._load(plan, patches):
                    self.planner.refusals |= refused
                    plan = self.planner.plan_within(plan.budget)
            except BaseException:
                if self.state is not State.UNLOADED:
                    self.unload()
                raise

    def _plan_what_may_fit(self, plan: Plan, patches: Patches) -> Plan:
        """Return ``plan``, or one that packs units which were too large with other patches than these."""
        refusals = self.planner.refusals
        if not (fit := self.site.weight_copies.may_fit(refusals.too_large, patches)):
            return plan
        self.planner.refusals = replace(refusals, too_large=refusals.too_large - fit)
        other = self.planner.plan_within(plan.budget) if fit & plan.streamed else plan
        return other if fit & other.packed else plan

    def _load(self, plan: Plan, patches: Patches) -> Refusals:
        """Load ``plan``; returns the units that cannot be packed: where there are some, another plan is needed."""
        if refused := self.site.weight_copies.unpackable(plan):
            return refused
        self._steps.last_used = time.monotonic()
        if self._is_as_wished(plan, patches):
            self.site.put_away(plan)
            self.keep(plan)
            return Refusals()
        self.moves += 1
        try:
            self.site.halt()
            self.site.drop_lane()
            unread = self.site.weight_copies.unread_bytes(plan)
            if self.state is State.UNLOADED:
                self.site.supply.begin(unread)
                self._steps_before = self.counters.steps
            self.plan = plan
            self.planner.note_plan(plan)
            refused = self.site.carry_out(plan, patches, self.config.copy_streams, self, builds=self._has_run)
            if refused:
                self._steps.state = State.REDUCED
                return refused
            self.attach_hooks()
            self.site.prefetch()
            self._steps.state = State.LOADED
            self.packing_choice.compile_ahead(plan)
            seconds = time.monotonic() - self._steps.last_used
            logger.debug("loaded in %.3f s; %s had no copy before", seconds, format_bytes(unread))
            self.site.put_away(plan)
        except BaseException:
            self.unload()
            raise
        return Refusals()

    def _is_as_wished(self, plan: Plan, patches: Patches) -> bool:
        if self.state is not State.LOADED or plan != self.plan:
            return False
        weights = self.site.weight_copies
        return not (weights.is_stale(plan, patches) or weights.lacks(plan))

    def prepare(self, budget: float) -> None:
        """The model will be loaded with at most ``budget`` bytes: begin to build what streams then.

        Units become resident in one order, so a smaller budget streams these units too.
        """
        if self.state is State.UNLOADED:
            self.site.prepare(self.planner.plan_within(budget), self)

    def build(self) -> None:
        """Before a step that is not the first: build what was not tried yet (builder.py, Note: when to build)."""
        if self.site.unbuilt and self._has_run:
            self.finish_building()

    def finish_building(self) -> None:
        """Build all master copies that are wanted and missing, those before the second step included."""
        self.site.finish_building(self.plan, self)

    @property
    def building(self) -> bool:
        """Whether master copies are being built, or will be before the next step."""
        return self.site.building

    @property
    def _has_run(self) -> bool:
        """Whether a whole step has run since the model was loaded."""
        return self.counters.steps > self._steps_before

    @property
    def reader(self) -> Reader:
        """Brings to the device what has no page-locked master copy."""
        return self.site.supply.reader

    @property
    def arriving(self) -> bool:
        """Whether residents are still on their way."""
        return bool(self.site.weight_copies.arriving)

    def arrive_all(self) -> None:
        """Wait until every resident is there."""
        self.site.weight_copies.arrive_all()

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
            plan = self.planner.plan_within(plan.device_bytes * (1 - NO_ROOM_SHARE))

    def keep(self, plan: Plan) -> None:
        """Take ``plan`` for the one in effect, which it equals; budget, forecast and the like may differ."""
        self.plan = plan

    def begin_prompt(self) -> None:
        """The host has loaded the model, and may have freed cached memory of torch: what torch keeps now says nothing.

        Page-locking that failed before may succeed now.
        """
        self.planner.vram.begin_prompt()
        if self.plan is not None:
            self.site.retry_building(self.plan)

    def give_way(self, nbytes: int) -> int:
        """Give up residents until ``nbytes`` are free, at once and without making anything in their place.

        Returns the bytes that were freed; fewer where residents were not enough.
        """
        if self.state is State.UNLOADED or self.plan is None or nbytes <= 0:
            return 0
        self.moves += 1
        resident = set(self.plan.resident)
        order = reversed(order_of_residency(self.outline, self.profile))
        freed = self.site.give_way(nbytes, [unit for unit in order if unit in resident])
        if freed or self.site.weight_copies.lacks(self.plan):
            self._steps.state = State.REDUCED
        return freed

    def step_down(self) -> None:
        """Copy synchronously from now on, also in the middle of a step. Nothing is on its way afterwards."""
        self.site.finish_copies()
        if not self.config.synchronous:
            self.config = replace(self.config, copy_streams=0)
            self.planner.configure(self.config)
            self.packing_choice.configure(self.config)
            self.site.copy_synchronously()

    def unload(self) -> None:
        """Take everything off the device; the modules use the originals again. Master copies stay."""
        self.moves += 1
        self.site.halt()
        self.measuring.finish(self.drain)
        self.planner.vram.begin_prompt()
        self._steps.detach()
        changes = self._last_changes()
        self.site.clear_device()
        changes.show()
        self.plan = None
        self._steps.state = State.UNLOADED

    # -- giving memory back --------------------------------------------------------------------------------------

    def changes(self, exchanged: Set[str] = frozenset()) -> Changes:
        """What other code has written to, exchanged or deleted since the model was laid out; not while a block runs.

        What hooks of the host have written is undone later, and is no change.

        Args:
            exchanged: full names of tensors that the host itself exchanges while a model is loaded.
        """
        return Changes() if self._lent else self.site.weight_copies.changes(exchanged)

    def take_overwritten(self) -> list[str]:
        """Names of units that were written to in a slot, so that the writes are lost; each is returned once."""
        overwritten = self.site.meters.overwritten
        if not overwritten:
            return overwritten
        found = sorted(set(overwritten))
        overwritten.clear()
        return found

    def _last_changes(self) -> Changes:
        try:
            return self.changes()
        except Exception as error:  # A device that has failed must be cleared all the same.
            logger.warning("what was written to weights on %s is lost: %s", self.backend.name, error)
            return Changes()

    def give_up_masters(self, nbytes: int) -> int:
        """Free at least ``nbytes`` of page-locked memory, or all, for another model; returns the bytes that were freed.

        It frees nothing while a step runs or a plan is carried out, on this thread or another, nor while other code has
        written to the master copies. The next load, or the next step, makes what this model needs instead.
        """
        if not self._guard.acquire(blocking=False):
            return 0
        try:
            return 0 if self._depth or self._lent else self._give_up_masters(nbytes)
        finally:
            self._guard.release()

    def _give_up_masters(self, nbytes: int) -> int:
        freed = self.site.give_up_masters(nbytes)
        if freed and self.state is not State.UNLOADED:
            self.site.drop_lane()
            self._steps.state = State.REDUCED
        return freed

    @contextmanager
    def _occupied(self) -> Iterator[None]:
        """While this lasts no other model takes master copies away."""
        with self._guard:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def move_to(self, backend: Backend) -> None:
        """Stream to another device from the next load on."""
        self.unload()
        self.site.leave()
        self.backend = backend
        self._equip(backend)
        self.planner.change_device()

    def close(self) -> None:
        """Unload, free the master copies, end the copy streams. The streamer can be loaded again."""
        self.unload()
        self.site.close()

    def drain(self) -> None:
        """Let every copy and every kernel that uses our memory finish."""
        self.site.drain()

    def _equip(self, backend: Backend) -> None:
        """Make what is needed to stream to ``backend``."""
        told = (self._pins, self._watch, self.counters, self._verifier, self.group.listeners, self._share)
        self.site = Site(self.blocks, backend, self.config, *told)
        self.site.supply.arena.budget.join(self)
        self.site.meters.step.log = self.step_log  # It stays when the device changes, or a setting.
        self._steps = Steps(self._root, self.blocks, self.site, self.planner)
        self.measuring = Measuring(self.planner, self.group)
        self.packing_choice = PackingChoice(self.blocks, self.site, self.planner, self.config, self._seconds_of)

    def _make_planner(self) -> Planner:
        return Planner(self.outline, self.config, self._seconds_of)

    def _make_verifier(self, blocks: BlockSet | None = None) -> Verifier:
        return (
            ChecksumVerifier(blocks or self.blocks, self.counters, self.step_down) if self.config.verify else Verifier()
        )

    @property
    def steps_of_run(self) -> int:
        """Whole steps since the host got the model ready to run."""
        return self.counters.steps - self._run_began.steps

    def is_hooked(self, recorded: bool) -> bool:
        """Whether hooks are as the next step needs them: there to record it if it is to be ``recorded``, else not."""
        recorder = self.measuring.recorder
        return self._steps.recorder is recorder and (recorder is not None) == recorded

    def attach_hooks(self) -> None:
        """Hook what is streamed, and everything while a step is measured."""
        assert self.plan is not None
        self._steps.attach(self.plan, self.measuring.recorder)

    def settle(self) -> None:
        """Release what an exception or an interrupt left bound. Harmless when there is nothing."""
        self._steps.settle()
        self.site.settle()
