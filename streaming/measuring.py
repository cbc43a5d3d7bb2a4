"""Measures those steps of a model that teach something (runner.py, Note: what the first steps teach).

A step may also be recorded to be shown, because somebody has asked for it (:meth:`.group.Group.ask_for_trace`). Nothing
is learned from that one, so that looking changes no plan.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from .devices.backend import Backend
from .group import Group
from .memory.reader import Reader
from .planning.planner import Planner
from .planning.profile import Outline
from .run.recorder import Recorder
from .run.trace import StepTrace


class Measuring:
    """Has steps recorded, and the planner learn from them.

    Args:
        planner: decides what to have on the device.
        group: the streamers of the model, on other devices too; it tells what these compute.

    Attributes:
        recorder: measures the step that runs, or comes next; None when nobody needs that.
        trace: the last step that was recorded as a whole; None before there is one.
    """

    def __init__(self, planner: Planner, group: Group) -> None:
        self.recorder: Recorder | None = None
        self.trace: StepTrace | None = None
        self._planner = planner
        self._group = group
        self._has_learned = False
        self._teaches = True
        self._step = 0
        self._answered = group.asked_traces

    @property
    def has_whole_step(self) -> bool:
        """Whether a whole step was recorded that the planner has not learned from yet."""
        return self._teaches and self._is_complete

    @property
    def _is_complete(self) -> bool:
        return self.recorder is not None and self.recorder.complete

    @property
    def is_asked(self) -> bool:
        """Whether somebody wants to see the next step. No step of a compiled model is recorded for that: hooks on all
        of its blocks would have it compiled anew."""
        return self._group.asked_traces > self._answered and not self._planner.compiled

    def learn(self, drain: Callable[[], None]) -> None:
        """Keep what the step before has shown, if it was recorded; ``drain`` waits for the device then."""
        if not self._is_complete:
            return
        drain()
        if self._teaches:
            self._planner.learn(self.recorder)
            self._has_learned = True
        self.trace = self.recorder.trace(self._step)
        self.stop()

    def has_learned(self) -> bool:
        """Whether something was learned since the last call of this."""
        learned, self._has_learned = self._has_learned, False
        return learned

    def expect_plan(self) -> None:
        """Something else became known, of which another plan may come."""
        self._has_learned = True

    def record(
        self,
        outline: Outline,
        backend: Backend,
        reader: Reader,
        head_start: float = 0.0,
        *,
        step: int = 0,
        teaches: bool = True,
    ) -> None:
        """Measure the next step.

        Args:
            outline, backend, reader: of the model, as :class:`Recorder` wants them.
            head_start: seconds that the host is ahead of the device in it.
            step: its number in its run.
            teaches: whether the planner learns from it; else it is only shown.
        """
        self.stop()
        self._teaches, self._step, self._answered = teaches, step, self._group.asked_traces
        tells = weakref.WeakMethod(self._group.computed)  # Weakly: the group refers to its listeners.
        self.recorder = Recorder(outline, backend, reader, tells, head_start)
        self._group.listeners.append(self.recorder)

    def finish(self, drain: Callable[[], None]) -> None:
        """No step comes next: keep what the last one has shown, and measure no more."""
        self.learn(drain)
        self.stop()

    def stop(self) -> None:
        """Measure no more."""
        if self.recorder is not None:
            self._group.listeners.remove(self.recorder)
            self.recorder.close()
        self.recorder = None
