"""The engine: streams the blocks of any ``nn.Module`` from page-locked RAM to a device. It knows nothing of ComfyUI."""

from .config import (
    PackingMode,
    StreamingConfig,
    VirtualDevices,
    format_bytes,
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
    StepNotRepeatedError,
    StreamingError,
    UnsupportedModelError,
    WeightsMovedError,
)
from .files.checkpoint import Checkpoint
from .files.checkpoint_file import CheckpointFile, FileSlice
from .files.header import Entry
from .group import Group
from .machine.device_names import gpu_name, in_parts, parse_device, parse_gpus, parse_shares
from .machine.gpus import Gpu, Link, list_gpus
from .machine.host_memory import HostMemory, group_memory
from .machine.vram import Vram, VramReader, open_vram_reader
from .memory.arena import PinBudget
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
    "Link",
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
    "assumed_profile",
    "chrome_trace",
    "cut_model",
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
    "take_apart",
    "uncompiled",
    "warm_up",
]
