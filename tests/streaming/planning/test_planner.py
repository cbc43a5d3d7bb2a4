"""When a plan is looked for anew: only where something is known that was not, or memory has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from outlines import FULL, MB, flux, flux_profile
from weightstream.streaming import Plan, StreamingConfig
from weightstream.streaming.planning import planner as planner_module
from weightstream.streaming.planning.packing import Packing, Refusals
from weightstream.streaming.planning.plan import forecast_seconds
from weightstream.streaming.planning.planner import Planner
from weightstream.streaming.planning.profile import Profile
from weightstream.streaming.planning.state import Standing, State
from weightstream.streaming.planning.vram_budget import SHORTAGE, DeviceMemory

BUDGET = 8e9
ABOUT = int(FULL.headroom_bytes * SHORTAGE)


class Group:
    """What other devices add to a step."""

    extra = 0.0

    def seconds(self, plan: Plan, profile: Profile) -> float:
        return forecast_seconds(plan, profile) + self.extra


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The budgets for which plans were made."""
    budgets: list[float] = []
    make = planner_module.make_plan

    def note(outline: object, profile: object, budget: float, *rest: object) -> Plan:
        budgets.append(budget)
        return make(outline, profile, budget, *rest)

    monkeypatch.setattr(planner_module, "make_plan", note)
    return budgets


def measured_planner(group: Group | None = None, config: StreamingConfig = FULL) -> Planner:
    planner = Planner(flux(), config, (group or Group()).seconds)
    planner.profile = flux_profile()
    planner.vram.current.profile = planner.profile
    return planner


def loaded(plan: Plan) -> Standing:
    return Standing(State.LOADED, plan, plan.device_bytes, None)


def first_plan(planner: Planner) -> Plan:
    return planner.next_plan(BUDGET, Standing(State.UNLOADED, None, 0, None))


def test_the_next_prompt_in_about_as_much_memory_has_the_plan_that_is_there(asked: list[float]) -> None:
    planner = measured_planner()
    plan = first_plan(planner)
    asked.clear()
    for more in (ABOUT, -ABOUT, 0):
        again = planner.next_plan(BUDGET + more, loaded(plan))
        assert again == plan
        assert again.budget == BUDGET + more
        assert again.forecast == plan.forecast
        plan = again
    assert asked == []


def test_small_changes_of_memory_do_not_add_up_unseen(asked: list[float]) -> None:
    planner = measured_planner()
    plan = planner.next_plan(BUDGET + ABOUT, loaded(first_plan(planner)))
    asked.clear()
    planner.next_plan(BUDGET + 2 * ABOUT, loaded(plan))
    assert asked == [BUDGET + 2 * ABOUT]


def test_a_limit_holds_for_the_plan_that_is_there(asked: list[float]) -> None:
    planner = measured_planner(config=replace(FULL, vram_limit=int(BUDGET)))
    plan = first_plan(planner)
    asked.clear()
    assert planner.next_plan(BUDGET + MB, loaded(plan)).budget == BUDGET
    assert asked == []


def other_times(planner: Planner, group: Group) -> None:
    planner.profile = replace(planner.profile, other_seconds=0.004)


def packing_is_known(planner: Planner, group: Group) -> None:
    planner.packing = Packing(tuple(size * 3 // 4 for size in flux().unit_bytes), 1e12)


def others_write(planner: Planner, group: Group) -> None:
    planner.writes_expected = True


def a_unit_is_refused(planner: Planner, group: Group) -> None:
    planner.refusals = Refusals(too_large=frozenset({3}))


def other_settings(planner: Planner, group: Group) -> None:
    planner.configure(replace(FULL, stream_all=True))


def other_devices_take_longer(planner: Planner, group: Group) -> None:
    group.extra = 0.1


NEWS = (other_times, packing_is_known, others_write, a_unit_is_refused, other_settings, other_devices_take_longer)


@pytest.mark.parametrize("news", NEWS)
def test_whatever_is_new_makes_a_plan_be_looked_for(asked: list[float], news: Callable[[Planner, Group], None]) -> None:
    group = Group()
    planner = measured_planner(group)
    plan = first_plan(planner)
    news(planner, group)
    asked.clear()
    planner.next_plan(BUDGET, loaded(plan))
    assert BUDGET in asked


def test_a_plan_that_had_to_be_made_smaller_is_not_the_one_that_was_chosen(asked: list[float]) -> None:
    planner = measured_planner()
    first_plan(planner)
    smaller = planner.plan_for(BUDGET - 200 * MB)
    asked.clear()
    planner.next_plan(BUDGET, loaded(smaller))
    assert asked == [BUDGET]


@pytest.mark.parametrize(("more", "looks"), [(0, False), (ABOUT, False), (2 * ABOUT, True)])
def test_so_it_is_between_the_steps_of_a_prompt(
    asked: list[float], monkeypatch: pytest.MonkeyPatch, more: int, looks: bool
) -> None:
    planner = measured_planner()
    planner.vram.enter("shape").profile = planner.profile
    plan = first_plan(planner)
    asked.clear()
    monkeypatch.setattr(planner.vram, "budget", lambda *_: BUDGET + more)
    decision = planner.plan_step("shape", loaded(plan), DeviceMemory(0, 0), measured=False, estimate=None)
    assert decision == (plan, False)
    assert bool(asked) is looks


def test_what_another_process_packed_is_packed_in_the_next_prompt() -> None:
    """However little one unit gains: until then there are two copies of it."""
    planner = measured_planner()
    packing_is_known(planner, Group())
    everything = first_plan(planner)
    unit = min(everything.packed)
    planner.refusals = Refusals(left=frozenset({unit}))
    plan = planner.next_plan(BUDGET, loaded(planner.plan_for(BUDGET)))
    assert plan.packed == everything.packed - {unit}
    planner.begin_run()
    assert planner.next_plan(BUDGET, loaded(plan)).packed == everything.packed
    # What was refused for another reason must gain something.
    planner.refusals = Refusals(without_room=frozenset({unit}))
    planner.begin_run()
    assert planner.next_plan(BUDGET, loaded(plan)).packed == plan.packed
