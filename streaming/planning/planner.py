"""Decides which plan comes next, from what is known of a model's steps and of the memory that they leave.

Nothing is moved here. A new plan replaces the one in effect if that cannot stay, or if it is worth moving weights for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import NamedTuple, Protocol

from ..config import PackingMode, StreamingConfig
from .packing import Packing, Refusals, packed_outline, units_to_pack
from .plan import Plan, SecondsOf, forecast_seconds
from .profile import Outline, Profile, assumed_profile
from .search import make_plan, minimum_bytes, with_forecast
from .spread import best_order
from .state import Standing, State
from .vram_budget import MEASURED_STEPS, SHORTAGE, DeviceMemory, VramBudget

# A plan that is predicted to gain less than this is not worth moving weights for.
WORTHWHILE = 0.02
# A step shorter than this part of the measured compute disproves the measurement: the host was late then, which happens
# where it launches kernels on several devices. Steps of a shape are measured again at most so often, for that reason or
# because the host needed as long as the measured step (of SD3.5 on an H200 such a step showed twice the compute).
DISPROVED = 0.85
MOST_DOUBTS = 2
# Memory that nobody asks for is given back only if it is more than this part of the model.
MUCH = 0.1
# The memory that a host offers varies between prompts, and shrinks after the first, when libraries have loaded their
# kernels. Moving weights for that costs more than it gains.
MOST_SLACK = 400 * 1024**2
# A budget is about the same as another if they differ by no more than this part of the model.
ABOUT = 0.01


class Decision(NamedTuple):
    """What to do before a step.

    Attributes:
        plan: the plan for this step.
        moves: whether it must be carried out. If not, it is the one in effect, perhaps with another forecast.
    """

    plan: Plan
    moves: bool


class StepRecord(Protocol):
    """What was recorded of a whole step (run/recorder.py).

    Attributes:
        never_entered: blocks whose units ran though the block itself was not entered.
        host_was_late: whether its times may be those of the host, which needed as long to launch the step.
    """

    @property
    def never_entered(self) -> set[int]: ...

    @property
    def host_was_late(self) -> bool: ...

    def profile(self, before: Profile, with_times: bool) -> Profile:
        """Return ``before``, updated with what the step has shown; times are updated only ``with_times``."""


class _Settled(NamedTuple):
    """A plan that was chosen, for which budget, and by what."""

    plan: Plan
    budget: float
    known: tuple[object, ...]


class Planner:
    """What is known about one model on one device, and the plans that follow from it.

    Args:
        outline: the model.
        config: settings.
        seconds_of: returns the seconds that a step will take under a plan, by a profile.

    Attributes:
        profile: what is known of the next step.
        vram: how much memory the model may use on the device; it is told of prompts, of steps and of what these need.
        compiled: whether steps run compiled (hooks.py, Note: compiled models).
        by_units: blocks that are not entered though their units run (by_units.py).
        packing: what packing would save and cost; None before that is known, or where nothing may be packed.
        refusals: units that cannot be packed, as far as that was seen.
        cramped: whether the last plan packs nothing since there is no room to unpack in.
        writes_expected: whether other code will write to weights, so that none may be packed.
    """

    def __init__(self, outline: Outline, config: StreamingConfig, seconds_of: SecondsOf = forecast_seconds) -> None:
        self.compiled = False
        self.by_units: frozenset[int] = frozenset()
        self.packing: Packing | None = None
        self.refusals = Refusals()
        self.writes_expected = False
        self.cramped = False
        self._packed_now: frozenset[int] = frozenset()
        self._was_left: frozenset[int] = frozenset()
        self.profile = _with_best_order(outline, assumed_profile(outline))
        self._outline = outline
        self._config = config
        self._seconds_of = seconds_of
        self.vram = VramBudget(config.headroom_bytes, config.adaptive)
        self._whole_blocks = False
        self._chosen: tuple[Profile, float] | None = None
        self._settled: _Settled | None = None

    @property
    def _limit(self) -> float:
        """The most bytes that the settings allow."""
        return math.inf if self._config.vram_limit is None else self._config.vram_limit

    @property
    def minimum_bytes(self) -> int:
        """The least bytes of device memory with which the model streams; fewer once the order of its units is known."""
        return minimum_bytes(self._outline, self.profile)

    @property
    def least_limit_bytes(self) -> int:
        """The least limit with which the model always streams, also when the order of its units is learned anew."""
        return minimum_bytes(self._outline, assumed_profile(self._outline))

    def begin_run(self) -> None:
        """What others did in the prompt before, and want of memory, may be over."""
        self._was_left = self.refusals.left
        self.refusals = Refusals(too_large=self.refusals.too_large)

    def note_plan(self, plan: Plan) -> None:
        """``plan`` comes into effect: the units that it packs have packed copies, and no others."""
        self._packed_now = plan.packed

    # -- plans for a budget --------------------------------------------------------------------------------------

    def plan_for(self, budget: float) -> Plan:
        """Return the plan for ``budget`` bytes, or for the configured limit if that is less.

        Raises:
            BudgetError: that is less than :attr:`minimum_bytes`.
        """
        budget = min(budget, self._limit)
        plan = make_plan(self._outline, self.profile, budget, self._config, self._seconds_of)
        return self._packed(plan, budget) or plan

    def _packed(self, plan: Plan, budget: float) -> Plan | None:
        """Return a plan for the same budget that packs weights; None where that would gain too little.

        In a shape of which nothing was measured yet the units stay packed that are so now, as their copies are there.
        """
        self.cramped = False
        if self.packing is None or self.writes_expected or not plan.segments:
            return None
        always = self._config.packing is PackingMode.ON
        if self.profile.measured:
            units = units_to_pack(plan, self.profile, self.packing, self.refusals.units, everything=always)
        else:
            units = self._packed_now - self.refusals.units
        outline = packed_outline(self._outline, self.packing, units)
        self.cramped = bool(units) and budget < minimum_bytes(outline, self.profile)
        if not units or self.cramped:
            return None
        packed = make_plan(outline, self.profile, budget, self._config, self._seconds_of)
        gain = 1 - self._seconds_of(packed, self.profile) / self._seconds_of(plan, self.profile)
        if not always and self.profile.measured and gain < WORTHWHILE:
            return None
        return packed

    def plan_within(self, budget: float) -> Plan:
        """Return the plan for ``budget`` or :attr:`minimum_bytes`, whichever is more: a try shows whether that fits."""
        return self.plan_for(max(budget, self.minimum_bytes))

    def next_plan(self, budget: float, now: Standing) -> Plan:
        """Return the plan in effect if it fits into ``budget`` and another would gain too little; else a new plan.

        Between prompts this may also choose another order of residency. That moves more weights than a plan in the old
        order, and in the middle of a prompt it would cost more time than most prompts have steps to win it back.
        """
        if self.vram.current.timed and self.vram.current.profile is self.profile:
            self._choose_order(max(budget, self.minimum_bytes))
        if budget >= self.minimum_bytes and (settled := self._settled_within(budget, now)) is not None:
            plan = replace(settled.plan, budget=min(budget, self._limit))
            return self._settle(plan, settled.budget)
        plan, current = self.plan_for(budget), now.plan
        if current is None or (current.segments and current.learned != plan.learned):
            return self._settle(plan, budget)
        if self._is_refused(current) or self._leaves_unpacked(current) or self._was_left & plan.packed - current.packed:
            return self._settle(plan, budget)
        if current.device_bytes > plan.budget + self._slack(now) or self._is_worthwhile(plan, now):
            return self._settle(plan, budget)
        kept = replace(current, budget=plan.budget)
        return self._settle(with_forecast(kept, self.profile, self._config, self._seconds_of), budget)

    def _settle(self, plan: Plan, budget: float) -> Plan:
        """Remember that ``plan`` was chosen for ``budget``, by what is known now; returns it."""
        self._settled = _Settled(plan, budget, self._known(plan))
        return plan

    def _settled_within(self, budget: float, now: Standing) -> _Settled | None:
        """Return the plan in effect if it was chosen for about this budget, and nothing else is known now.

        To plan takes 0.1 to 0.3 s of a slow host (FLUX), and would be done up to three times in each prompt.
        """
        settled = self._settled
        about = min(self._slack(now), self._config.headroom_bytes * SHORTAGE, self._outline.model_bytes * ABOUT)
        if settled is None or settled.plan is not now.plan or abs(budget - settled.budget) > about:
            return None
        if settled.plan.device_bytes > budget + about or settled.known != self._known(settled.plan):
            return None
        return settled

    def _known(self, plan: Plan) -> tuple[object, ...]:
        """All that makes the choice of ``plan``, beside the budget."""
        seconds = self._seconds_of(plan, self.profile)  # Those of other devices count in it.
        settings = self._config, self._outline, self.writes_expected
        return self.profile, seconds, self.packing, self.refusals.units, *settings

    def _slack(self, now: Standing) -> int:
        """Bytes beyond a budget that are not worth moving weights for."""
        if now.device_budget is not None or now.state is not State.LOADED:
            return 0
        if self.profile.measured:
            return int(self._config.headroom_bytes * SHORTAGE)
        return min(MOST_SLACK, self._outline.model_bytes // 50)

    def _is_worthwhile(self, plan: Plan, now: Standing) -> bool:
        """Whether ``plan`` is faster than the one in effect by enough, or is no slower with much less memory."""
        assert now.plan is not None
        if not (plan.segments or now.plan.segments):
            return False
        gain = 1 - self._seconds_of(plan, self.profile) / self._seconds_of(now.plan, self.profile)
        saved = now.device_bytes - plan.device_bytes
        unasked = plan.budget > now.device_bytes
        return gain >= WORTHWHILE or (unasked and gain >= 0 and saved > MUCH * self._outline.model_bytes)

    # -- steps ---------------------------------------------------------------------------------------------------

    def plan_step(
        self,
        shape: Hashable,
        now: Standing,
        memory: DeviceMemory,
        measured: bool,
        estimate: Callable[[], int] | None,
    ) -> Decision:
        """Decide what is on the device in the next step, which is one of ``shape``.

        Args:
            shape: equal for steps that need the same memory and time.
            now: the standing of the model, which is loaded.
            memory: of the device.
            measured: whether :meth:`learn` was called for the previous step.
            estimate: returns the bytes that activations may take, for a shape that has not run yet.
        """
        assert now.plan is not None
        self._enter(shape)
        budget = self.vram.budget(memory, now.device_bytes, estimate)
        room = self._fallback_budget(now) if budget is None else budget
        must = self._must_change(budget, now)
        if not (must or measured or budget is not None):
            return Decision(now.plan, moves=False)
        if not must and self._settled_within(room, now) is not None:
            return Decision(now.plan, moves=False)
        plan = self.plan_within(room)
        packs = self._leaves_unpacked(now.plan) and plan != now.plan
        if must or packs or self._is_worthwhile(plan, now):
            return Decision(self._settle(plan, room), moves=True)
        kept = with_forecast(now.plan, self.profile, self._config, self._seconds_of)
        return Decision(self._settle(kept, room), moves=False)

    def wants_measuring(self) -> bool:
        """Whether to measure the next step: the first of a shape shows in which order units run, a later one times."""
        shape = self.vram.current
        if shape.steps == 0 or not (self.profile.learned or self.compiled or self._whole_blocks):
            return True
        return not shape.timed

    def doubts(self, step_seconds: float | None) -> bool:
        """Whether the measured compute is too much, because a recent step took only ``step_seconds`` in all."""
        shape = self.vram.current
        if step_seconds is None or not shape.timed or shape.in_a_row <= MEASURED_STEPS:
            return False
        return shape.doubts < MOST_DOUBTS and step_seconds < DISPROVED * self.profile.compute_seconds

    def measure_again(self) -> None:
        """Have the times of the next step of this shape measured once more."""
        self.vram.current.timed = False
        self.vram.current.doubts += 1

    def learn(self, record: StepRecord) -> None:
        """Keep what was recorded of a whole step, which has ended."""
        if record.never_entered:
            self.by_units |= record.never_entered
            return  # The next step knows when these begin, and is measured anew.
        shape = self.vram.current
        timed = shape.steps > 1
        profile = record.profile(self.profile, with_times=timed)
        if self.compiled or self._whole_blocks:
            profile = replace(profile, unit_runs=None, unit_times=None)
        # A step measured in doubt may show that compute takes less time, but not that less is computed (by a cache).
        fewer = set(profile.block_order) < set(self.profile.block_order)
        if not shape.doubts or not (fewer or profile.compute_seconds >= self.profile.compute_seconds):
            shape.profile = self.profile = profile
        shape.timed = timed
        if timed and record.host_was_late and shape.doubts < MOST_DOUBTS:
            self.measure_again()

    def stream_whole_blocks(self) -> None:
        """From now on blocks stream as a whole, because their units do not always run by themselves."""
        self._whole_blocks = True
        self._forget_units()

    def expect_compiled(self, compiled: bool) -> None:
        """From now on steps run compiled, and blocks stream as a whole; or no longer, and blocks stream in parts."""
        if compiled != self.compiled:
            self.compiled = compiled
            self._forget_units()

    def _forget_units(self) -> None:
        self._forget_memory()
        self.profile = replace(self.profile, unit_runs=None, unit_times=None, measured=False)

    def configure(self, config: StreamingConfig) -> None:
        """Use other settings from now on. Measurements stay valid, because compute and copies were measured apart."""
        self._config, self._chosen = config, None

    def take_up(self, outline: Outline) -> None:
        """The model was laid out anew. What is known is kept only if its blocks are the same."""
        before, self._outline, self._chosen = self._outline, outline, None
        self.packing, self._packed_now = None, frozenset()
        self.refusals = replace(self.refusals, too_large=frozenset())
        if replace(outline, rest_bytes=before.rest_bytes) != before:
            self.by_units, self._whole_blocks = frozenset(), False
            self.profile = _with_best_order(outline, assumed_profile(outline))
            self._forget_memory()

    def change_device(self) -> None:
        """The model moves to another device: keep only what holds on every device."""
        self._forget_memory()
        self.profile, self.packing = replace(self.profile, measured=False), None

    def _forget_memory(self) -> None:
        self.vram = VramBudget(self._config.headroom_bytes, self._config.adaptive)

    def _enter(self, shape: Hashable) -> None:
        """Take up what is known of ``shape``."""
        known = self.vram.enter(shape)
        # The times of another shape say nothing about this one; the order in which units run does.
        self.profile = known.profile or replace(self.profile, measured=False)

    def _fallback_budget(self, now: Standing) -> float:
        """The budget if nothing new is known of memory: that of the plan in effect, or what a reduced model has."""
        assert now.plan is not None
        return now.device_bytes if now.state is State.REDUCED else now.plan.budget

    def _must_change(self, budget: float | None, now: Standing) -> bool:
        """Whether the plan in effect cannot stay, however little another would gain."""
        assert now.plan is not None
        outdated = bool(now.plan.segments) and self.profile.learned and not now.plan.learned
        # A small part of the headroom may be used up: that is not worth moving weights.
        short = budget is not None and now.device_bytes > budget + self._config.headroom_bytes * SHORTAGE
        return outdated or short or self._is_refused(now.plan) or now.state is State.REDUCED

    def _copies_ahead(self, plan: Plan) -> bool:
        """Whether ``plan`` has staging memory for prefetches, which the settings no longer allow."""
        largest = max((segment.nbytes for segment in plan.segments), default=0)
        return self._config.synchronous and plan.staging_bytes > max(largest, self._config.segment_bytes)

    def _is_refused(self, plan: Plan) -> bool:
        """Whether the settings, or what comes in this prompt, do not allow ``plan`` any more."""
        return self._copies_ahead(plan) or bool(self.writes_expected and plan.packed)

    def _leaves_unpacked(self, plan: Plan) -> bool:
        """Whether ``plan`` streams something as it is that the settings would have packed."""
        if self.packing is None or self.writes_expected or self.cramped or not self.profile.measured:
            return False
        if self._config.packing is not PackingMode.ON:
            return False
        return any(
            self.packing.slot_bytes[unit] < self._outline.unit_bytes[unit]
            for unit in plan.streamed - plan.packed - self.refusals.units
        )

    def _choose_order(self, budget: float) -> None:
        """Take the order of residency that fits the measured times, if it gains enough to move weights for."""
        if not self.profile.measured or self._has_chosen(budget):
            return
        kept = self._seconds_of(self.plan_within(budget), self.profile)
        before, self.profile = self.profile, _with_best_order(self._outline, replace(self.profile, order=()))
        if self._seconds_of(self.plan_within(budget), self.profile) > kept * (1 - WORTHWHILE):
            self.profile = before
        self.vram.current.profile = self.profile
        self._chosen = self.profile, budget

    def _has_chosen(self, budget: float) -> bool:
        """Whether an order was already chosen for these times and about this budget."""
        if self._chosen is None or self._chosen[0] is not self.profile:
            return False
        return abs(self._chosen[1] - budget) <= self._config.headroom_bytes


def _with_best_order(outline: Outline, profile: Profile) -> Profile:
    return replace(profile, order=best_order(outline, profile))
