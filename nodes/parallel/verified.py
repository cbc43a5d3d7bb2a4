"""Steps in parallel that give the bits of one GPU, or do not run in parallel (copies.py).

[Note: verified, not believed]
Two GPUs with a prompt each compute a batch of one where one GPU computes a batch of two. On GPUs the products of most
models come out the same, to the bit; on others, and on CPUs, they do not, and nobody promises it. ComfyUI also adds
up the regions of a prompt in another order. So the first step of each kind runs both ways: on the first GPU alone,
which is the truth, and on all of them. A kind is what decides which kernels run: the model, dtypes, shapes, which
prompts are in effect, the GPUs, and what is attached. If all bits are the same, later steps of this kind run in
parallel; else on one GPU, and the node says so. What was found out is kept for the process. Bits that differ are looked
at twice: the first attention that an H200 computes in a process gives other bits than any later one, in ComfyUI too.

A step runs a second time only if the first one has left everything that it can reach as it was (state/comparing.py).
If not, some node keeps state from step to step, as caches that skip steps do. Two threads would share it, in no
certain order, so that later steps could differ where the first did not: such a MODEL works on one GPU. Some begin to
keep state in a later step than the first, or to act at all. So where another node has attached something, steps are
verified at each sigma, and each later one is looked at in this way; one that has changed anything is taken back, and
runs on one GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ...streaming import StepNotRepeatedError
from ...streaming.parallel.relay import HeldUpError
from ...streaming.parallel.tokens import UndividedError
from ..state.step_state import AS_IT_IS, StepState
from .preparing import has_no_room, no_room
from .step import Outputs, Shares, Step, Way
from .verdicts import verdicts

logger = logging.getLogger(__name__)

KEEPS_STATE = "some node keeps state from step to step"
OTHER_BITS = "a step gave other bits than on one GPU"


def run_exact(shares: Shares, executor: Callable[..., Outputs], *arguments: Any) -> Outputs:
    """A step on several GPUs at the same time if its bits are those of one GPU; else on one. The host calls this, but
    for ``shares``: of each GPU in the tokens."""
    *given, options = arguments
    step = _Step(executor, tuple(given), options, shares)
    if not step.is_ours:
        return executor(*arguments)
    step.clock.begin_step()
    if reason := verdicts.of(step.kind(None)):
        return step.alone_because(reason)
    ways, reason = step.ways()
    for way in ways:
        verdict = verdicts.of(step.kind(way))
        if verdict is None:
            return step.first(way, reason, is_last=way is ways[-1])
        if not (verdict := verdict or step.why_slower(way)):
            return step.paced(way)
        reason = reason or verdict
    return step.alone_because(reason)


def run_close(shares: Shares, executor: Callable[..., Outputs], *arguments: Any) -> Outputs:
    """A step on several GPUs at the same time, whatever its bits. The host calls this, but for ``shares``."""
    *given, options = arguments
    step = _Step(executor, tuple(given), options, shares)
    if not step.is_ours:
        return executor(*arguments)
    step.clock.begin_step()
    ways, reason = step.ways()
    for way in ways:
        if not (slower := step.why_slower(way)):
            return step.paced(way, is_verified=False)
        reason = reason or slower
    return step.alone_because(reason)


class _Step(Step):
    """A step that is compared, timed, and run on one GPU where it fails on several."""

    def alone_because(self, reason: str) -> Outputs:
        """On the first GPU, which is said unless other steps of this run have more to do."""
        if not self._patcher.streamed.together:
            self.tell(reason)
        return self.alone()

    def why_slower(self, way: Way) -> str:
        """Why one GPU is to run steps of this kind, since it is faster; said at once when that has become known."""
        pace = self.pace(way)
        pace.forget_old()
        if (reason := pace.why_alone) and not pace.is_told:
            pace.is_told = True
            self.tell(reason)
        return reason

    def paced(self, way: Way, is_verified: bool = True) -> Outputs:
        """On all of them, but on the first one where that tells which is faster (pace.py, Note: what a step takes)."""
        if not self._patcher.streamed.together:  # The first one of a run.
            return self.together_or_alone(way, is_verified)
        pace, before = self.pace(way), self.course()
        alone = self.clock.wants_alone(pace)
        self.clock.times(pace, together=not alone)
        outputs = self.alone() if alone else self.together_or_alone(way, is_verified)
        if _differs(before, self.course()):
            self.clock.disturbed()
        return outputs

    def together_or_alone(self, way: Way, is_verified: bool = True) -> Outputs:
        """On all of them; if that fails, for lack of memory say, on the first until the MODEL is loaded for the next
        run. A step of a kind that was not verified may have changed what it can reach: then its failure is raised."""
        before = None if is_verified and not self._has_others else self._state()
        outputs: Outputs | None
        try:
            outputs = self.together(way)
        except Exception as error:
            if (reason := self._why_given_up(error)) is None or (before is not None and before.changed()):
                raise
            self._give_up(error, reason)
            outputs = None
        if outputs is None:
            return self.alone()  # Out here: the error, which is gone now, has kept what the GPUs had computed.
        if is_verified and before is not None and (changed := before.changed()):
            return self._taken_back(before, changed)
        self.tell("")
        return outputs

    def _taken_back(self, before: StepState, changed: str) -> Outputs:
        """What one GPU gives, for a step in which GPUs have shared what a node keeps: none of that is left."""
        self.clock.stop()
        before.put_back()
        if obstacle := before.obstacle():
            raise StepNotRepeatedError(
                f"{self._patcher.streamed.title}: {_shared(changed)}. The step cannot be run again on one "
                f"GPU, because {obstacle}. {AS_IT_IS}"
            )
        reason = _shared(changed)
        verdicts.keep(self.kind(None), reason)
        self.tell(reason)
        return self.alone()

    def first(self, way: Way, reason: str, is_last: bool) -> Outputs:
        """The first step of its kind, both ways. ``reason``: why it was not divided in a better way; ``is_last``: there
        is none that is not so good."""
        outputs, verdict = self._verify(way)
        if verdict is not None:
            keeps_state = verdict.startswith(KEEPS_STATE)
            verdicts.keep(self.kind(None if keeps_state else way), verdict)
            if is_last or keeps_state or not verdict:
                self.tell(verdict and (reason or verdict))
        return outputs

    def _why_given_up(self, error: Exception) -> str | None:
        """Why a step that failed with this is run on one GPU; None where it would fail there too."""
        if isinstance(error, (HeldUpError, UndividedError)):
            return f"its tokens cannot be divided ({error})"
        if has_no_room(error):
            return no_room(self._patcher)
        return None

    def _give_up(self, error: Exception, reason: str) -> None:
        logger.warning("[WeightStream] %s: %s", self._patcher.streamed.title, str(error))
        self.clock.stop()
        self._patcher.streamed.gave_up = reason
        self.tell(reason)

    def _verify(self, way: Way) -> tuple[Outputs, str | None]:
        """Run it both ways; returns what one GPU gives, and a verdict, or None where there is none for next time."""
        outputs, verdict = self._compare(way)
        if verdict is not None and verdict.startswith(OTHER_BITS) and not self._has_others:
            _, verdict = self._compare(way)  # What a GPU computes first may differ from all that it computes later.
        return outputs, verdict

    def _compare(self, way: Way) -> tuple[Outputs, str | None]:
        before = self._state()
        expected = self.alone()
        if changed := before.changed():
            return expected, _shared(changed)
        try:
            found = self.together(way)
        except Exception as error:
            if (reason := self._why_given_up(error)) is None:
                raise
            before.put_back()
            if isinstance(error, UndividedError):
                return expected, reason
            self._give_up(error, reason)
            return expected, None
        if changed := before.changed():
            before.put_back()
            return expected, _shared(changed)
        if all(map(_same_bits, found, expected)):
            return expected, ""
        most = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
        return expected, f"{OTHER_BITS} (by {most:.1e} at most)"


def _differs(before: list[tuple[object, object, int]], after: list[tuple[object, object, int]]) -> bool:
    """Whether the pack has taken time in a step: a GPU was measured, has another plan, or has run the step again."""
    measured = any(recorder is not None for _, recorder, _ in (*before, *after))
    return measured or any(
        one[0] is not other[0] or one[2] != other[2] for one, other in zip(before, after, strict=True)
    )


def _shared(what: str) -> str:
    return f"{KEEPS_STATE} ({what}), which GPUs would share"


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
