"""The engine: streams the blocks of any ``nn.Module`` from page-locked RAM to a device. It knows nothing of ComfyUI."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import (
        PackingMode,
        StreamingConfig,
        VirtualDevices,
        count_of,
        format_bytes,
        format_rate,
        listed,
        parse_switch,
        parse_virtual_devices,
    )
    from .devices.backend import Backend
    from .devices.cpu_backend import CpuBackend, VirtualMemory
    from .devices.cuda_backend import CudaBackend
    from .devices.kernels import warm_up
    from .errors import (
        BudgetError,
        CheckpointChangedError,
        CheckpointError,
        ConfigError,
        CorruptionError,
        DeviceMemoryError,
        GradientError,
        ServerError,
        SharingError,
        StepNotRepeatedError,
        StreamingError,
        UnsupportedModelError,
        WeightsMovedError,
        WorkflowError,
    )
    from .files.checkpoint import Checkpoint
    from .files.checkpoint_file import CheckpointFile, FileSlice
    from .files.header import Entry
    from .group import Group
    from .line import Line
    from .machine.device_names import gpu_name, in_parts, parse_device, parse_gpus, parse_shares
    from .machine.gpus import Gpu, Link, list_gpus
    from .machine.host_memory import HostMemory, group_memory
    from .machine.vram import Vram, VramReader, open_vram_reader
    from .memory.host_memory import PinBudget
    from .memory.supply import Progress
    from .memory.weights import NoPatches, Patches
    from .model.blocks import Block, BlockSet, Unit, cut_model, find_blocks, held_tensors, uncompiled
    from .model.forms import take_apart
    from .model.shown import is_shown
    from .planning.plan import Forecast, Plan
    from .planning.profile import Outline, Profile, assumed_profile
    from .planning.search import make_plan, minimum_bytes
    from .planning.segments import Segment
    from .planning.state import State
    from .planning.vram_budget import DeviceMemory, VramBudget
    from .run.schedule import Schedule
    from .run.step_log import RunLog, StepRow
    from .run.telemetry import Counters, Run, Snapshot
    from .run.trace import NamedTrace, StepTrace, chrome_trace
    from .sharing.local import LocalShare
    from .sharing.share import share_of_environment
    from .split.feeder import Feeder
    from .split.feeding import feeding_is_faster, find_feeders
    from .streamer import Streamer

__all__ = [
    "Backend",
    "Block",
    "BlockSet",
    "BudgetError",
    "Checkpoint",
    "CheckpointChangedError",
    "CheckpointError",
    "CheckpointFile",
    "ConfigError",
    "CorruptionError",
    "Counters",
    "CpuBackend",
    "CudaBackend",
    "DeviceMemory",
    "DeviceMemoryError",
    "Entry",
    "Feeder",
    "FileSlice",
    "Forecast",
    "Gpu",
    "GradientError",
    "Group",
    "HostMemory",
    "Line",
    "Link",
    "LocalShare",
    "NamedTrace",
    "NoPatches",
    "Outline",
    "PackingMode",
    "Patches",
    "PinBudget",
    "Plan",
    "Profile",
    "Progress",
    "Run",
    "RunLog",
    "Schedule",
    "Segment",
    "ServerError",
    "SharingError",
    "Snapshot",
    "State",
    "StepNotRepeatedError",
    "StepRow",
    "StepTrace",
    "Streamer",
    "StreamingConfig",
    "StreamingError",
    "Unit",
    "UnsupportedModelError",
    "VirtualDevices",
    "VirtualMemory",
    "Vram",
    "VramBudget",
    "VramReader",
    "WeightsMovedError",
    "WorkflowError",
    "assumed_profile",
    "chrome_trace",
    "count_of",
    "cut_model",
    "feeding_is_faster",
    "find_blocks",
    "find_feeders",
    "format_bytes",
    "format_rate",
    "gpu_name",
    "group_memory",
    "held_tensors",
    "in_parts",
    "is_shown",
    "list_gpus",
    "listed",
    "make_plan",
    "minimum_bytes",
    "open_vram_reader",
    "parse_device",
    "parse_gpus",
    "parse_shares",
    "parse_switch",
    "parse_virtual_devices",
    "share_of_environment",
    "take_apart",
    "uncompiled",
    "warm_up",
]

# Where each name is defined. It is imported when it is first asked for: torch takes seconds, and the command line can
# mostly do without.
_HOMES = {
    "Backend": "devices.backend",
    "Block": "model.blocks",
    "BlockSet": "model.blocks",
    "BudgetError": "errors",
    "Checkpoint": "files.checkpoint",
    "CheckpointChangedError": "errors",
    "CheckpointError": "errors",
    "CheckpointFile": "files.checkpoint_file",
    "ConfigError": "errors",
    "CorruptionError": "errors",
    "Counters": "run.telemetry",
    "CpuBackend": "devices.cpu_backend",
    "CudaBackend": "devices.cuda_backend",
    "DeviceMemory": "planning.vram_budget",
    "DeviceMemoryError": "errors",
    "Entry": "files.header",
    "Feeder": "split.feeder",
    "FileSlice": "files.checkpoint_file",
    "Forecast": "planning.plan",
    "Gpu": "machine.gpus",
    "GradientError": "errors",
    "Group": "group",
    "HostMemory": "machine.host_memory",
    "Line": "line",
    "Link": "machine.gpus",
    "LocalShare": "sharing.local",
    "NamedTrace": "run.trace",
    "NoPatches": "memory.weights",
    "Outline": "planning.profile",
    "PackingMode": "config",
    "Patches": "memory.weights",
    "PinBudget": "memory.host_memory",
    "Plan": "planning.plan",
    "Profile": "planning.profile",
    "Progress": "memory.supply",
    "Run": "run.telemetry",
    "RunLog": "run.step_log",
    "Schedule": "run.schedule",
    "Segment": "planning.segments",
    "ServerError": "errors",
    "SharingError": "errors",
    "Snapshot": "run.telemetry",
    "State": "planning.state",
    "StepNotRepeatedError": "errors",
    "StepRow": "run.step_log",
    "StepTrace": "run.trace",
    "Streamer": "streamer",
    "StreamingConfig": "config",
    "StreamingError": "errors",
    "Unit": "model.blocks",
    "UnsupportedModelError": "errors",
    "VirtualDevices": "config",
    "VirtualMemory": "devices.cpu_backend",
    "Vram": "machine.vram",
    "VramBudget": "planning.vram_budget",
    "VramReader": "machine.vram",
    "WeightsMovedError": "errors",
    "WorkflowError": "errors",
    "assumed_profile": "planning.profile",
    "chrome_trace": "run.trace",
    "count_of": "config",
    "listed": "config",
    "cut_model": "model.blocks",
    "feeding_is_faster": "split.feeding",
    "find_blocks": "model.blocks",
    "find_feeders": "split.feeding",
    "format_bytes": "config",
    "format_rate": "config",
    "gpu_name": "machine.device_names",
    "group_memory": "machine.host_memory",
    "held_tensors": "model.blocks",
    "in_parts": "machine.device_names",
    "is_shown": "model.shown",
    "list_gpus": "machine.gpus",
    "make_plan": "planning.search",
    "minimum_bytes": "planning.search",
    "open_vram_reader": "machine.vram",
    "parse_device": "machine.device_names",
    "parse_gpus": "machine.device_names",
    "parse_shares": "machine.device_names",
    "parse_switch": "config",
    "parse_virtual_devices": "config",
    "share_of_environment": "sharing.share",
    "take_apart": "model.forms",
    "uncompiled": "model.blocks",
    "warm_up": "devices.kernels",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    return value
