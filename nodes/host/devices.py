"""The device that a model streams to: its backend, how much memory may be used, and why there is no such device."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import comfy.memory_management
import comfy.model_management as mm
import psutil
import torch
from comfy.model_patcher import ModelPatcher

from ...streaming import (
    Backend,
    ConfigError,
    CpuBackend,
    CudaBackend,
    LocalShare,
    PinBudget,
    UnsupportedModelError,
    VirtualMemory,
    format_bytes,
    gpu_name,
    group_memory,
    parse_switch,
    parse_virtual_devices,
    share_of_environment,
)
from ...streaming.config import VIRTUAL_VARIABLE
from . import hosts
from .contracts import check_host

logger = logging.getLogger(__name__)

VERIFY_VARIABLE = "WEIGHTSTREAM_VERIFY"


@dataclass
class _Virtual:
    """Virtual devices, made once for the process, or what is wrong with the request for them."""

    devices: tuple[VirtualMemory, ...] = ()
    error: ConfigError | None = None
    read: bool = False


_virtual = _Virtual()


def read_environment() -> None:
    """Read ``WEIGHTSTREAM_VIRTUAL`` and ``WEIGHTSTREAM_VERIFY``.

    A bad value is logged now and raised where a node needs it.
    """
    if _virtual.read:
        return
    _virtual.read = True
    _say_whether_verifying()
    text = os.environ.get(VIRTUAL_VARIABLE, "")
    if not text:
        return
    try:
        wanted = parse_virtual_devices(text)
    except ConfigError as error:
        _virtual.error = error
        logger.error("[WeightStream] %s", error)
        return
    _virtual.devices = tuple(VirtualMemory(wanted.budget, gpu_name(index)) for index in range(wanted.count))
    logger.info(
        "[WeightStream] %d virtual device(s) of %s in RAM, used where the host has no GPU",
        wanted.count,
        format_bytes(wanted.budget),
    )


def verifying() -> bool:
    """Whether every copy on the device is compared with its source (``WEIGHTSTREAM_VERIFY=1``).

    Raises:
        ConfigError: the variable has another value.
    """
    return parse_switch(VERIFY_VARIABLE, os.environ.get(VERIFY_VARIABLE, ""))


def _say_whether_verifying() -> None:
    try:
        if verifying():
            logger.info("[WeightStream] every copy is compared with its source, so steps take longer")
    except ConfigError as error:
        logger.error("[WeightStream] %s", error)


def virtual_devices() -> tuple[VirtualMemory, ...]:
    return _virtual.devices


def make_backend(device: torch.device) -> Backend:
    """The backend for the device that the host loads the model to.

    Raises:
        UnsupportedModelError: nothing streams to this device, or on this ComfyUI; the message says why.
        ConfigError: ``WEIGHTSTREAM_VIRTUAL`` is malformed.
    """
    read_environment()
    check_host()
    if mm.is_device_cuda(device):
        if mm.vram_state == mm.VRAMState.HIGH_VRAM:
            raise UnsupportedModelError("ComfyUI was told to keep models in VRAM (--highvram or --gpu-only)")
        return CudaBackend(device, hosts.record)
    if mm.is_device_cpu(device):
        if _virtual.error is not None:
            raise _virtual.error
        index = device.index or 0
        if index < len(_virtual.devices):
            return CpuBackend(_virtual.devices[index], device, hosts.record)
        raise UnsupportedModelError("there is no GPU, so there is nothing to stream to")
    raise UnsupportedModelError(f"streaming needs a CUDA or ROCm device, and this is {device.type}")


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether both are the same device. ``cuda`` without an index is the current CUDA device."""

    def index(device: torch.device) -> int:
        if device.index is None and device.type == "cuda":
            return torch.cuda.current_device()
        return device.index or 0

    return one.type == other.type and index(one) == index(other)


# Bytes of host memory that stay free for other processes: as many as ComfyUI leaves, but at most this share of all.
RESERVED_RAM = 2 * 1024**3
RESERVED_SHARE = 0.1


def _pin_limit() -> int | None:
    """Return how many bytes may be page-locked in all; None if ComfyUI has no such limit.

    ComfyUI's limit is a share of the RAM that it has counted. If a control group allows less than that, the
    limit is the same share of what the group allows. PinBudget finds out by trying what the system really allows.
    """
    if getattr(mm, "MAX_PINNED_MEMORY", 0) <= 0 or not hasattr(mm, "get_total_memory"):
        return None  # If these names are gone nothing streams (contracts.py), but the pack still starts.
    limit, counted = float(mm.MAX_PINNED_MEMORY), hosts.counted_ram()
    if (group := group_memory()) is not None and group.total < counted:
        limit *= group.total / counted
    return int(limit)


def spare_ram() -> int:
    """Bytes of host memory that may still be allocated."""
    system = psutil.virtual_memory()
    spare = system.available - min(RESERVED_RAM, int(RESERVED_SHARE * system.total))
    if (group := group_memory()) is not None:
        spare = min(spare, group.available - min(RESERVED_RAM, int(RESERVED_SHARE * group.total)))
    return spare


# Page-locked memory of all streamed models together. The host counts its own towards the same limit.
pins = PinBudget(
    limit=_pin_limit(),
    others=lambda: int(mm.TOTAL_PINNED_MEMORY),
    spare=spare_ram,
    ask_others=lambda n: mm.free_pins(n),
    share=share_of_environment(),
)


# Copies that several GPUs of this process share, where no broker was named (docs/sharing.md).
local_share = LocalShare()


def has_dynamic_vram(device: torch.device) -> bool:
    """Whether the host loads models to this device with dynamic VRAM."""
    return comfy.memory_management.aimdo_enabled and not mm.is_device_cpu(device)


def evictable(device: torch.device) -> int:
    """Bytes of VRAM that models with dynamic VRAM hold and give up when somebody allocates."""
    if not comfy.memory_management.aimdo_enabled or device.type != "cuda":
        return 0
    return hosts.evictable(device)


def unload(patcher: ModelPatcher) -> None:
    """Have the host take a model off its device, whichever patcher has put it there.

    The host's own function for that looks at the current device alone.
    """
    everybody = mm.current_loaded_models
    others = [loaded for loaded in everybody if loaded.model is None or not patcher.is_clone(loaded.model)]
    if len(others) < len(everybody):
        mm.free_memory(1e30, patcher.load_device, keep_loaded=others)


def obtainable(backend: Backend) -> int:
    """Return the most bytes that a model can get: what is free, and what other models on the device would give up."""
    if backend.is_virtual:
        return backend.budget
    here = (loaded for loaded in mm.current_loaded_models if loaded.device == backend.device)
    held = sum(loaded.model_loaded_memory() for loaded in here if loaded.model is not None)
    return int(mm.get_free_memory(backend.device)) + held + evictable(backend.device)
