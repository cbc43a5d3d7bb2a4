"""The engine: streams the blocks of any ``nn.Module`` from page-locked RAM to a device. It knows nothing of ComfyUI."""

from .arena import PinBudget
from .backend import Backend, DeviceMemory
from .blocks import Block, BlockSet, Unit, find_blocks, held_tensors, split_model, uncompiled
from .checkpoint import Checkpoint
from .checkpoint_file import CheckpointFile, FileSlice
from .config import (
    StreamingConfig,
    VirtualDevices,
    format_bytes,
    parse_switch,
    parse_virtual_devices,
)
from .cpu_backend import CpuBackend, VirtualMemory
from .cuda_backend import CudaBackend
from .device_names import gpu_name, in_parts, parse_device, parse_gpus, parse_shares
from .errors import (
    BudgetError,
    CheckpointChangedError,
    CheckpointError,
    ConfigError,
    CorruptionError,
    DeviceMemoryError,
    GradientError,
    ServerError,
    StepNotRepeatedError,
    StreamingError,
    UnsupportedModelError,
    WeightsMovedError,
)
from .feeder import Feeder
from .feeding import feeding_is_faster, find_feeders
from .forms import take_apart
from .gpus import Gpu, list_gpus
from .group import Group
from .header import Entry
from .host_memory import HostMemory, group_memory
from .kernels import warm_up
from .masters import NoPatches, Patches
from .plan import Forecast, Plan, make_plan, minimum_bytes
from .profile import Outline, Profile, assumed_profile
from .residency import Residency
from .schedule import Schedule
from .segments import Segment
from .shown import is_shown
from .state import State
from .streamer import Streamer
from .supply import Progress
from .telemetry import Counters, Run, Snapshot
from .vram import Vram, VramReader, open_vram_reader

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
    "NoPatches",
    "Outline",
    "Patches",
    "PinBudget",
    "Plan",
    "Profile",
    "Progress",
    "Residency",
    "Run",
    "Schedule",
    "Segment",
    "ServerError",
    "Snapshot",
    "State",
    "StepNotRepeatedError",
    "Streamer",
    "StreamingConfig",
    "StreamingError",
    "Unit",
    "UnsupportedModelError",
    "VirtualDevices",
    "VirtualMemory",
    "Vram",
    "VramReader",
    "WeightsMovedError",
    "assumed_profile",
    "feeding_is_faster",
    "find_blocks",
    "find_feeders",
    "format_bytes",
    "gpu_name",
    "group_memory",
    "held_tensors",
    "in_parts",
    "is_shown",
    "list_gpus",
    "make_plan",
    "minimum_bytes",
    "open_vram_reader",
    "parse_device",
    "parse_gpus",
    "parse_shares",
    "parse_switch",
    "parse_virtual_devices",
    "split_model",
    "take_apart",
    "uncompiled",
    "warm_up",
]
