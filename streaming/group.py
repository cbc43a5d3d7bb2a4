"""The streamers of one model on several devices: they measure steps together, and are planned as one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

from .devices.backend import Backend
from .planning.plan import Plan, SecondsOf, forecast_seconds
from .planning.profile import Outline, Profile
from .run.telemetry import StepListener
from .split.assignment import Assignment
from .split.turns import Share, forecast_of_all


class Member(Protocol):
    """A streamer of a model on one of its devices.

    Attributes:
        outline: of what it streams there.
        plan: in effect; None while unloaded.
        profile: what is known of its next step.
        doubts: whether a step was over sooner than its compute alone was measured to take.
    """

    outline: Outline
    plan: Plan | None

    @property
    def profile(self) -> Profile: ...

    @property
    def doubts(self) -> bool: ...

    def learn(self) -> None:
        """Keep what the step before has shown, if it was measured."""

    def measure_again(self) -> None:
        """The next step teaches its times once more."""


class Group:
    """One or more streamers of a model, which it does not keep alive.

    Attributes:
        listeners: measure the step that runs.
        assignment: the device of each block, numbered in the order in which the streamers have joined; None with one.
        asked_traces: how often somebody has asked to see a step; any thread may ask.
    """

    def __init__(self, assignment: Assignment | None = None) -> None:
        self.listeners: list[StepListener] = []
        self.assignment = assignment
        self.asked_traces = 0
        self._members: list[weakref.ref[Member]] = []

    def join(self, streamer: Member) -> SecondsOf:
        """Add ``streamer``; returns a function that forecasts the seconds of a step with a plan of its blocks."""
        who = weakref.ref(streamer)
        self._members.append(who)
        return lambda plan, profile: self._seconds(who, plan, profile)

    def computed(self, device: Backend, seconds: Callable[[], float]) -> None:
        """A block has run on ``device``; ``seconds`` waits for it, and returns its compute."""
        for listener in self.listeners:
            listener.computed(device, seconds)

    def learn(self) -> None:
        """All keep what the step before has shown, so that the first one that plans knows what the others take."""
        for member in self._members:
            if (streamer := member()) is not None:
                streamer.learn()

    def ask_for_trace(self) -> None:
        """Have the next step recorded on each device, to be shown."""
        self.asked_traces += 1

    def doubt(self) -> None:
        """If one streamer finds that its measured times cannot be right, all measure the next step once more.

        A single streamer does not: a host that launches kernels on one device alone is seldom late.
        """
        if self.assignment is None:
            return
        members = [streamer for member in self._members if (streamer := member()) is not None]
        if any(streamer.doubts for streamer in members):
            for streamer in members:
                streamer.measure_again()

    def _seconds(self, who: Callable[[], Member | None], plan: Plan, profile: Profile) -> float:
        assignment = self.assignment
        if assignment is None or not profile.measured:
            return forecast_seconds(plan, profile)
        shares = []
        for member in self._members:
            share = Share(plan, profile) if member is who else _share_of(member())
            if share is None or share.plan.outline.blocks != len(assignment.blocks_of(len(shares))):
                return forecast_seconds(plan, profile)
            shares.append(share)
        return forecast_of_all(shares, assignment)


def _share_of(streamer: Member | None) -> Share | None:
    """What a device does, once it is loaded and was measured."""
    if streamer is None or streamer.plan is None or not (streamer.profile.measured or not streamer.outline.blocks):
        return None
    return Share(streamer.plan, streamer.profile)
