"""Measures those steps of a model that teach something (runner.py, Note: what the first steps teach)."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from .devices.backend import Backend
from .group import Group
from .memory.reader import Reader
from .planning.planner import Planner
from .planning.profile import Outline
from .run.recorder import Recorder


class Measuring:
    """Has steps recorded, and the planner learn from them.

    Args:
        planner: decides what to have on the device.
        group: the streamers of the model, on other devices too; it tells what these compute.

    Attributes:
        recorder: measures the step that runs, or comes next; None when there is nothing to learn from it.
    """

    def __init__(self, planner: Planner, group: Group) -> None:
        self.recorder: Recorder | None = None
        self._planner = planner
        self._group = group
        self._has_learned = False

    @property
    def has_whole_step(self) -> bool:
        """Whether a whole step was recorded that the planner has not learned from yet."""
        return self.recorder is not None and self.recorder.complete

    def learn(self, drain: Callable[[], None]) -> None:
        """Keep what the step before has shown, if it was measured; ``drain`` waits for the device then."""
        if not self.has_whole_step:
            return
        drain()
        self._planner.learn(self.recorder)
        self.stop()
        self._has_learned = True

    def has_learned(self) -> bool:
        """Whether something was learned since the last call of this."""
        learned, self._has_learned = self._has_learned, False
        return learned

    def expect_plan(self) -> None:
        """Something else became known, of which another plan may come."""
        self._has_learned = True

    def record(self, outline: Outline, backend: Backend, reader: Reader, head_start: float = 0.0) -> None:
        """Measure the next step; with a ``head_start`` the host is so many seconds ahead of the device in it."""
        self.stop()
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
