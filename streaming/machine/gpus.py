"""The GPUs of this machine: memory, link and peers.

[Note: no context]
Asking CUDA for the free memory of a GPU makes a context on it, which takes some hundred MB there. NVML tells the free
memory without a context, and the link too. It comes with the driver, and Python reaches it through nvidia-ml-py, which
need not be installed: without it CUDA is asked for the free memory after all, and the link stays unknown. NVML numbers
GPUs in its own way, so a GPU is found by its UUID.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..config import VIRTUAL_VARIABLE, format_bytes, parse_virtual_devices
from .device_names import gpu_name

UNKNOWN = "-"

# Bytes per second of one lane, by generation (PCI Express Base Specification: 2.5, 5, 8, 16, 32 and 64 GT/s, less the
# line code: 8b/10b, then 128b/130b, then 242B/256B).
LANE_BYTES_PER_SECOND = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}


class Link(NamedTuple):
    """A PCIe link: its generation and its number of lanes; None where it is not known."""

    generation: int | None = None
    width: int | None = None

    @property
    def bytes_per_second(self) -> float | None:
        """The most that it carries; None where that is not known."""
        lane = LANE_BYTES_PER_SECOND.get(self.generation or 0)
        return None if lane is None or self.width is None else lane * self.width

    def __str__(self) -> str:
        generation = UNKNOWN if self.generation is None else self.generation
        width = UNKNOWN if self.width is None else self.width
        return UNKNOWN if self == NO_LINK else f"gen {generation} x{width}"


NO_LINK = Link()


@dataclass(frozen=True)
class Gpu:
    """One GPU as torch numbers them. None stands for what is not known.

    Attributes:
        index: torch's number; nodes and settings use ``device`` instead.
        name: of the product.
        uuid: as nvidia-smi writes it.
        total, free: bytes of its memory.
        link: as it is now. An idle GPU runs its link slowly.
        most_link: the fastest that GPU and slot support.
        peers: indices of the GPUs whose memory it can reach without the host.
        virtual: whether it is a virtual device in RAM.
    """

    index: int
    name: str
    uuid: str | None = None
    total: int | None = None
    free: int | None = None
    link: Link = NO_LINK
    most_link: Link = NO_LINK
    peers: tuple[int, ...] = ()
    virtual: bool = False

    @property
    def device(self) -> str:
        return gpu_name(self.index)

    def as_dict(self) -> dict[str, Any]:
        """Plain values; sizes in bytes."""
        values = asdict(self)
        values |= {"link": self.link._asdict(), "most_link": self.most_link._asdict()}
        return {"device": self.device, **values, "peers": [gpu_name(peer) for peer in self.peers]}


class Figures(NamedTuple):
    """What NVML knows of a GPU."""

    total: int | None = None
    free: int | None = None
    link: Link = NO_LINK
    most_link: Link = NO_LINK


class Nvml:
    """NVIDIA's management library; where this machine has none, one that knows nothing.

    Args:
        library: the module pynvml, initialised; None where there is none.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def figures(self, uuid: str | None) -> Figures:
        """Return what is known of the GPU with this UUID."""
        handle = self._find(uuid)
        if handle is None:
            return Figures()
        return Figures(*self.memory(uuid), self._link("Curr", handle), self._link("Max", handle))

    def memory(self, uuid: str | None) -> tuple[int | None, int | None]:
        """Return the bytes of the GPU with this UUID in all, and the free ones; None where these are not known."""
        handle = self._find(uuid)
        memory = None if handle is None else self._ask("nvmlDeviceGetMemoryInfo", handle)
        return (None, None) if memory is None else (int(memory.total), int(memory.free))

    def links(self, uuid: str | None) -> tuple[Link, Link]:
        """Return the link of the GPU with this UUID as it is now, and the best that the card can do in any slot."""
        handle = self._find(uuid)
        if handle is None:
            return NO_LINK, NO_LINK
        now, most = self._link("Curr", handle), self._link("Max", handle)
        # An older library has no word for the card alone.
        known = hasattr(self._library, "nvmlDeviceGetGpuMaxPcieLinkGeneration")
        card = self._ask("nvmlDeviceGetGpuMaxPcieLinkGeneration", handle) if known else None
        return now, most if card is None else most._replace(generation=card)

    def driver(self) -> str | None:
        """Return the driver's version; None where it is not known."""
        found = None if self._library is None else self._ask("nvmlSystemGetDriverVersion")
        return found.decode() if isinstance(found, bytes) else found

    def gpus(self) -> list[Gpu]:
        """Return all GPUs that the driver knows, numbered in NVML's order."""
        count = None if self._library is None else self._ask("nvmlDeviceGetCount")
        handles = [self._ask("nvmlDeviceGetHandleByIndex", index) for index in range(count or 0)]
        found = []
        for index, handle in enumerate(handles):
            name, uuid = self._text("nvmlDeviceGetName", handle), self._text("nvmlDeviceGetUUID", handle)
            total, free, link, most_link = self.figures(uuid)
            found.append(Gpu(index, name or UNKNOWN, uuid, total, free, link, most_link))
        return found

    def _text(self, function: str, handle: Any) -> str | None:
        found = None if handle is None else self._ask(function, handle)
        return found.decode() if isinstance(found, bytes) else found

    def _find(self, uuid: str | None) -> Any:
        known = self._library is not None and uuid is not None
        return self._ask("nvmlDeviceGetHandleByUUID", uuid) if known else None

    def _link(self, which: str, handle: Any) -> Link:
        generation = self._ask(f"nvmlDeviceGet{which}PcieLinkGeneration", handle)
        return Link(generation, self._ask(f"nvmlDeviceGet{which}PcieLinkWidth", handle))

    def _ask(self, function: str, *arguments: Any) -> Any:
        """Return the answer; None if the GPU has none, as integrated GPUs and parts of a GPU have none about a link."""
        try:
            return getattr(self._library, function)(*arguments)
        except self._library.NVMLError:
            return None


