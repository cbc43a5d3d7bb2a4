"""Runs steps: before one the plan is fitted to what is known, and one that fails for want of memory is run again.

[Note: what the first steps teach]
Before the first step it is not known in which order the parts of a block run, or whether each of them runs as a module
at all (some code reads a layer's weight without calling it). So in that step all that is streamed of a block is one
segment, on the device from the block's begin to its end, and hooks record which units run. From then on segments are
parts of blocks. Copies are timed, and in step two each unit too, less its waits. The plan for step three is made from
that, and then stays, unless those times turn out to be too long: because the host needed as long to launch that step,
or a later step on several devices is shorter (``Group.doubt``); then they are measured once more.
Making a plan waits for the device, and so is done only after the first two steps of a shape, and when memory requires
it (vram_budget.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import partial
from typing import TypeVar

from .config import format_bytes
from .devices.backend import is_out_of_memory
from .errors import StreamingError, WeightsMovedError
from .loading import Loading
from .planning.plan import Plan
from .planning.state import State

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Out of memory: these shares of what is on the device are given up, one after another, until the step runs.
OUT_OF_MEMORY_SHARES = (0.03, 0.2, 1.0)

# What errors say of a tensor in host memory: those of most of torch, its convolutions, Triton and Flash Attention.
OTHER_DEVICE = ("same device", "and weight type (", "cpu tensor?", "must be on CUDA")


def run_step(
    model: Loading,
    forward: Callable[[], T],
    shape: Hashable,
    reload: Callable[[Plan], None],
    estimate: Callable[[], int] | None,
) -> T:
    """Run one step of ``model``; the other arguments are those of :meth:`Streamer.run`."""
    if model.state is State.UNLOADED:
        raise StreamingError("the model is not loaded: it would run with its originals")
    _adapt(model, shape, reload, estimate)
    shrinks = (partial(_shrink, model, share, reload) for share in OUT_OF_MEMORY_SHARES)
    remedies = [partial(_tidy, model), *shrinks]
    whole_again = [partial(_make_whole, model, reload, model.plan)]
    while True:
        try:
            model.take_overwritten()  # Forget those of a step that has failed: its slots are empty now.
            output = _watched(model, forward)
            _check_writes(model)
            return output
        except Exception as error:
            if model.backend.is_full(error) and remedies and _can_shrink(model):
                remedy = remedies.pop(0)
            elif isinstance(error, WeightsMovedError) and whole_again:
                remedy = whole_again.pop()
            elif _is_of_another_device(error) and model.arriving:
                remedy = partial(_await_residents, model)
            elif _is_of_another_device(error) and _streams_parts(model.plan):
                remedy = partial(_stream_whole_blocks, model, reload)
            else:
                if _is_of_another_device(error):
                    _say_what_was_not_entered(model)
                raise
            reason = str(error).partition("\n")[0]
        finally:
            model.settle()
        # Not inside of "except": the error's frames would keep the activations of the failed step alive.
        remedy(reason)
        model.counters.reruns += 1
        if model.state is State.REDUCED:  # A weight could not be brought, in the step that failed or now.
            _make_whole(model, reload, model.plan, reason)


def _watched(model: Loading, forward: Callable[[], T]) -> T:
    """Run a step; where it teaches something, note how much memory its activations take."""
    output = forward()
    if model.measuring.has_whole_step:
        peak = model.backend.peak_bytes()
        if peak is not None:
            model.planner.vram.observe(model.backend.memory(), peak)
    return output


# -- before a step -----------------------------------------------------------------------------------------------


def _adapt(
    model: Loading,
    shape: Hashable,
    reload: Callable[[Plan], None],
    estimate: Callable[[], int] | None,
) -> None:
    """Fit the plan to what is known (Note: what the first steps teach)."""
    model.group.learn()
    model.group.doubt()
    learned = model.measuring.has_learned()
    if begins := model.planner.vram.begins:
        _trim(model)
    plan, moves = model.planner.plan_step(shape, model.standing, model.memory(), learned, estimate)
    if moves:
        model.load_within(plan, reload)
    else:
        model.keep(plan)
    planner, measuring = model.planner, model.measuring  # Only now: loading may have replaced them.
    if moves or (planner.vram.lacks_piece and not begins):
        _trim(model)
    teaches, shown = planner.wants_measuring(), measuring.is_asked
    wanted = teaches or shown
    if learned or shown or not model.is_hooked(wanted):
        if wanted:
            if not teaches:
                model.drain()  # The spans of several devices lie as their begins do on the host's clock.
            told = model.outline, model.backend, model.reader, model.head_start
            measuring.record(*told, step=model.steps_of_run + 1, teaches=teaches)
        else:
            measuring.stop()
        model.attach_hooks()
    model.build()


def _trim(model: Loading) -> None:
    """Have torch give back its cached memory (vram_budget.py, Note: from the same begin)."""
    model.planner.vram.trimmed(model.backend.trim())


# -- after a step that failed ------------------------------------------------------------------------------------


def _can_shrink(model: Loading) -> bool:
    return model.plan is not None and model.device_bytes > model.planner.minimum_bytes


def _tidy(model: Loading, reason: str) -> None:
    """After a step ran out of memory for the first time."""
    _say_out_of_memory(model, reason, "with torch's memory tidied up")
    _trim(model)


def _shrink(model: Loading, share: float, reload: Callable[[Plan], None], reason: str) -> None:
    """After a step ran out of memory: give up ``share`` of what is on the device."""
    before = model.device_bytes
    less = max(before * share, model.config.headroom_bytes)
    budget = max(before - less, model.planner.minimum_bytes)
    _say_out_of_memory(model, reason, f"with {format_bytes(before - budget)} less for weights")
    model.planner.vram.out_of_memory(budget, model.backend.memory(), before)
    model.load_within(model.planner.plan_within(budget), reload)
    _trim(model)


def _make_whole(model: Loading, reload: Callable[[Plan], None], plan: Plan | None, reason: str) -> None:
    """Weights are missing that the plan has on the device: bring all of them there."""
    logger.warning("running a step again: %s", reason)
    assert plan is not None
    model.load_within(plan, reload)


def _await_residents(model: Loading, reason: str) -> None:
    """A resident weight was read outside of its block before it had arrived: wait for all residents."""
    logger.debug("a step runs again when all residents have arrived: %s", reason)
    model.arrive_all()


def _stream_whole_blocks(model: Loading, reload: Callable[[Plan], None], reason: str) -> None:
    """A weight was read without running its module, unlike in the first step: rely no more on modules that run."""
    logger.warning("a weight is read outside of its module, so blocks stream as a whole from now on: %s", reason)
    model.planner.stream_whole_blocks()
    assert model.plan is not None
    model.load_within(model.planner.plan_within(model.plan.budget), reload)


def _say_what_was_not_entered(model: Loading) -> None:
    """Log the blocks that the failed step never entered, whose weights were perhaps read all the same."""
    blocks = model.measuring.recorder.not_entered if model.measuring.recorder is not None else []
    if blocks:
        logger.warning(
            "a tensor on another device was read, and %d of %d blocks had not been entered (%s). If the model "
            "reads weights of blocks without calling anything of them, it cannot stream: try one GPU, or set mode "
            "to off",
            len(blocks),
            model.outline.blocks,
            model.blocks.blocks[blocks[0]].name,
        )


def _check_writes(model: Loading) -> None:
    """Raise if weights were written to while they were in a slot."""
    found = model.take_overwritten()
    if found:
        raise StreamingError(
            f"weights of {', '.join(found[:3])} were written to, or others put in their place, while they ran. They "
            "are copied to the device anew for each step, so that would be lost. Give this model room for all of its "
            "weights, or have ComfyUI load it itself (mode off)"
        )


def may_be_mended(error: Exception) -> bool:
    """Whether a step that failed with ``error`` may be run again, after a remedy."""
    return isinstance(error, WeightsMovedError) or is_out_of_memory(error) or _is_of_another_device(error)


def _is_of_another_device(error: Exception) -> bool:
    """Whether a kernel was given a tensor in host memory."""
    return isinstance(error, (RuntimeError, ValueError)) and any(words in str(error) for words in OTHER_DEVICE)


def _streams_parts(plan: Plan | None) -> bool:
    """Whether ``plan`` relies on units that run by themselves."""
    return plan is not None and plan.learned and bool(plan.segments)


def _say_out_of_memory(model: Loading, reason: str, remedy: str) -> None:
    logger.warning(
        "out of memory in a step on %s with %s of weights, %s free and %s kept by torch; running it again %s (%s)",
        model.backend.name,
        *map(format_bytes, (model.device_bytes, *model.backend.memory())),
        remedy,
        reason,
    )
