"""Whether steps on several GPUs are faster than on one.

[Note: what a step takes]
From the begin of a step to the begin of the next one, by the clock of the first GPU: so all that the host does counts,
and nobody waits for a GPU. Steps count from a run's second on, since in the first one weights may still arrive, and
not where the pack itself takes time: a GPU is measured, gets another plan, or has to run the step again. When two on
all GPUs are known, one step runs on the first GPU alone. If that is faster a second one does, and if both are,
later steps of this kind run on one GPU: where a host launches kernels more slowly than several GPUs compute, or
activations take longer from one to another than is gained, one GPU is the faster way. Otherwise that one step is the
price, every ten minutes for each kind of steps and each amount of weights that stream; and where one GPU computes in
another shape than several, so that it is measured first, a few more.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Hashable
from functools import lru_cache

import torch

from ...streaming.devices.backend import Backend
from ...streaming.devices.copies import Moment

# Steps on all GPUs that are known before one runs on one GPU, and those on one GPU that must be faster.
TOGETHER_STEPS = 2
ALONE_STEPS = 2
# Steps on one GPU that told nothing, after which it stays unknown which is faster.
MOST_DISTURBED = 6
# After which steps are timed again.
KEPT_SECONDS = 600.0
# More kinds than a process has.
MOST_KINDS = 512


class Pace:
    """What steps of one kind take.

    Attributes:
        is_told: whether it was said that one GPU is faster.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Nothing is known."""
        self.is_told = False
        self._together: list[float] = []
        self._alone: list[float] = []
        self._disturbed = 0
        self._last = time.monotonic()

    def forget_old(self) -> None:
        """Forget what was found out long ago: a GPU may have been busy with something else then."""
        if self.is_known and time.monotonic() - self._last > KEPT_SECONDS:
            self.forget()

    def add(self, together: bool, seconds: float) -> None:
        (self._together if together else self._alone).append(seconds)
        self._last = time.monotonic()

    def disturbed(self) -> None:
        """A step on one GPU took longer than such steps take, so it told nothing."""
        self._disturbed += 1

    @property
    def is_known(self) -> bool:
        """Whether no step needs to be timed any more."""
        if self._disturbed >= MOST_DISTURBED:
            return True
        return bool(self._alone) and (not self._alone_is_faster or len(self._alone) >= ALONE_STEPS)

    @property
    def wants_alone(self) -> bool:
        """Whether a step on one GPU would tell something."""
        return len(self._together) >= TOGETHER_STEPS and not self.is_known

    @property
    def why_alone(self) -> str:
        """Why steps are to run on one GPU; empty where they are not, or where that is not known."""
        if not (self.is_known and len(self._alone) >= ALONE_STEPS and self._alone_is_faster):
            return ""
        return (
            f"several GPUs are no faster ({min(self._together):.3g} s a step, {min(self._alone):.3g} s on one of them)"
        )

    @property
    def _alone_is_faster(self) -> bool:
        return min(self._alone) < min(self._together)


@lru_cache(maxsize=MOST_KINDS)
def pace_of(kind: Hashable) -> Pace:
    """What is known of a kind of steps, for the process. Two models at once may make a new one twice, which costs a
    step."""
    return Pace()


class StepClock:
    """Times the steps of a MODEL that has several GPUs (Note: what a step takes).

    Args:
        backend: the first GPU.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._now: Moment | None = None
        self._timed: tuple[Pace, bool, Moment] | None = None
        self._pending: list[tuple[Pace, bool, Moment, Moment]] = []

    def begin_step(self) -> None:
        """A step begins, and the one before has ended. What is over on the GPU by now is told."""
        self._now = self._backend.moment() if _is_timed(self._backend) else None
        if self._timed is not None and self._now is not None:
            self._pending.append((*self._timed, self._now))
        self._timed = None
        while self._pending:
            pace, together, begin, end = self._pending[0]
            if (seconds := self._backend.seconds(begin, end)) is None:
                break
            del self._pending[0]
            pace.add(together, seconds)

    def wants_alone(self, pace: Pace) -> bool:
        """Whether the step that has begun should run on one GPU, because that would tell something. The host is ahead
        of the GPU, so one that has begun may not be known yet."""
        return pace.wants_alone and not any(each is pace and not together for each, together, *_ in self._pending)

    def times(self, pace: Pace, together: bool) -> None:
        """The step that has begun is one of these. A step of which this is not said is not timed."""
        if self._now is not None and not pace.is_known:
            self._timed = pace, together, self._now

    def disturbed(self) -> None:
        """The step that was said to be timed took longer than such steps take."""
        if self._timed is not None and not self._timed[1]:
            self._timed[0].disturbed()
        self.stop()

    def stop(self) -> None:
        """The step that was said to be timed is none of these after all, or no step comes next."""
        self._timed = None


_clocks: weakref.WeakKeyDictionary[torch.nn.Module, StepClock] = weakref.WeakKeyDictionary()


def clock_of(model: torch.nn.Module, backend: Backend) -> StepClock:
    """The one of a model on its first GPU, which may have become another."""
    found = _clocks.get(model)
    if found is None or found._backend is not backend:
        found = _clocks[model] = StepClock(backend)
    return found


def _is_timed(backend: Backend) -> bool:
    """Virtual devices are one processor, which several of them do not make faster."""
    return not backend.is_virtual
