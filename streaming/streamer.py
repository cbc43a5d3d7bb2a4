"""The life cycle of a streamed model: load -> (run a step)* -> unload, and what the first steps teach it.

[Note: who keeps whom alive]
The model owns its streamer. The streamer refers to the root weakly, and to the blocks, their dictionaries of
parameters and buffers, and hook handles. The hooks refer to the streamer weakly. There is no cycle, so a model is
freed, and its page-locked memory with it, when the last reference to it goes.

[Note: what the first steps teach]
Before the first step nobody knows in which order the parts of a block run, or whether each of them runs as a module at
all (some code reads a layer's weight without calling it). So in that step all that is streamed of a block is one
segment, on the device from the block's begin to its end, and hooks write down who runs. From then on segments are parts
of blocks. Copies are timed, and in step two each unit too, less its waits; the plan for step three is made from that,
and then stays. Making a plan waits for the device; that is done after the first two steps of a shape, and when memory
asks for it (residency.py).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from .arena import Arena, PinBudget
from .backend import Backend, DeviceMemory, is_out_of_memory
from .blocks import BlockSet
from .config import StreamingConfig, format_bytes
from .errors import StreamingError
from .hooks import attach
from .lane import Lane
from .masters import NoPatches, Patches
from .placement import Placement
from .plan import Plan, forecast_seconds, make_plan, minimum_bytes, with_forecast
from .profile import Outline, Profile, assumed_profile
from .recorder import Recorder
from .residency import MEASURED_STEPS, SHORTAGE, Regime, Residency
from .spread import best_order, order_of_residency
from .telemetry import Counters, Snapshot, StallMeter, StepMeter

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A plan that is predicted to gain less than this is not worth moving weights for.
WORTHWHILE = 0.02
# Nor is giving memory back, where nobody asks for it, that is less than this part of the model.
MUCH = 0.1
# What is offered moves between prompts, and shrinks after the first, when libraries have loaded their kernels. Moving
# weights for that costs more than it gains.
MOST_SLACK = 400 * 1024**2
# Out of memory: these parts of what is on the device go, one after another, until the step runs.
OUT_OF_MEMORY_SHARES = (0.03, 0.2, 1.0)
# No room for a plan: the next one is by this part smaller.
NO_ROOM_SHARE = 0.1


class State(Enum):
    """What of a streamed model is where.

    UNLOADED: modules use the originals; nothing on the device. Master copies made earlier are kept in host memory.
    LOADED: the rest and the resident units are on the device, the ring too; streamed units have master copies.
    REDUCED: as LOADED, but some residents were given up and nothing made in their place. The next load, or the next
        step, makes the model whole.
    """

    UNLOADED = "unloaded"
    LOADED = "loaded"
    REDUCED = "reduced"


class Streamer:
    """Streams one model to one device. One for each loaded model, shared by all who use the model.

    Args:
        root: the module whose forward is one step; its blocks run inside it.
        blocks: the model cut into blocks, units and rest (:func:`streaming.blocks.split_model`).
        backend: the device.
        config: settings.
        pins: page-locked memory that this model shares with others; None is a budget of its own without limit.
        evictable: tells how many bytes others on a device would give up for us, beside what is free.
    """

    def __init__(
        self,
        root: nn.Module,
        blocks: BlockSet,
        backend: Backend,
        config: StreamingConfig,
        pins: PinBudget | None = None,
        evictable: Callable[[torch.device], int] = lambda device: 0,
    ) -> None:
        self.blocks = blocks
        self.outline = blocks.outline
        self.backend = backend
        self.config = config
        self.counters = Counters()
        self.plan: Plan | None = None
        self.profile = _with_best_order(self.outline, assumed_profile(self.outline))
        self.state = State.UNLOADED
        self._root = weakref.ref(root)
        self._pins = pins
        self._evictable = evictable
        self._placement = self._place_on(backend)
        self._residency = Residency(config.headroom_bytes, config.adaptive)
        self._lane: Lane | None = None
        self._recorder: Recorder | None = None
        self._whole_blocks = False
        self._stalls = StallMeter(self.counters)
        self._steps = StepMeter(backend)
        self._hooks: list[Any] = []
        self._finalizer = _close_at_end(self, backend)

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def model_bytes(self) -> int:
        return self.outline.model_bytes

    @property
    def minimum_bytes(self) -> int:
        """The least device memory with which this model streams; less once the order of its parts is known."""
        return minimum_bytes(self.outline, self.profile)

    @property
    def device_bytes(self) -> int:
        """Bytes on the device now."""
        return self.backend.allocated

    @property
    def holders(self) -> set[int]:
        """Identities of the dictionaries of parameters and buffers whose tensors this streamer places."""
        return {id(place.holder) for spec in self.blocks.specs for place in spec.places}

    def memory(self) -> DeviceMemory:
        """What the device has left, with what others would give up counted as free."""
        free, cached = self.backend.memory()
        return DeviceMemory(free + self._evictable(self.backend.device), cached)

    def prompt_budget(self, offered: float) -> float:
        """Bytes to use for the next prompt: ``offered``, or what earlier steps have shown to be possible."""
        return self._residency.prompt_budget(self.memory(), self.device_bytes, offered)

    def plan_for(self, budget: float) -> Plan:
        """The plan that :meth:`load` would carry out with ``budget`` bytes, the configured limit respected.

        Raises:
            BudgetError: too little for the least that streams.
        """
        if self.config.vram_limit is not None:
            budget = min(budget, self.config.vram_limit)
        return make_plan(self.outline, self.profile, budget, self.config)

    def next_plan(self, budget: float) -> Plan:
        """The plan in effect, where that fits into ``budget`` and another would gain too little; else a new one."""
        plan, current = self.plan_for(budget), self.plan
        if current is None or (current.segments and current.learned != plan.learned):
            return plan
        if current.device_bytes > plan.budget + self._slack or self._is_worthwhile(plan):
            return plan
        return with_forecast(replace(current, budget=plan.budget), self.profile, self.config)

    @property
    def _slack(self) -> int:
        """Bytes beyond a budget that are not worth moving weights for."""
        if self.backend.budget is not None or self.state is not State.LOADED:
            return 0
        if self.profile.measured:
            return int(self.config.headroom_bytes * SHORTAGE)
        return min(MOST_SLACK, self.model_bytes // 50)

    def _is_worthwhile(self, plan: Plan) -> bool:
        """Whether ``plan`` makes a step faster than the one in effect by enough, or takes much less memory for it."""
        assert self.plan is not None
        gain = 1 - forecast_seconds(plan, self.profile) / forecast_seconds(self.plan, self.profile)
        saved = self.device_bytes - plan.device_bytes
        return gain >= WORTHWHILE or (plan.budget > self.device_bytes and gain >= 0 and saved > MUCH * self.model_bytes)

    # -- load and unload -----------------------------------------------------------------------------------------

    def load(self, plan: Plan, patches: Patches | None = None) -> None:
        """Bring the model into the state that ``plan`` describes, with ``patches`` in its weights.

        Only differences to the present state cost anything: a second call with the same arguments does nothing.
        After an error the model is unloaded and all device memory is given back.
        """
        patches = patches or NoPatches()
        if self.state is State.LOADED and plan == self.plan and not self._placement.is_stale(plan, patches):
            self.plan = plan  # Its forecast may be another.
            return
        try:
            self._drain()
            self._drop_lane()
            self.plan = plan
            self._placement.carry_out(plan)
            self._placement.bake(plan, patches)
            self._placement.bind()
            if plan.segments:
                self._lane = self._make_lane(plan)
            self._attach(plan)
            if self._lane is not None:
                self._lane.prefetch()
        except BaseException:
            self.unload()
            raise
        self.state = State.LOADED

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
            plan = self._plan_within(plan.device_bytes * (1 - NO_ROOM_SHARE))

    def begin_prompt(self) -> None:
        """The host has loaded the model, and may have tidied the device up: what torch keeps now says nothing."""
        self._residency.begin_prompt()

    def give_way(self, nbytes: int) -> int:
        """Give up residents until ``nbytes`` are free, at once and without making anything in their place.

        Gives the bytes that were freed; fewer where residents were not enough.
        """
        if self.state is State.UNLOADED or self.plan is None or nbytes <= 0:
            return 0
        self._drain()
        before = self.device_bytes
        resident = set(self.plan.resident)
        for unit in reversed(order_of_residency(self.outline, self.profile)):
            if before - self.device_bytes >= nbytes:
                break
            if unit in resident:
                self._placement.drop_residents([unit])
        freed = before - self.device_bytes
        if freed:
            self.state = State.REDUCED
        return freed

    def unload(self) -> None:
        """Take everything off the device; the modules use the originals again. Master copies stay."""
        self._drain()
        self._learn()
        self._stop_recording()
        self.begin_prompt()
        self._detach()
        self._drop_lane()
        self._placement.clear_device()
        self.plan = None
        self.state = State.UNLOADED

    def invalidate(self) -> None:
        """Weights were changed in place, by somebody else, on the device or in master copies: copy them anew."""
        if self._lane is not None:
            self._drain()
            self._lane.forget()

    @contextmanager
    def originals(self) -> Iterator[None]:
        """Point the modules at the weights as loaded, for code that reads them; not while a block runs."""
        self.settle()
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
        self._placement = self._place_on(backend)
        self._residency = Residency(self.config.headroom_bytes, self.config.adaptive)
        self._steps = StepMeter(backend)
        self.profile = replace(self.profile, measured=False)
        self._finalizer = _close_at_end(self, backend)

    def close(self) -> None:
        """Unload, free the master copies, end the copy streams. The streamer can be loaded again."""
        self.unload()
        self._placement.clear_host()
        self.backend.close()

    def _place_on(self, backend: Backend) -> Placement:
        arena = Arena(backend, self.config.pin_memory, self._pins)
        return Placement(self.blocks, backend, arena, self.config.threads)

    def _drain(self) -> None:
        """Let every copy and every kernel that uses our memory finish (lane.py, Note: two events guard a slot, 4)."""
        self.settle()
        self.backend.synchronize()

    def _make_lane(self, plan: Plan) -> Lane:
        streams = self.config.copy_streams
        return Lane(self.backend, plan, self._placement.master, streams, self.counters, self._stalls)

    def _drop_lane(self) -> None:
        if self._lane is not None:
            self._lane.close()
        self._lane = None
        self._stalls.clear()

    def _attach(self, plan: Plan) -> None:
        """Hook what is streamed, and everything while a step is measured."""
        self._detach()
        root = self._root()
        assert root is not None
        blocks = set(self._lane.streamed_blocks) if self._lane is not None else set()
        units = plan.streamed
        if self._recorder is not None:
            blocks, units = range(len(self.blocks.blocks)), range(len(self.blocks.units))
        modules = [(unit, self.blocks.units[unit].module) for unit in sorted(units)]
        self._hooks = attach(
            root,
            [(block, self.blocks.blocks[block].module) for block in sorted(blocks)],
            [(unit, module) for unit, module in modules if module is not None],
            self,
        )

    def _detach(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()

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
        if self.state is State.UNLOADED:
            return forward()
        reload = reload or self.load
        self._adapt(shape, reload, estimate)
        remedies = [self._tidy, *(partial(self._shrink, share, reload) for share in OUT_OF_MEMORY_SHARES)]
        while True:
            try:
                return forward()
            except Exception as error:
                if is_out_of_memory(error) and remedies and self._can_shrink():
                    remedy = remedies.pop(0)
                elif (
                    _is_of_another_device(error) and self.plan is not None and self.plan.learned and self.plan.segments
                ):
                    remedy = partial(self._stream_whole_blocks, reload)
                else:
                    raise
                reason = str(error).partition("\n")[0]
            finally:
                self.settle()
            # Not inside of "except": the error's frames would keep the activations of the failed step alive.
            remedy(reason)

    def _adapt(self, shape: Hashable, reload: Callable[[Plan], None], estimate: Callable[[], int] | None) -> None:
        """Before a step: fit the plan to what is known (Note: what the first steps teach)."""
        ended, measured = self._residency.current, self._learn()
        regime = self._residency.enter(shape)
        # The times of another shape say nothing about this one; the order in which units run does.
        self.profile = regime.profile or replace(measured or self.profile, measured=False)
        budget = self._residency.budget(self.memory(), self.device_bytes, estimate)
        if measured is not None and measured.measured and regime is ended:
            self._choose_order(regime, budget)
        must = self._must_change(budget)
        if must or budget is not None or measured is not None:
            self._change_plan(self._plan_within(self._fallback_budget if budget is None else budget), must, reload)
        wanted = regime.steps < MEASURED_STEPS or not (self.profile.learned or self._whole_blocks)
        if measured is not None or wanted != (self._recorder is not None):
            self._record(wanted)

    def _choose_order(self, regime: Regime, budget: float | None) -> None:
        """Take the order of residency that fits the measured times, if it gains enough to move weights for."""
        budget = self._fallback_budget if budget is None else budget
        kept = forecast_seconds(self._plan_within(budget), self.profile)
        before, self.profile = self.profile, _with_best_order(self.outline, replace(self.profile, order=()))
        if forecast_seconds(self._plan_within(budget), self.profile) > kept * (1 - WORTHWHILE):
            self.profile = before
        regime.profile = self.profile

    def _must_change(self, budget: float | None) -> bool:
        """Whether the plan in effect cannot stay, however little another would gain."""
        assert self.plan is not None
        outdated = bool(self.plan.segments) and self.profile.learned and not self.plan.learned
        # A little of the headroom may go: moving weights for it is not worth it.
        short = budget is not None and self.device_bytes > budget + self.config.headroom_bytes * SHORTAGE
        return outdated or short or self.state is State.REDUCED

    @property
    def _fallback_budget(self) -> float:
        """Where nothing new is known of the memory: what the plan in effect was made for, or what was left of it."""
        assert self.plan is not None
        return self.device_bytes if self.state is State.REDUCED else self.plan.budget

    def _change_plan(self, plan: Plan, must: bool, reload: Callable[[Plan], None]) -> None:
        """Carry ``plan`` out if it must be or is worth it."""
        current = self.plan
        assert current is not None
        if must or self._is_worthwhile(plan):
            self.load_within(plan, reload)
        else:
            self.plan = with_forecast(current, self.profile, self.config)

    def _plan_within(self, budget: float) -> Plan:
        """The plan for ``budget``, or for the least that works where it is less: whether that fits is then tried."""
        return self.plan_for(max(budget, self.minimum_bytes))

    def _record(self, wanted: bool) -> None:
        """Measure the next step, or stop measuring."""
        self._stop_recording()
        if wanted:
            self._recorder = Recorder(self.outline, self.backend)
            self._stalls.listener = self._recorder.stalled
        assert self.plan is not None
        self._attach(self.plan)

    def _stop_recording(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = self._stalls.listener = None

    def _learn(self) -> Profile | None:
        """Keep what the step before has shown, if it was measured; waits for the device then."""
        if self._recorder is None or not self._recorder.complete:
            return None
        self._drain()
        profile = self._recorder.profile(self.profile, with_times=self._residency.current.steps > 1)
        self._stop_recording()
        if self._whole_blocks:
            profile = replace(profile, unit_runs=None, unit_times=None)
        self._residency.current.profile = self.profile = profile
        return profile

    def _can_shrink(self) -> bool:
        return self.plan is not None and self.device_bytes > self.minimum_bytes

    def _tidy(self, reason: str) -> None:
        """After a step ran out of memory for the first time: have torch give back what it keeps."""
        self._say_out_of_memory(reason, "with torch's memory tidied up")
        self.backend.trim()

    def _shrink(self, share: float, reload: Callable[[Plan], None], reason: str) -> None:
        """After a step ran out of memory: leave it a part of what is on the device."""
        budget = self.device_bytes - max(self.device_bytes * share, self.config.headroom_bytes)
        less = self.device_bytes - max(budget, self.minimum_bytes)
        self._say_out_of_memory(reason, f"with {format_bytes(less)} less for weights")
        budget = max(budget, self.minimum_bytes)
        self._residency.out_of_memory(budget, self.backend.memory(), self.device_bytes)
        self._change_plan(self._plan_within(budget), must=True, reload=reload)

    def _stream_whole_blocks(self, reload: Callable[[Plan], None], reason: str) -> None:
        """A weight was read without running its module, which did not happen in the first step: stop relying on it."""
        logger.warning("a weight is read outside of its module, so blocks stream as a whole from now on: %s", reason)
        self._whole_blocks = True
        self._residency = Residency(self.config.headroom_bytes, self.config.adaptive)
        self.profile = replace(self.profile, unit_runs=None, unit_times=None, measured=False)
        assert self.plan is not None
        self.load_within(self._plan_within(self.plan.budget), reload)

    def _say_out_of_memory(self, reason: str, remedy: str) -> None:
        logger.warning(
            "out of memory in a step on %s with %s of weights, %s free and %s kept by torch; running it again %s (%s)",
            self.backend.name,
            *map(format_bytes, (self.device_bytes, *self.backend.memory())),
            remedy,
            reason,
        )

    # -- hooks ---------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """A forward of the root begins."""
        if self.state is State.REDUCED:
            raise StreamingError(
                "the model has given up weights since the last step; use Streamer.run, or load it anew"
            )
        self._steps.begin()
        if self._lane is not None:
            self._lane.begin_step()
        if self._recorder is not None:
            self._recorder.begin_step()

    def end_step(self, completed: bool) -> None:
        """A forward of the root ends; ``completed`` is false when it raised."""
        self._steps.end(completed)
        if completed:
            self.counters.steps += 1
            self._residency.stepped()
            if self._recorder is not None:
                self._recorder.end_step()
        else:
            self.settle()
        if self._lane is not None:
            self._lane.end_step(completed)
        self._stalls.collect()

    def settle(self) -> None:
        """Release what an exception or an interrupt left bound. Harmless when there is nothing."""
        if self._lane is not None:
            self._lane.settle()

    def enter_block(self, block: int) -> None:
        if self._lane is not None:
            self._lane.enter_block(block)
        if self._recorder is not None:
            self._recorder.begin_block(block)

    def leave_block(self, block: int) -> None:
        if self._recorder is not None:
            self._recorder.end_block(block)
        if self._lane is not None:
            self._lane.leave_block(block)

    def enter_unit(self, unit: int) -> None:
        lane = self._lane
        if lane is not None and (number := lane.segment_of.get(unit)) is not None:
            lane.enter(number)
        if self._recorder is not None:
            self._recorder.begin_unit(unit)

    def leave_unit(self, unit: int) -> None:
        if self._recorder is not None:
            self._recorder.end_unit(unit)
        lane = self._lane
        if lane is not None and (number := lane.segment_of.get(unit)) is not None:
            lane.leave(number)

    # -- telling -------------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """The plan in effect and the page-locked memory behind it, in a line."""
        return self._explain(self.plan)

    def _explain(self, plan: Plan | None) -> str:
        if plan is None:
            return "not loaded"
        text = plan.explain()
        if self.state is State.REDUCED:
            given_up = format_bytes(plan.resident_bytes - self._placement.resident_bytes)
            return f"gave up {given_up} until it runs again; before that: {text}"
        return f"{text}; {self._memory_text()}" if plan.segments else text

    def _memory_text(self) -> str:
        pinned, pageable = self._placement.arena.pinned_bytes, self._placement.arena.pageable_bytes
        text = f"{format_bytes(pinned)} page-locked"
        return f"{text}, {format_bytes(pageable)} pageable ({self._placement.arena.reason})" if pageable else text

    def _mode(self, plan: Plan | None) -> str:
        if plan is None:
            return "off"
        if not plan.segments:
            return "resident"
        return "synchronous" if self.config.synchronous else "streamed"

    def snapshot(self) -> Snapshot:
        """The state now, for any thread. Waits for nothing and changes nothing."""
        current = self.plan  # Once: another thread may load or unload meanwhile.
        forecast = current.forecast if current is not None else None
        profile = self.profile
        return Snapshot(
            device=self.backend.name,
            mode=self._mode(current),
            explain=self._explain(current),
            note=self._placement.arena.reason or "",
            blocks=self.outline.blocks,
            resident_blocks=current.resident_blocks if current is not None else 0,
            streamed_blocks=self.outline.blocks - current.resident_blocks if current is not None else 0,
            segments=len(current.segments) if current is not None else 0,
            resident_bytes=self._placement.resident_bytes,
            rest_bytes=current.rest_bytes if current is not None else 0,
            staging_bytes=current.staging_bytes if current is not None else 0,
            streamed_block_bytes=current.streamed_bytes if current is not None else 0,
            pinned_bytes=self._placement.arena.pinned_bytes,
            pageable_bytes=self._placement.arena.pageable_bytes,
            device_bytes=self.backend.allocated,
            device_peak_bytes=self.backend.peak,
            device_budget_bytes=self.backend.budget,
            limited_by=forecast.limited_by if forecast is not None else "",
            predicted_step_seconds=forecast.seconds if forecast is not None else None,
            compute_seconds=profile.compute_seconds if profile.measured else None,
            bandwidth_bytes_per_second=profile.bandwidth if profile.measured else None,
            step_seconds=self._steps.seconds,
            counters=replace(self.counters),
        )


def _with_best_order(outline: Outline, profile: Profile) -> Profile:
    return replace(profile, order=best_order(outline, profile))


def _is_of_another_device(error: Exception) -> bool:
    """Whether a kernel was given a tensor in host memory, as torch says it."""
    return isinstance(error, RuntimeError) and "Expected all tensors to be on the same device" in str(error)


def _close_at_end(streamer: Streamer, backend: Backend) -> weakref.finalize:
    """Close ``backend`` before the streamer's memory goes, also when a model is dropped without unloading."""
    finalizer = weakref.finalize(streamer, backend.close)
    finalizer.atexit = False
    return finalizer
