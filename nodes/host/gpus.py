"""The GPUs that nodes may name, and what becomes of names of GPUs that are not there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_management as mm
import torch

from ...streaming import ConfigError, gpu_name, in_parts, parse_gpus, parse_shares
from ...streaming.machine.device_names import GPUS_VARIABLE
from .devices import read_environment, virtual_devices

# How much of a MODEL each of several GPUs gets: by memory and speed, as much as the others, or as the user says.
SPLITS = ("auto", "equal", "ratio")


def visible_gpus() -> dict[str, torch.device]:
    """The GPUs by name, in the host's order; virtual ones on a host that runs on the CPU; else none."""
    read_environment()
    home = mm.get_torch_device()
    if mm.is_device_cpu(home):
        found = [torch.device("cpu", index) for index in range(len(virtual_devices()))]
    else:
        found = mm.get_all_torch_devices() if mm.is_device_cuda(home) else []
    return {gpu_name(index): device for index, device in enumerate(found)}


def why_no_gpus() -> str:
    """Why :func:`visible_gpus` gives none."""
    home = mm.get_torch_device()
    if mm.is_device_cpu(home):
        return "there is no GPU"
    return f"it needs CUDA or ROCm, and ComfyUI runs on {home.type}"


@dataclass(frozen=True)
class Choice:
    """GPUs for a MODEL.

    Attributes:
        names: in the order of preference; empty where it stays where it is.
        shares: the part of the MODEL for each, where the user has said so.
        missing: what was named and is not there.
    """

    names: tuple[str, ...]
    shares: tuple[float, ...] | None = None
    missing: tuple[str, ...] = ()

    def among(self, present: Sequence[str]) -> Choice:
        """Those that are there, with the same shares of each other."""
        kept = [place for place, name in enumerate(self.names) if name in present]
        return Choice(
            tuple(self.names[place] for place in kept),
            in_parts([self.shares[place] for place in kept]) if self.shares is not None else None,
            tuple(name for name in self.names if name not in present),
        )


def wanted_gpus(devices: str) -> tuple[str, ...]:
    """The GPUs that the user names: on the node, else for the process; none where all are wanted.

    Raises:
        ConfigError: that is no list of GPUs.
    """
    return parse_gpus(devices) or parse_gpus(os.environ.get(GPUS_VARIABLE, ""), GPUS_VARIABLE)


def wanted_shares(split: str, ratio: str, names: Sequence[str]) -> tuple[float, ...] | None:
    """The share of each GPU, as parts of one; None where it is not for the user to say.

    Without ``names`` it is not known yet how many GPUs there are.

    Raises:
        ConfigError: there is no such split, there are not as many numbers as names, or they are no numbers.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    if split != "ratio":
        return None
    shares = parse_shares(ratio)
    if names and len(shares) != len(names):
        raise ConfigError(
            f"ratio={ratio!r} has {_count(len(shares), 'number')} for {_count(len(names), 'device')} "
            f"({', '.join(names)}): give one number for each device"
        )
    return shares


def choose(devices: str, split: str, ratio: str, present: Sequence[str]) -> Choice:
    """The GPUs for a MODEL, of which some may not be there.

    Numbers without names are for ``gpu:0`` and those that follow.

    Raises:
        ConfigError: what is wanted cannot be read, or there are not as many shares as GPUs.
    """
    names = wanted_gpus(devices)
    count = max(len(wanted_shares(split, ratio, names) or ()), len(present))
    names = names or tuple(map(gpu_name, range(count)))
    return Choice(names, wanted_shares(split, ratio, names)).among(present)


def not_there(missing: Sequence[str], present: Sequence[str]) -> str:
    """In words: which devices are missing, and which are there."""
    there = ", ".join(present) if present else "no GPU that can be used"
    return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there (this machine has {there})"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
