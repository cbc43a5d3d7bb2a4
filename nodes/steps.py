"""Steps of streamed models, under their streamers' care (:meth:`streaming.Streamer.run`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import comfy.model_management as mm
import torch

from ..streaming import State
from .hosts import end_recordings, nesting_pauses
from .shares import PartFullError
from .step_state import RepeatableStep, StepState

if TYPE_CHECKING:
    from .patcher import StreamedModelPatcher

T = TypeVar("T")


def run_streamed(executor: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run the model once. The host calls this around each step of a MODEL.

    An interrupt is no ``Exception``, so torch runs no hook for it: the streamer releases here what it hit.
    """
    patcher = getattr(executor.class_obj, "current_patcher", None)
    if not hasattr(patcher, "streamer"):
        return executor(x, *args, **kwargs)
    step = partial(
        run_step,
        patcher,
        repeatable(patcher, lambda: executor(x, *args, **kwargs), _roots_of(executor, x, args, kwargs)),
        shapes_of((x, *args, *kwargs.values())),
        lambda: int(patcher.memory_required(x.shape)),
    )
    shares = patcher.streamed.shares
    return step() if shares is None else shares.run(patcher, step)


def _roots_of(executor: Any, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the code of a step gets, by names for people."""
    given = (*args, *kwargs.values())
    options = next((value for value in given if isinstance(value, dict) and "wrappers" in value), {})
    named = {f"transformer_options[{name!r}]": value for name, value in options.items()}
    return {**named, "its input": x, "its arguments": given, "a wrapper": getattr(executor, "wrappers", None)}


def repeatable(patcher: StreamedModelPatcher, forward: Callable[[], T], roots: dict[str, Any]) -> RepeatableStep[T]:
    """A step of ``patcher`` that may be called again when it has failed; ``roots`` is what it can get hold of."""
    devices = [patcher.load_device, *(part.load_device for part in patcher.parts)]
    modules = patcher.streamed.step_modules(getattr(patcher.model, "diffusion_model", patcher.model))
    with patcher.streamer.backend.record.paused():
        return RepeatableStep(forward, StepState(roots, modules, devices))


def run_step(
    patcher: StreamedModelPatcher, forward: Callable[[], T], shape: Hashable, estimate: Callable[[], int] | None
) -> T:
    """Run ``forward``, one step of the model that ``patcher`` has loaded (:meth:`streaming.Streamer.run`)."""
    # Reloading takes hooks off, and a reload that fails leaves them off: what is in effect now is what counts.
    hooks = patcher.current_hooks
    forward = partial(_leaving_nothing_open, forward)
    # Activations are never on a virtual device.
    virtual = patcher.streamer.backend.budget is not None
    reload = partial(patcher.reload, hooks=hooks)
    for part in patcher.parts:
        forward = partial(_run_part, part, forward, shape, estimate)
    output = patcher.streamer.run(forward, shape, reload, None if virtual else estimate)
    patcher.streamed.announce_changes()
    return output


def _leaving_nothing_open(forward: Callable[[], T]) -> T:
    """Run ``forward``. If it fails nothing of the host's recordings is left open: memory is taken, or it runs again,
    right behind this."""
    try:
        with nesting_pauses:
            return forward()
    except BaseException:
        end_recordings()
        raise


def _run_part(
    part: StreamedModelPatcher, forward: Callable[[], T], shape: Hashable, estimate: Callable[[], int] | None
) -> T:
    """A step on another device, inside of the one on the model's own."""
    if part.streamer.state is State.UNLOADED:
        mm.load_models_gpu([part])  # Somebody needed the memory there, or has loaded the MODEL alone.
        if part.streamer.state is State.UNLOADED:
            raise PartFullError(part)
    return run_step(part, forward, shape, estimate)


def shapes_of(values: Iterable[Any]) -> tuple:
    """What of a step's arguments its time and memory hang on: the shapes of tensors, also of those in lists."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(tuple(value.shape))
        elif isinstance(value, (list, tuple)):
            found.append(shapes_of(value))
    return tuple(found)
