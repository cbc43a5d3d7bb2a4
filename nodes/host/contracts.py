"""Checks once that ComfyUI has the names and signatures that we rely on.

A newer host may have changed them. The pack then says so when it starts, and loads models the host's own way, which is
better than a prompt that fails in its middle. This is the cheap part of what we rely on; all of it is listed in
docs/hosts.md, each with a test of what the host does.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from comfy.model_patcher import ModelPatcher

from ...streaming import UnsupportedModelError
from . import hosts

logger = logging.getLogger(__name__)


class Call(NamedTuple):
    """How we call a function of the host: the number of positional arguments, and the names of keyword arguments."""

    places: int
    names: tuple[str, ...] = ()


# Marks a name that must exist, but that we do not call or that is no function.
THERE = None

Wanted = dict[str, "Call | None"]

# Methods of a patcher, without ``self``.
PATCHER_METHODS: Wanted = {
    "add_wrapper_with_key": Call(3),
    "apply_hooks": Call(1, ("force_apply",)),
    "clone": Call(0, ("disable_dynamic", "model_override")),
    "detach": THERE,
    "get_additional_models_with_key": Call(1),
    "get_all_callbacks": Call(1),
    "get_clone_model_override": Call(0),
    "get_combined_hook_patches": Call(1),
    "get_free_memory": Call(1),
    "get_key_patches": THERE,
    "get_model_object": Call(1),
    "get_nested_additional_models": Call(0),
    "get_wrappers": Call(2),
    "is_clone": Call(1),
    "is_dynamic": Call(0),
    "load": THERE,
    "loaded_size": THERE,
    "memory_required": Call(1),
    "model_patches_models": Call(0),
    "model_size": Call(0),
    "model_state_dict_for_saving": THERE,
    "partially_load": THERE,
    "partially_unload": THERE,
    "patch_hooks": Call(1),
    "patch_model": Call(0, ("load_weights",)),
    "patch_weight_to_device": Call(1, ("device_to", "return_weight")),
    "register_all_hook_patches": THERE,
    "remove_additional_models": Call(1),
    "remove_wrappers_with_key": Call(2),
    "set_additional_models": Call(2),
    "unpatch_hooks": Call(0),
    "unpatch_model": Call(0, ("device_to", "unpatch_weights")),
    "use_ejected": Call(0, ("skip_and_inject_on_exit_only",)),
}
# Names of the host's modules.
MODULES: dict[str, Wanted] = {
    "comfy.model_management": {
        "current_loaded_models": THERE,
        "free_memory": Call(2, ("keep_loaded",)),
        "free_pins": Call(1),
        "get_all_torch_devices": Call(0),
        "lora_compute_dtype": Call(1),
        "get_free_memory": Call(1),
        "get_torch_device": Call(0),
        "get_total_memory": Call(1),
        "interrupt_current_processing": Call(1),
        "InterruptProcessingException": THERE,
        "is_device_cpu": Call(1),
        "is_device_cuda": Call(1),
        "load_models_gpu": Call(1, ("memory_required",)),
        "MAX_PINNED_MEMORY": THERE,
        "minimum_inference_memory": Call(0),
        "NUM_STREAMS": THERE,
        "throw_exception_if_processing_interrupted": Call(0),
        "TOTAL_PINNED_MEMORY": THERE,
        "unet_manual_cast": Call(2),
        "vae_dtype": Call(1),
        "vram_state": THERE,
        "VRAMState": THERE,
    },
    "comfy.sd": {
        "CLIP": THERE,
        "load_checkpoint_guess_config": Call(1, ("output_vae", "output_clip", "output_model", "embedding_directory")),
        "load_checkpoint_guess_config_model_only": Call(1, ("model_options", "disable_dynamic")),
        "load_diffusion_model": Call(1, ("model_options", "disable_dynamic")),
        "load_diffusion_model_state_dict": Call(1, ("model_options", "metadata", "disable_dynamic")),
        "load_state_dict_guess_config": Call(
            1, ("output_vae", "output_clip", "model_options", "metadata", "disable_dynamic")
        ),
        "VAE": THERE,
    },
    "comfy.utils": {
        "get_attr": Call(2),
        "load_torch_file": Call(1, ("return_metadata",)),
        "PROGRESS_BAR_HOOK": THERE,
        "ProgressBar": Call(1, ("node_id",)),
        "resolve_attr": Call(2),
        "string_to_seed": Call(1),
    },
    "comfy.float": {"stochastic_rounding": Call(2, ("seed",))},
    "comfy.lora": {"calculate_shape": Call(3), "calculate_weight": Call(3, ("intermediate_dtype",))},
    "comfy.memory_management": {"aimdo_enabled": THERE},
    "comfy.model_detection": {"unet_prefix_from_state_dict": Call(1)},
    "comfy.model_patcher": {"CoreModelPatcher": THERE},
}


# What several GPUs need to work on one step at the same time (nodes/parallel/copies.py). Without it all else works.
PARALLEL_METHODS: Wanted = {"deepclone_multigpu": Call(0, ("new_load_device",)), "match_multigpu_clones": Call(0)}
PARALLEL_NAMES: dict[str, Wanted] = {
    "comfy.multigpu": {"MultiGPUThreadPool": THERE},
    "comfy.samplers": {"_calc_cond_batch_multigpu": Call(5)},
}


@lru_cache(maxsize=1)
def why_not_parallel() -> str:
    """Why this host does not run one step on several GPUs at once; empty where it does."""
    found = [*_lacking("ModelPatcher", ModelPatcher, PARALLEL_METHODS, before=1)]
    for name, wanted in PARALLEL_NAMES.items():
        found += _lacking(name.removeprefix("comfy."), hosts.module_of_host(name), wanted)
    found += _lacking("WrappersMP", hosts.WrappersMP, dict.fromkeys(("CALC_COND_BATCH", "PREPARE_SAMPLING"), THERE))
    return f"ComfyUI {hosts.VERSION} cannot do that ({', '.join(found)})" if found else ""


@lru_cache(maxsize=1)
def broken_contracts() -> tuple[str, ...]:
    """Describe for people each name that this host lacks, or that we cannot call as we do. Empty for a known host."""
    try:
        return tuple(_broken())
    except Exception as error:  # Other packs may have replaced what is inspected, by anything.
        return (f"asking failed with {type(error).__name__}: {error}",)


def check_host() -> None:
    """Raise if streaming would fail in the middle of a prompt.

    Raises:
        UnsupportedModelError: this ComfyUI is not as we know it; the message says how it differs.
    """
    if broken := broken_contracts():
        raise UnsupportedModelError(describe(broken))


def describe(broken: tuple[str, ...]) -> str:
    """One line of what is broken."""
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return (
        f"ComfyUI {hosts.VERSION} is not as this version of WeightStream knows it ({', '.join(broken[:3])}{more}); "
        "update WeightStream"
    )


def announce_host() -> None:
    """Say in the log, once, what is broken."""
    if broken := broken_contracts():
        logger.warning("[WeightStream] models are loaded ComfyUI's own way: %s", describe(broken))
    elif hosts.is_newer_than_known():
        logger.info(
            "[WeightStream] ComfyUI %s is newer than those that were tried; what was asked holds", hosts.VERSION
        )


def _broken() -> Iterator[str]:
    yield from (f"{name} is gone" for name in hosts.missing)
    yield from _lacking("ModelPatcher", ModelPatcher, PATCHER_METHODS, before=1)
    for name, wanted in MODULES.items():
        yield from _lacking(name.removeprefix("comfy."), hosts.module_of_host(name), wanted)
    if not hasattr(hosts.WrappersMP, "APPLY_MODEL"):
        yield "WrappersMP.APPLY_MODEL is gone"
    if not hasattr(hosts.CallbacksMP, "ON_LOAD"):
        yield "CallbacksMP.ON_LOAD is gone"
    yield from hosts.broken_recordings()


def _lacking(where: str, holder: Any, wanted: Wanted, before: int = 0) -> Iterator[str]:
    """Yield what of ``wanted`` is gone or cannot be called as we do. ``before`` arguments (``self``) precede ours."""
    for name, call in wanted.items():
        if not hasattr(holder, name):
            yield f"{where}.{name} is gone"
        elif call is not None and not _takes(getattr(holder, name), before + call.places, call.names):
            yield f"{where}.{name} cannot be called with {_describe(call)}"


def _takes(function: Callable[..., Any], places: int, names: tuple[str, ...]) -> bool:
    """Whether ``function`` can be called like this. A function without a readable signature is trusted."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*[None] * places, **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def _describe(call: Call) -> str:
    given = [f"{call.places} argument{'' if call.places == 1 else 's'}"] if call.places else []
    return " and ".join(given + list(call.names)) or "no arguments"
