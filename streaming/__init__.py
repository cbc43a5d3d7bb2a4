"""The engine: streams the blocks of any ``nn.Module`` from page-locked RAM to a device. It knows nothing of ComfyUI."""

from .arena import PinBudget
from .backend import Backend, CpuBackend, CudaBackend, VirtualMemory
from .blocks import Block, BlockSet, find_blocks, split_model
from .config import StreamingConfig, VirtualDevices, format_bytes, parse_virtual_devices
from .errors import (
    BudgetError,
    ConfigError,
    DeviceMemoryError,
    RingExhaustedError,
    StreamingError,
    UnsupportedModelError,
)
from .masters import NoPatches, Patches
from .plan import Plan, make_plan, minimum_bytes
from .schedule import Schedule
from .streamer import State, Streamer
from .telemetry import Counters, Snapshot

__all__ = [
    "Backend",
    "Block",
    "BlockSet",
    "BudgetError",
    "ConfigError",
    "Counters",
    "CpuBackend",
    "CudaBackend",
    "DeviceMemoryError",
    "NoPatches",
    "Patches",
    "PinBudget",
    "Plan",
    "RingExhaustedError",
    "Schedule",
    "Snapshot",
    "State",
    "Streamer",
    "StreamingConfig",
    "StreamingError",
    "UnsupportedModelError",
    "VirtualDevices",
    "VirtualMemory",
    "find_blocks",
    "format_bytes",
    "make_plan",
    "minimum_bytes",
    "parse_virtual_devices",
    "split_model",
]
