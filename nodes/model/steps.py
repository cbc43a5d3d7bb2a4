"""Runs steps of streamed models by their streamers (:meth:`streaming.Streamer.run`)."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any, TypeVar

import comfy.model_management as mm
import torch
from torch.utils.hooks import RemovableHandle

from ...streaming import State, StreamingError, WeightsMovedError
from ...streaming.collector import uncollected
from ..host.devices import same_device
from ..host.hosts import end_recordings, nesting_pauses
from ..state.step_state import RepeatableStep, StepState
from ..tell.failures import told_on_node
from . import sharing
from .hooked import HookedPatcher
from .sharing import PartFullError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The host loads models on one thread; the GPUs that work at the same time have one each.
_loading = threading.RLock()


def run_streamed(executor: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run the model once. The host calls this around each step of a MODEL.

    An interrupt is no ``Exception``, so torch runs no hooks for it: the streamer releases the block that it hit.
    """
    patcher = getattr(executor.class_obj, "current_patcher", None)
    if not hasattr(patcher, "streamer"):
        return executor(x, *args, **kwargs)
    with told_on_node(patcher.streamed.title, patcher.streamed.node_id):
        return _run_streamed(patcher, executor, x, *args, **kwargs)


def _run_streamed(patcher: HookedPatcher, executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    ensure_loaded(patcher, lambda: int(patcher.memory_required(x.shape)))
    step = partial(
        run_loaded,
        patcher,
        repeatable(
            patcher, in_effect(patcher, lambda: executor(x, *args, **kwargs)), _roots_of(executor, x, args, kwargs)
        ),
        shapes_of((x, *args, *kwargs.values())),
        lambda: int(patcher.memory_required(x.shape)),
    )
    if patcher.streamed.shares is None:
        return step()
    try:
        return sharing.run(patcher, step)
    finally:
        for part in patcher.parts:
            part.let_go()


def _roots_of(executor: Any, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The objects that the code of a step is given, by names for people."""
    given = (*args, *kwargs.values())
    options = next((value for value in given if isinstance(value, dict) and "wrappers" in value), {})
    named = {f"transformer_options[{name!r}]": value for name, value in options.items()}
    return {**named, "its input": x, "its arguments": given, "a wrapper": getattr(executor, "wrappers", None)}


@uncollected()
def repeatable(patcher: HookedPatcher, forward: Callable[[], T], roots: dict[str, Any]) -> RepeatableStep[T]:
    """A step of ``patcher`` that may be called again when it has failed; ``roots`` are objects that it can reach."""
    devices = [patcher.load_device, *(part.load_device for part in patcher.parts)]
    modules = patcher.streamed.step_modules(getattr(patcher.model, "diffusion_model", patcher.model))
    streamers = patcher.streamers
    with patcher.streamer.backend.record.paused():
        before = StepState(roots, modules, devices, lambda: {name for each in streamers for name in each.written()})
        return RepeatableStep(forward, before, patcher.streamed.name)


def in_effect(patcher: HookedPatcher, forward: Callable[[], T]) -> Callable[[], T]:
    """Wrap ``forward`` for one step, to run with the hooks of this moment in the weights, and with all weights loaded.

    The result raises :class:`WeightsMovedError` if weights were moved while it ran, and may then be called again.
    """
    return partial(_with_hooks, patcher, patcher.current_hooks, forward)


def _with_hooks(patcher: HookedPatcher, hooks: Any, forward: Callable[[], T]) -> T:
    if not patcher.is_whole:
        raise _moved(patcher)  # On one of several devices, while another device runs the step again.
    patcher.put_hooks_on(hooks)
    patcher.streamed.step_hooks = hooks
    moves = patcher.moves
    try:
        output = forward()
    except StreamingError as error:
        if isinstance(error, WeightsMovedError) and not patcher.is_whole:
            raise _moved(patcher) from error
        raise
    except Exception as error:
        # The error may come from an original in a weight's place: that is in host memory, and may have another dtype.
        if patcher.moves == moves or patcher.streamer.backend.is_full(error):
            raise
        raise _moved(patcher) from error
    finally:
        patcher.streamed.step_hooks = None
    if not (patcher.is_whole and patcher.holds_hooks(hooks)):
        raise _moved(patcher)
    return output


def _moved(patcher: HookedPatcher) -> WeightsMovedError:
    for part in patcher.parts:
        part.hold()  # The retry also runs the code that took the weights, so parts keep theirs until the step ends.
    return WeightsMovedError(
        f"weights of {patcher.streamed.name} were taken off their device while a step of it ran, and were not loaded "
        "again before it went on. Some node frees memory in the middle of a step: move it before the sampler, or have "
        "ComfyUI load this model itself (mode off)"
    )


def run_loaded(
    patcher: HookedPatcher, forward: Callable[[], T], shape: Hashable, estimate: Callable[[], int] | None
) -> T:
    """Run ``forward``, one step of the model that ``patcher`` has loaded (:meth:`streaming.Streamer.run`)."""
    forward = partial(_leaving_nothing_open, forward)
    # Activations are never on a virtual device.
    virtual = patcher.streamer.backend.is_virtual
    # If another clone was loaded meanwhile, the host continues with the patches of that one.
    patcher = patcher.streamed.loaded() or patcher
    for part in patcher.parts:
        forward = partial(_run_part, part, forward, shape, estimate)
    output = patcher.streamer.run(forward, shape, patcher.reload, None if virtual else estimate)
    patcher.streamed.announce_changes()
    return output


def _leaving_nothing_open(forward: Callable[[], T]) -> T:
    """Run ``forward``. If it fails, end the host's records of allocations: right afterwards memory is allocated, or the
    step runs again."""
    try:
        with nesting_pauses:
            return forward()
    except BaseException:
        end_recordings()
        raise


def ensure_loaded(patcher: HookedPatcher, estimate: Callable[[], int] = lambda: 0) -> None:
    """Before a step: load a MODEL that was unloaded since the last one. ``estimate`` returns bytes of activations."""
    if patcher.streamer.state is State.UNLOADED:
        load_again(patcher, 0 if patcher.streamer.backend.is_virtual else estimate())


def load_again(patcher: HookedPatcher, memory: int = 0) -> None:
    """Have the host load a MODEL that was unloaded since its last step.

    Args:
        patcher: of the MODEL.
        memory: bytes to keep for activations.

    Raises:
        StreamingError: it is still not loaded afterwards.
    """
    hooks, name = patcher.streamed.step_hooks or patcher.current_hooks, patcher.streamed.name
    ours = [patcher, *patcher.get_nested_additional_models()]
    beside = patcher.streamed.beside
    if beside:  # Those on other GPUs are in the middle of their steps, each on a thread of its own.
        ours = [one for one in ours if same_device(one.load_device, patcher.load_device)]
    # Other models that the prompt uses stay where they are, and count as used. But a part may be loaded while the MODEL
    # runs, so no other model is passed along with it.
    used = [loaded.model for loaded in mm.current_loaded_models if loaded.currently_used and loaded.model is not None]
    is_part = patcher.hooked is not patcher
    others = [other for other in used if not (is_part or any(one.is_clone(other) for one in ours))]
    if beside:
        others = [other for other in others if same_device(other.load_device, patcher.load_device)]
    logger.info("%s is not loaded though it runs: loading it", name)
    with _loading:
        mm.load_models_gpu([*ours, *others], memory_required=memory)
    if patcher.streamer.state is State.UNLOADED:
        raise StreamingError(
            f"{name} was unloaded while it was in use, and there is no room to load it again. Free memory, or lower "
            "vram_limit_gb, and queue the prompt once more."
        )
    patcher.put_hooks_on(hooks)


def load_when_called(patcher: HookedPatcher) -> RemovableHandle:
    """Have a call of the root of a MODEL that is not whole load it again first. This is for code that calls the root by
    itself, or that has the MODEL give up weights in a step before the root is called."""
    reference = weakref.ref(patcher)

    @torch.compiler.disable
    def load(*_: object) -> None:
        moved = reference()
        if moved is None:
            return  # The patcher with which it was loaded is gone.
        running = getattr(moved.model, "current_patcher", None)
        whole = running if hasattr(running, "streamer") else moved
        if whole.is_whole:
            handle.remove()  # The step before this call has loaded it.
            return
        late = [streamer for streamer in whole.streamers if streamer.state is State.UNLOADED]
        load_again(whole)
        if not whole.is_whole:
            missing = [one.backend.name for one in whole.streamers if one.state is not State.LOADED]
            raise StreamingError(
                f"{whole.streamed.name} was called while part of it was not loaded, and there is no room for that "
                f"part. Free memory on {', '.join(missing)}, or use fewer GPUs."
            )
        for streamer in late:
            streamer.begin_step()  # Its hooks have only just been attached.

    handle = patcher.streamer.root.register_forward_pre_hook(load, prepend=True)
    return handle


def _run_part(part: HookedPatcher, forward: Callable[[], T], shape: Hashable, estimate: Callable[[], int] | None) -> T:
    """A step on another device, inside of the one on the model's own."""
    if part.streamer.state is State.UNLOADED:
        mm.load_models_gpu([part])  # Somebody needed the memory there, or has loaded the MODEL alone.
        if part.streamer.state is State.UNLOADED:
            raise PartFullError(part)
    return run_loaded(part, forward, shape, estimate)


def shapes_of(values: Iterable[Any]) -> tuple:
    """What of a step's arguments its time and memory depend on: the shapes of tensors, also of those in lists."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(tuple(value.shape))
        elif isinstance(value, (list, tuple)):
            found.append(shapes_of(value))
    return tuple(found)
