"""What goes wrong in a prompt of the soak: memory runs out, models are unloaded or give way, somebody interrupts."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from soak_cases import STEPS, Fault
from torch import nn

T = TypeVar("T")

# Calls among which a fault of this kind falls: of a block or a layer in a prompt, of copies and of allocations.
CALLS = 2 * STEPS
COPIES, ALLOCATIONS = 60, 12
# More than any device has.
TOO_MUCH = 1 << 44


@contextmanager
def planted(model: ModelPatcher, faults: Sequence[Fault], hit: Counter[str]) -> Iterator[ModelPatcher]:
    """A clone of ``model`` in whose run the ``faults`` happen; each that does is counted in ``hit``."""
    clone = model.clone()
    with ExitStack() as stack:
        for fault in faults:
            stack.enter_context(_plant(clone, fault, hit))
        yield clone


@contextmanager
def _plant(model: Any, fault: Fault, hit: Counter[str]) -> Iterator[None]:
    def happens() -> None:
        hit[fault.kind] += 1

    blocks = [block.module for streamer in model.streamers for block in streamer.blocks.blocks]
    inside = {module for block in blocks for module in block.modules()}
    outside = [module for module in _leaves(model.model.diffusion_model) if module not in inside]
    if fault.kind == "memory runs out at a block":
        yield from _on_call(_pick(blocks, fault), fault, happens, _run_out)
    elif fault.kind == "memory runs out in a block":
        yield from _on_call(_pick(_leaves(_pick(blocks, fault)), fault), fault, happens, _run_out)
    elif fault.kind == "memory runs out outside of blocks":
        yield from _on_call(_pick(outside, fault), fault, happens, _run_out)
    elif fault.kind == "interrupt":
        yield from _on_call(_pick(_leaves(_pick(blocks, fault)), fault), fault, happens, _interrupt)
    elif fault.kind == "memory runs out in a copy":
        yield from _in_backend(model, "_copy_now", int(fault.when * COPIES), fault, happens)
    elif fault.kind == "memory runs out in an allocation":
        yield from _in_backend(model, "_empty", int(fault.when * ALLOCATIONS), fault, happens)
    else:
        _between_steps(model, fault, happens)
        yield


def _leaves(module: nn.Module) -> list[nn.Module]:
    return [each for each in module.modules() if not [*each.children()]]


def _pick(those: Sequence[T], fault: Fault) -> T:
    return those[int(fault.where * len(those))]


# -- in steps --------------------------------------------------------------------------------------------------------


def _run_out() -> None:
    if torch.cuda.is_available():
        torch.empty(TOO_MUCH, dtype=torch.uint8, device="cuda")
    raise torch.OutOfMemoryError("no room")


def _interrupt() -> None:
    raise mm.InterruptProcessingException


def _on_call(module: nn.Module, fault: Fault, happens: Callable[[], None], what: Callable[[], None]) -> Iterator[None]:
    """Once, when ``module`` is called: at its begin, or, where it is a layer in a block, with its work done."""
    left = 1 + int(fault.when * CALLS)

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            happens()
            what()

    register = module.register_forward_hook if " in a block" in fault.kind else module.register_forward_pre_hook
    handle = register(count)
    try:
        yield
    finally:
        handle.remove()


def _in_backend(model: Any, method: str, calls: int, fault: Fault, happens: Callable[[], None]) -> Iterator[None]:
    """Once, when a device of the model copies or allocates."""
    backend = _pick(model.streamers, fault).backend
    real, left = getattr(backend, method), 1 + calls

    def counted(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            happens()
            raise torch.OutOfMemoryError("no room")
        return real(*args)

    before = vars(backend).get(method)  # Of another fault.
    setattr(backend, method, counted)
    try:
        yield
    finally:
        del vars(backend)[method]
        if before is not None:
            setattr(backend, method, before)


# -- between steps ---------------------------------------------------------------------------------------------------


def _between_steps(model: Any, fault: Fault, happens: Callable[[], None]) -> None:
    """Once, behind one of the steps: as when another node, or another prompt, needs the memory.

    What hangs on the MODEL must not keep it: the host loses sight of one whose patchers the collector takes at once.
    """
    left, reference = 1 + int(fault.when * (STEPS - 1)), weakref.ref(model)

    def count(args: dict[str, Any]) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left == 0 and (patcher := _patcher_of(reference(), fault)) is not None:
            happens()
            if "unloaded" in fault.kind:
                _unload(patcher)
            else:
                patcher.partially_unload(patcher.offload_device, int(fault.share * patcher.loaded_size()))
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(count)


def _patcher_of(model: Any, fault: Fault) -> Any:
    """What the host has loaded of the model: its home, or one of its parts; None where it has none."""
    wanted = model.parts if " part " in fault.kind else [model]
    loaded = [each.model for each in mm.current_loaded_models]
    found = [patcher for patcher in loaded if patcher is not None and any(patcher.is_clone(each) for each in wanted)]
    return _pick(found, fault) if found else None


def _unload(patcher: Any) -> None:
    for loaded in [loaded for loaded in mm.current_loaded_models if loaded.model is patcher]:
        mm.current_loaded_models.remove(loaded)
        loaded.model_unload()
