"""Somebody moves the weights of a MODEL while it is sampled: between two steps, or in the middle of one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import count
from threading import Semaphore
from typing import Any

import comfy.model_management as mm
import torch
from weightstream.nodes.host import devices
from weightstream.nodes.model.parts import PartPatcher
from weightstream.nodes.model.patcher import StreamedModelPatcher

Act = Callable[[Any], None]


def unload_everything(model: Any) -> None:
    mm.unload_all_models()


def unload_the_home(model: StreamedModelPatcher) -> None:
    devices.unload(model)


def unload_the_parts(model: StreamedModelPatcher) -> None:
    for part in _loaded_parts(model):
        devices.unload(part)


def home_gives_way(model: StreamedModelPatcher) -> None:
    _give_way(model, 8 << 20)


def unpatch_the_parts(model: StreamedModelPatcher) -> None:
    for part in model.parts:
        part.unpatch_model(part.offload_device)


def parts_give_all(model: StreamedModelPatcher) -> None:
    for part in model.parts:
        part.partially_unload(part.offload_device, 1 << 30)


def parts_give_way(model: StreamedModelPatcher) -> None:
    for part in _loaded_parts(model):
        _give_way(part, 3 << 20)


def _give_way(model: StreamedModelPatcher, nbytes: int) -> None:
    has_some = bool(model.streamer.plan.resident)
    assert (model.partially_unload(model.offload_device, nbytes) > 0) is has_some


def loads_its_own_and_ours_again(model: StreamedModelPatcher) -> None:
    """As nodes of the host do, which encode an image in the middle of a step."""
    used = [loaded.model for loaded in mm.current_loaded_models]
    mm.unload_all_models()
    mm.load_models_gpu(used)


OF_ONE_DEVICE = (unload_everything, home_gives_way)
OF_TWO_DEVICES = (*OF_ONE_DEVICE, unload_the_home, unload_the_parts, parts_give_way)


def between_steps(model: Any, act: Act, at: int = 1) -> Any:
    """A MODEL like ``model`` with which somebody does ``act`` after step ``at``."""
    model, steps = model.clone(), count()

    def after(args: dict[str, Any]) -> torch.Tensor:
        if next(steps) == at:
            act(model)
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(after)
    return model


def inside_of_a_step(model: Any, act: Act, always: bool = False) -> Any:
    """A MODEL like ``model`` with which somebody does ``act`` in the middle of its third run, or of all, in a block.

    Whether it is time for that is no state of the step, which would be put back when it runs again.
    """
    model, before, once = model.clone(), Semaphore(2), Semaphore(1)

    def replace(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        if always or (not before.acquire(blocking=False) and once.acquire(blocking=False)):
            act(model)
        return extra["original_block"](args)

    model.set_model_patch_replace(replace, "dit", "double_block", 1)
    return model


def around_a_step(model: Any, kind: str, act: Act, at: Collection[int] = (2,)) -> Any:
    """A MODEL like ``model`` with a wrapper of this kind that does ``act`` before what it wraps, in these of its calls.

    It counts them in what it has closed over, so a step that runs again counts, and acts, as it did before.
    """
    model, calls = model.clone(), [0]

    def wrapper(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] in at:
            act(model)
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(kind, "moves weights", wrapper)
    return model


@contextmanager
def originals_stay(model: StreamedModelPatcher) -> Iterator[None]:
    """Nothing writes to the file's tensors meanwhile."""
    specs = [spec for streamer in model.streamers for spec in streamer.blocks.specs]
    before = [_bytes(spec.original).clone() for spec in specs]
    yield
    changed = [
        spec.name for spec, was in zip(specs, before, strict=True) if not torch.equal(_bytes(spec.original), was)
    ]
    assert changed == []


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _loaded_parts(model: StreamedModelPatcher) -> list[PartPatcher]:
    found = [loaded.model for loaded in mm.current_loaded_models if isinstance(loaded.model, PartPatcher)]
    found = [part for part in found if any(part.is_clone(ours) for ours in model.parts)]
    assert found
    return found