@contextlib.contextmanager
def open_nvml() -> Iterator[Nvml]:
    """Open NVML for as long as this lasts; where it is not installed or finds no driver, one that knows nothing."""
    try:
        import pynvml
    except ImportError:
        yield Nvml(None)
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield Nvml(None)
        return
    try:
        yield Nvml(pynvml)
    finally:
        pynvml.nvmlShutdown()


def list_gpus() -> list[Gpu]:
    """Return the GPUs that torch can use, CUDA's or ROCm's; if there are none, the virtual ones that are asked for.

    Without torch it is the GPUs that NVML knows, in NVML's order.

    Raises:
        ConfigError: ``WEIGHTSTREAM_VIRTUAL`` is malformed.
    """
    if not has_torch():
        with open_nvml() as nvml:
            return nvml.gpus() or _virtual_gpus()
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        return _virtual_gpus()
    with open_nvml() as nvml:
        return [_describe(index, count, nvml) for index in range(count)]


def best_links(indices: Sequence[int]) -> list[Link]:
    """Return the fastest link that each of these GPUs and its slot support. No context is made on any."""
    import torch

    with open_nvml() as nvml:
        return [nvml.figures(gpu_uuid(torch.cuda.get_device_properties(index))).most_link for index in indices]


def has_torch() -> bool:
    """Whether torch is installed, without importing it."""
    return importlib.util.find_spec("torch") is not None


def has_nvml() -> bool:
    """Whether NVIDIA's management library can be asked, if there is a driver."""
    return importlib.util.find_spec("pynvml") is not None


def _describe(index: int, count: int, nvml: Nvml) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    uuid = gpu_uuid(properties)
    total, free, link, most_link = nvml.figures(uuid)
    if free is None:
        free, total = _ask_cuda(index), properties.total_memory
    others = (other for other in range(count) if other != index)
    peers = tuple(other for other in others if torch.cuda.can_device_access_peer(index, other))
    return Gpu(index, properties.name, uuid, total, free, link, most_link, peers)


def _ask_cuda(index: int) -> int | None:
    """Return the free bytes where only CUDA can tell (Note: no context); None if the GPU is too full for a context."""
    import torch

    from ..devices.backend import is_out_of_memory

    try:
        return torch.cuda.mem_get_info(index)[0]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def gpu_uuid(properties: Any) -> str | None:
    """Return the UUID in NVML's form. torch omits the kind of device in front of it, and knows none for some GPUs."""
    uuid = getattr(properties, "uuid", None)
    return None if uuid is None else f"GPU-{uuid}"


def _virtual_gpus() -> list[Gpu]:
    text = os.environ.get(VIRTUAL_VARIABLE, "")
    if not text:
        return []
    wanted = parse_virtual_devices(text)
    peers = range(wanted.count)
    return [
        Gpu(
            index,
            "virtual device in RAM",
            total=wanted.budget,
            free=wanted.budget,
            peers=tuple(peer for peer in peers if peer != index),
            virtual=True,
        )
        for index in range(wanted.count)
    ]


# -- for people --------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[Gpu], str]] = {
    "GPU": lambda gpu: gpu.device,
    "name": lambda gpu: gpu.name,
    "total": lambda gpu: _bytes(gpu.total),
    "free": lambda gpu: _bytes(gpu.free),
    "link": lambda gpu: str(gpu.link),
    "at most": lambda gpu: str(gpu.most_link),
    "peers": lambda gpu: ", ".join(map(gpu_name, gpu.peers)) or UNKNOWN,
    "UUID": lambda gpu: gpu.uuid or UNKNOWN,
}


def as_table(gpus: Sequence[Gpu]) -> str:
    """Return a table as text: one line for each GPU, under a line of titles."""
    rows = [list(COLUMNS), *([show(gpu) for show in COLUMNS.values()] for gpu in gpus)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _bytes(count: int | None) -> str:
    return UNKNOWN if count is None else format_bytes(count)
