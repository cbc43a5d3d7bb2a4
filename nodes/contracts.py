"""The cheap part of what we rely on in ComfyUI: names and signatures, asked once.

A host that is newer than we know may have changed them. It is better to say so when the pack starts, and to load models
the host's own way, than to fail a prompt in its middle. The whole of what we rely on is in docs/hosts.md, each with a
test of what the host does.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from comfy.model_patcher import ModelPatcher

from ..streaming import UnsupportedModelError
from . import hosts

logger = logging.getLogger(__name__)

# Methods of a patcher that we call or take the place of, and the arguments by which they are told what to do.
PATCHER_METHODS = {
    "clone": ("disable_dynamic", "model_override"),
    "get_clone_model_override": (),
    "model_size": (),
    "loaded_size": (),
    "get_free_memory": ("device",),
    "memory_required": ("input_shape",),
    "partially_load": ("device_to", "extra_memory"),
    "partially_unload": ("device_to", "memory_to_free"),
    "load": ("device_to", "lowvram_model_memory", "full_load"),
    "detach": (),
    "patch_model": ("load_weights",),
    "unpatch_model": ("device_to", "unpatch_weights"),
    "patch_weight_to_device": ("key", "device_to", "return_weight"),
    "use_ejected": ("skip_and_inject_on_exit_only",),
    "patch_hooks": ("hooks",),
    "unpatch_hooks": (),
    "apply_hooks": ("hooks", "force_apply"),
    "get_combined_hook_patches": ("hooks",),
    "get_key_patches": (),
    "model_state_dict_for_saving": (),
    "model_patches_models": (),
    "set_additional_models": ("key", "models"),
    "remove_additional_models": ("key",),
    "get_additional_models_with_key": ("key",),
    "add_wrapper_with_key": ("wrapper_type", "key", "wrapper"),
    "remove_wrappers_with_key": ("wrapper_type", "key"),
    "get_wrappers": ("wrapper_type", "key"),
    "get_all_callbacks": ("call_type",),
    "is_clone": ("other",),
    "is_dynamic": (),
    "deepclone_multigpu": (),
    "match_multigpu_clones": (),
}
# Names of the host's modules, and the arguments by which functions among them are told what to do.
MODULES: dict[str, dict[str, tuple[str, ...]]] = {
    "comfy.model_management": {
        "current_loaded_models": (),
        "free_memory": ("memory_required", "device", "keep_loaded"),
        "free_pins": ("size",),
        "get_all_torch_devices": (),
        "get_free_memory": ("dev",),
        "get_torch_device": (),
        "get_total_memory": ("dev",),
        "is_device_cpu": ("device",),
        "is_device_cuda": ("device",),
        "load_models_gpu": ("models",),
        "MAX_PINNED_MEMORY": (),
        "minimum_inference_memory": (),
        "NUM_STREAMS": (),
        "throw_exception_if_processing_interrupted": (),
        "TOTAL_PINNED_MEMORY": (),
        "unet_manual_cast": ("weight_dtype", "inference_device"),
        "vram_state": (),
        "VRAMState": (),
    },
    "comfy.sd": {
        "CLIP": (),
        "load_checkpoint_guess_config": ("output_vae", "output_clip", "output_model", "embedding_directory"),
        "load_checkpoint_guess_config_model_only": ("model_options", "disable_dynamic"),
        "load_diffusion_model": ("model_options", "disable_dynamic"),
        "load_diffusion_model_state_dict": ("sd", "model_options", "metadata", "disable_dynamic"),
        "load_state_dict_guess_config": (
            *("sd", "output_vae", "output_clip", "metadata", "model_options", "disable_dynamic"),
        ),
        "VAE": (),
    },
    "comfy.utils": {
        "get_attr": ("obj", "attr"),
        "load_torch_file": ("ckpt", "device", "return_metadata"),
        "PROGRESS_BAR_HOOK": (),
        "ProgressBar": ("total", "node_id"),
        "resolve_attr": ("obj", "attr"),
        "string_to_seed": (),
    },
    "comfy.float": {"stochastic_rounding": ("dtype", "seed")},
    "comfy.lora": {
        "calculate_shape": ("patches", "weight", "key"),
        "calculate_weight": ("patches", "weight", "key", "intermediate_dtype"),
    },
    "comfy.memory_management": {"aimdo_enabled": ()},
    "comfy.model_detection": {"unet_prefix_from_state_dict": ()},
    "comfy.model_patcher": {"CoreModelPatcher": ()},
}


@lru_cache(maxsize=1)
def broken_contracts() -> tuple[str, ...]:
    """What this host does not have as we need it, for people; nothing of one that we know."""
    return tuple(_broken())


def check_host() -> None:
    """Raise where streaming would fail in the middle of a prompt.

    Raises:
        UnsupportedModelError: this ComfyUI is not as we know it; the message says in what.
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
    yield from _lacking("ModelPatcher", ModelPatcher, PATCHER_METHODS)
    for name, wanted in MODULES.items():
        yield from _lacking(name.removeprefix("comfy."), hosts.module_of_host(name), wanted)
    if not hasattr(hosts.WrappersMP, "APPLY_MODEL"):
        yield "WrappersMP.APPLY_MODEL is gone"
    if not hasattr(hosts.CallbacksMP, "ON_LOAD"):
        yield "CallbacksMP.ON_LOAD is gone"
    yield from hosts.broken_files()
    yield from hosts.broken_recordings()


def _lacking(where: str, holder: Any, wanted: dict[str, tuple[str, ...]]) -> Iterator[str]:
    for name, arguments in wanted.items():
        if not hasattr(holder, name):
            yield f"{where}.{name} is gone"
        elif lacking := [one for one in arguments if not _takes(getattr(holder, name), one)]:
            yield f"{where}.{name} takes no {' or '.join(lacking)}"


def _takes(function: Callable[..., Any], argument: str) -> bool:
    """Whether it can be given this argument by name. What says nothing of its arguments is trusted."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return True
    return argument in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
