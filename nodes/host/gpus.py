"""The GPUs that nodes may name, and what happens to names of GPUs that this machine lacks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_management as mm
import torch

from ...streaming import ConfigError, count_of, gpu_name, in_parts, parse_gpus, parse_shares
from ...streaming.machine.device_names import GPUS_VARIABLE
from .devices import read_environment, virtual_devices

# Each GPU has the whole MODEL, and works on a step at the same time as the others.
PARALLEL = "parallel"
# How a MODEL is divided among several GPUs: by memory and speed, in equal parts, by the user's ratio; or not at all.
SPLITS = ("auto", "equal", "ratio", PARALLEL)
# Whether what GPUs compute at the same time must be the same to the bit as on one.
EXACT = "exact"
BITS = (EXACT, "close")


def visible_gpus() -> dict[str, torch.device]:
    """Return the GPUs by name, in the host's order: virtual ones if the host runs on the CPU; none without CUDA."""
    read_environment()
    home = mm.get_torch_device()
    if mm.is_device_cpu(home):
        found = [torch.device("cpu", index) for index in range(len(virtual_devices()))]
    else:
        found = mm.get_all_torch_devices() if mm.is_device_cuda(home) else []
    return {gpu_name(index): device for index, device in enumerate(found)}


def why_no_gpus() -> str:
    """Why :func:`visible_gpus` returns none."""
    home = mm.get_torch_device()
    if mm.is_device_cpu(home):
        return "there is no GPU"
    return f"it needs CUDA or ROCm, and ComfyUI runs on {home.type}"


@dataclass(frozen=True)
class Choice:
    """GPUs for a MODEL.

    Attributes:
        names: the GPUs in the order of preference; empty if the MODEL stays where it is.
        shares: the part of the MODEL for each, as parts of one; None if the user has not set any.
        missing: GPUs that were named and that this machine lacks.
    """

    names: tuple[str, ...]
    shares: tuple[float, ...] | None = None
    missing: tuple[str, ...] = ()

    def among(self, present: Sequence[str]) -> Choice:
        """Keep the GPUs that are in ``present``; their shares keep their ratios to each other."""
        kept = [place for place, name in enumerate(self.names) if name in present]
        return Choice(
            tuple(self.names[place] for place in kept),
            in_parts([self.shares[place] for place in kept]) if self.shares is not None else None,
            tuple(name for name in self.names if name not in present),
        )


def wanted_gpus(devices: str) -> tuple[str, ...]:
    """Return the GPUs that the user names on the node, else those of the environment variable; empty means all.

    Raises:
        ConfigError: the text is no list of GPUs; the message says which GPUs there are.
    """
    try:
        return parse_gpus(devices) or parse_gpus(os.environ.get(GPUS_VARIABLE, ""), GPUS_VARIABLE)
    except ConfigError as error:
        raise ConfigError(f"{error} ({what_is_there(list(visible_gpus()))})") from None


def wanted_shares(split: str, ratio: str, names: Sequence[str]) -> tuple[float, ...] | None:
    """Return the share of each GPU, as parts of one; None unless ``split`` is ``ratio``, or ``parallel`` with a ratio.

    Without ``names`` the number of GPUs is not known yet, so the number of shares is not checked.

    Raises:
        ConfigError: there is no such split, there are not as many numbers as names, or they are no numbers.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    if split != "ratio" and not (split == PARALLEL and ratio.strip()):
        return None
    shares = parse_shares(ratio)
    if names and len(shares) != len(names):
        raise ConfigError(
            f"ratio={ratio!r} has {count_of(len(shares), 'number')} for {count_of(len(names), 'device')} "
            f"({', '.join(names)}): give one number for each device"
        )
    return shares


def choose(devices: str, split: str, ratio: str, present: Sequence[str]) -> Choice:
    """Choose the GPUs for a MODEL, of which some may be missing.

    Shares without names are for ``gpu:0`` and the GPUs that follow.

    Raises:
        ConfigError: what is wanted cannot be read, or there are not as many shares as GPUs.
    """
    names = wanted_gpus(devices)
    count = max(len(wanted_shares(split, ratio, names) or ()), len(present))
    names = names or tuple(map(gpu_name, range(count)))
    return Choice(names, wanted_shares(split, ratio, names)).among(present)


def not_there(missing: Sequence[str], present: Sequence[str]) -> str:
    """In words: which devices are missing, and which are there."""
    verb = "is not there" if len(missing) == 1 else "are not there"
    return f"{', '.join(missing)} {verb} ({what_is_there(present)})"


def what_is_there(present: Sequence[str]) -> str:
    return f"this machine has {', '.join(present) if present else 'no GPU that can be used'}"
