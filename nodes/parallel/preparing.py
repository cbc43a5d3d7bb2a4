"""Before a run on several GPUs: they are left out where they cannot have what the run needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from comfy.controlnet import ControlBase

from ...streaming import BudgetError, StreamingError
from ...streaming.devices.backend import is_out_of_memory
from ..model.patcher import PARALLEL, StreamedModelPatcher
from ..twins.takeover import refer_to_its_modules
from .pace import clock_of

logger = logging.getLogger(__name__)


def prepare(executor: Callable[..., Any], model: Any, *arguments: Any, **named: Any) -> Any:
    """Before a run: leave the other GPUs out where they cannot have what the run needs. The host calls this."""
    copies = model.get_additional_models_with_key(PARALLEL)
    if not (copies and isinstance(model, StreamedModelPatcher) and model.streamed.beside):
        return executor(model, *arguments, **named)
    clock_of(model.model, model.streamer.backend).stop()
    if not (reason := _why_alone(model, *arguments)):
        try:
            return executor(model, *arguments, **named)
        except Exception as error:
            if not has_no_room(error):
                raise
            logger.warning("[WeightStream] %s: %s", model.streamed.title, str(error))
            reason = no_room(model)
    copies = model.get_additional_models_with_key(PARALLEL)
    model.remove_additional_models(PARALLEL)
    try:
        model.streamed.tell_of_parallel(reason, model.model)
        return executor(model, *arguments, **named)
    finally:
        model.set_additional_models(PARALLEL, copies)


def no_room(patcher: StreamedModelPatcher) -> str:
    """What is said where a GPU lacks memory even for the least."""
    return f"there is no room for it on all of {', '.join(patcher.streamed.beside)}"


def _why_alone(model: StreamedModelPatcher, noise_shape: Any, conds: Mapping[str, Any], *_: Any) -> str:
    controls = [entry["control"] for entries in conds.values() for entry in entries or () if "control" in entry]
    while controls:
        control = controls.pop()
        if getattr(type(control), "deepclone_multigpu", None) in (None, ControlBase.deepclone_multigpu):
            return f"{type(control).__name__}, which its prompts use, cannot be had on another GPU"
        controls += filter(None, [getattr(control, "previous_controlnet", None)])
    # The host puts these into the models of the other GPUs too.
    exchanged = {"object_patches": model.object_patches, "injections": model.injections}
    if found := refer_to_its_modules(model, exchanged):
        return f"what a node has attached to it ({', '.join(found)}) refers to the modules of the first GPU's model"
    try:
        model.match_multigpu_clones()
    except Exception as error:  # Whatever loaders of other packs do.
        return f"what is attached to it cannot be had on another GPU ({type(error).__name__}: {error})"
    return ""


def has_no_room(error: Exception) -> bool:
    """Whether a step or a load has failed for lack of memory."""
    return is_out_of_memory(error) or isinstance(error, BudgetError) or _is_for_lack_of_room(error)


def _is_for_lack_of_room(error: BaseException | None) -> bool:
    """Whether one of our errors follows from a lack of memory."""
    while isinstance(error, StreamingError):
        error = error.__cause__
        if error is not None and is_out_of_memory(error):
            return True
    return False
