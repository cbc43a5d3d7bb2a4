"""Runs steps: before one the plan is fitted to what is known, and one that fails for want of memory is run again.

[Note: what the first steps teach]
Before the first step nobody knows in which order the parts of a block run, or whether each of them runs as a module at
all (some code reads a layer's weight without calling it). So in that step all that is streamed of a block is one
segment, on the device from the block's begin to its end, and hooks write down who runs. From then on segments are parts
of blocks. Copies are timed, and in step two each unit too, less its waits; the plan for step three is made from that,
and then stays, unless a later step on several devices shows that those times were too long (``Group.doubt``). Making
a plan waits for the device; that is done after the first two steps of a shape, and when memory asks for it
(residency.py).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from .config import format_bytes
from .devices.backend import is_out_of_memory
from .errors import StreamingError, WeightsMovedError
from .planning.plan import Plan
from .planning.planner import Planner
from .planning.state import State
from .run.recorder import Recorder

if TYPE_CHECKING:
    from .group import Group
    from .streamer import Streamer

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Out of memory: these parts of what is on the device go, one after another, until the step runs.
OUT_OF_MEMORY_SHARES = (0.03, 0.2, 1.0)

# What is said of a tensor in host memory: by most of torch, by its convolutions, by Triton and by Flash Attention.
OTHER_DEVICE = ("same device", "and weight type (", "cpu tensor?", "must be on CUDA")


class Runner:
    """Runs the steps of one streamed model, and measures those that teach something.

    The streamer comes with each call and is not kept (streamer.py, Note: who keeps whom alive).

    Args:
        planner: decides what to have on the device.
        group: the streamers of the model, on other devices too.

    Attributes:
        recorder: measures the step that runs, or comes next; None when there is nothing to learn from it.
    """

    def __init__(self, planner: Planner, group: Group) -> None:
        self.recorder: Recorder | None = None
        self._planner = planner
        self._group = group
        self._has_learned = False

    def run(
        self,
        streamer: Streamer,
        forward: Callable[[], T],
        shape: Hashable,
        reload: Callable[[Plan], None],
        estimate: Callable[[], int] | None,
    ) -> T:
        """Run one step of ``streamer``; the other arguments are those of :meth:`Streamer.run`."""
        if streamer.state is State.UNLOADED:
            raise StreamingError("the model is not loaded: it would run with its originals")
        self._adapt(streamer, shape, reload, estimate)
        shrinks = (partial(self._shrink, streamer, share, reload) for share in OUT_OF_MEMORY_SHARES)
        remedies = [partial(self._tidy, streamer), *shrinks]
        whole_again = [partial(self._make_whole, streamer, reload, streamer.plan)]
        while True:
            try:
                streamer.take_overwritten()  # Of a step that has failed: its slots are empty now.
                output = self._watched(streamer, forward)
                _check_writes(streamer)
                return output
            except Exception as error:
                if streamer.backend.is_full(error) and remedies and self._can_shrink(streamer):
                    remedy = remedies.pop(0)
                elif isinstance(error, WeightsMovedError) and whole_again:
                    remedy = whole_again.pop()
                elif _is_of_another_device(error) and streamer.arriving:
                    remedy = partial(self._await_residents, streamer)
                elif _is_of_another_device(error) and _streams_parts(streamer.plan):
                    remedy = partial(self._stream_whole_blocks, streamer, reload)
                else:
                    if _is_of_another_device(error):
                        self._say_what_was_not_entered(streamer)
                    raise
                reason = str(error).partition("\n")[0]
            finally:
                streamer.settle()
            # Not inside of "except": the error's frames would keep the activations of the failed step alive.
            remedy(reason)
            streamer.counters.reruns += 1
            if streamer.state is State.REDUCED:  # A weight could not be brought, in the step that failed or now.
                self._make_whole(streamer, reload, streamer.plan, reason)

    def finish(self, streamer: Streamer) -> None:
        """No step comes next: keep what the last one has shown, and measure no more."""
        self.learn(streamer)
        self._stop_recording()

    def _watched(self, streamer: Streamer, forward: Callable[[], T]) -> T:
        """Run a step; where it teaches something, note how much memory its activations take."""
        output = forward()
        if self.recorder is not None and self.recorder.complete:
            peak = streamer.backend.peak_bytes()
            if peak is not None:
                self._planner.observe(streamer.backend.memory(), peak)
        return output

    # -- before a step -------------------------------------------------------------------------------------------

    def _adapt(
        self,
        streamer: Streamer,
        shape: Hashable,
        reload: Callable[[Plan], None],
        estimate: Callable[[], int] | None,
    ) -> None:
        """Fit the plan to what is known (Note: what the first steps teach)."""
        self._group.learn()
        self._group.doubt()
        measured, self._has_learned = self._has_learned, False
        if begins := self._planner.begins_prompt:
            self._trim(streamer)
        plan, moves = self._planner.plan_step(shape, streamer.standing, streamer.memory(), measured, estimate)
        if moves:
            streamer.load_within(plan, reload)
        else:
            streamer.keep(plan)
        if moves or (self._planner.lacks_piece and not begins):
            self._trim(streamer)
        wanted = self._planner.wants_measuring()
        if measured or wanted != (self.recorder is not None):
            self._record(streamer, wanted)
        streamer.build()

    def _trim(self, streamer: Streamer) -> None:
        """Have torch give back what it keeps (residency.py, Note: from the same begin)."""
        self._planner.trimmed(streamer.backend.trim())

    def learn(self, streamer: Streamer) -> None:
        """Keep what the step before has shown, if it was measured; waits for the device then."""
        if self.recorder is None or not self.recorder.complete:
            return
        streamer.drain()
        self._planner.learn(self.recorder)
        self._stop_recording()
        self._has_learned = True

    def _record(self, streamer: Streamer, wanted: bool) -> None:
        """Measure the next step, or stop measuring."""
        self._stop_recording()
        if wanted:
            tells = weakref.WeakMethod(self._group.computed)  # The group knows its listeners.
            self.recorder = Recorder(streamer.outline, streamer.backend, streamer.reader, tells)
            self._group.listeners.append(self.recorder)
        streamer.attach_hooks()

    def _stop_recording(self) -> None:
        if self.recorder is not None:
            self._group.listeners.remove(self.recorder)
            self.recorder.close()
        self.recorder = None

    # -- after a step that failed --------------------------------------------------------------------------------

    def _can_shrink(self, streamer: Streamer) -> bool:
        return streamer.plan is not None and streamer.device_bytes > self._planner.minimum_bytes

    def _tidy(self, streamer: Streamer, reason: str) -> None:
        """After a step ran out of memory for the first time."""
        _say_out_of_memory(streamer, reason, "with torch's memory tidied up")
        self._trim(streamer)

    def _shrink(self, streamer: Streamer, share: float, reload: Callable[[Plan], None], reason: str) -> None:
        """After a step ran out of memory: leave it a part of what is on the device."""
        before = streamer.device_bytes
        less = max(before * share, streamer.config.headroom_bytes)
        budget = max(before - less, self._planner.minimum_bytes)
        _say_out_of_memory(streamer, reason, f"with {format_bytes(before - budget)} less for weights")
        self._planner.out_of_memory(budget, streamer.backend.memory(), before)
        streamer.load_within(self._planner.plan_within(budget), reload)
        self._trim(streamer)

    def _make_whole(self, streamer: Streamer, reload: Callable[[Plan], None], plan: Plan | None, reason: str) -> None:
        """Weights are missing that the plan has on the device: have all of them there."""
        logger.warning("running a step again: %s", reason)
        assert plan is not None
        streamer.load_within(plan, reload)

    def _await_residents(self, streamer: Streamer, reason: str) -> None:
        """A resident weight was read outside of its block before it had arrived: have all of them there."""
        logger.debug("a step runs again when all residents have arrived: %s", reason)
        streamer.arrive_all()

    def _stream_whole_blocks(self, streamer: Streamer, reload: Callable[[Plan], None], reason: str) -> None:
        """A weight was read without running its module, which did not happen in the first step: stop relying on it."""
        logger.warning("a weight is read outside of its module, so blocks stream as a whole from now on: %s", reason)
        self._planner.stream_whole_blocks()
        assert streamer.plan is not None
        streamer.load_within(self._planner.plan_within(streamer.plan.budget), reload)

    def _say_what_was_not_entered(self, streamer: Streamer) -> None:
        """Nothing helps. Perhaps somebody reads the weights of a block without entering it or a layer of it."""
        blocks = self.recorder.not_entered if self.recorder is not None else []
        if blocks:
            logger.warning(
                "a tensor on another device was read, and %d of %d blocks had not been entered (%s). If the model "
                "reads weights of blocks without calling anything of them, it cannot stream: try one GPU, or set mode "
                "to off",
                len(blocks),
                streamer.outline.blocks,
                streamer.blocks.blocks[blocks[0]].name,
            )


def _check_writes(streamer: Streamer) -> None:
    """Raise if somebody has written to weights that were in a slot."""
    found = streamer.take_overwritten()
    if found:
        raise StreamingError(
            f"weights of {', '.join(found[:3])} were written to, or others put in their place, while they ran. They "
            "are copied to the device anew for each step, so that would be lost. Give this model room for all of its "
            "weights, or have ComfyUI load it itself (mode off)"
        )


def may_be_mended(error: Exception) -> bool:
    """Whether a step that failed so may be run again, when something has been done about it."""
    return isinstance(error, WeightsMovedError) or is_out_of_memory(error) or _is_of_another_device(error)


def _is_of_another_device(error: Exception) -> bool:
    """Whether a kernel was given a tensor in host memory."""
    return isinstance(error, (RuntimeError, ValueError)) and any(words in str(error) for words in OTHER_DEVICE)


def _streams_parts(plan: Plan | None) -> bool:
    """Whether ``plan`` relies on units that run by themselves."""
    return plan is not None and plan.learned and bool(plan.segments)


def _say_out_of_memory(streamer: Streamer, reason: str, remedy: str) -> None:
    logger.warning(
        "out of memory in a step on %s with %s of weights, %s free and %s kept by torch; running it again %s (%s)",
        streamer.backend.name,
        *map(format_bytes, (streamer.device_bytes, *streamer.backend.memory())),
        remedy,
        reason,
    )
