"""The route that says what a model will do before it runs: the same as ``python -m streaming plan``, for this server.

A file is asked for by the name that ComfyUI lists, never by a path. Only its header is read, and no GPU computes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management as mm
import folder_paths
import torch
from aiohttp import web

from ...streaming import Link, PackingMode, StreamingError, VramReader, group_memory, open_vram_reader
from ...streaming.estimating.cutting import cut
from ...streaming.estimating.estimate import (
    ASSUMED_LINK,
    ASSUMED_RESERVE,
    GIB,
    LINK_SHARE,
    Estimate,
    Machine,
    estimate,
    known_number,
)
from ...streaming.estimating.tensors import Tensor, missing_bytes, read_tensors
from ...streaming.machine.gpus import NO_LINK, best_links
from ..host.devices import pins, same_device, spare_ram
from ..host.gpus import visible_gpus, why_no_gpus
from ..model.measured import measured_bandwidth, measured_compute
from ..model.offload import PINNING, Mode, copy_streams, is_pinning
from ..model.patcher import StreamedModelPatcher
from ..model.streamed_model import streamed_models
from ..tell.names import without_folders
from .usage import DeviceUsage, sampler

if TYPE_CHECKING:
    from server import PromptServer

ESTIMATE_ROUTE = "/weightstream/v1/estimate"
# Where loaders look, in the order of Streamed Model Loader.
FOLDERS = ("diffusion_models", "checkpoints")
# How many times as large as fp8 the dtypes are that a weight_dtype such as fp8_e4m3fn makes fp8.
TIMES_FP8 = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
FP8 = "F8_E4M3"
MOST_GIB = 1e6
# How a rate is known that nothing is known of.
ASSUMED = "assumed"


class RefusedError(Exception):
    """There is no estimate; the text says why, and ``code`` is HTTP's."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Wanted:
    """A model as a loader of a workflow names it, with what Async Offload Settings behind it decide.

    Attributes:
        name: of the file, as ComfyUI lists it.
        folders: of ComfyUI's, in which it is looked for.
        in_fp8: whether the loader makes its weights fp8.
        limit: bytes of VRAM for weights; None where no node sets it.
        reserve: bytes of VRAM that stay free beside what a step needs.
        pinned_limit: bytes of the model that may be page-locked; None where nobody has set it.
        mode: how weights reach the GPU.
        packs: whether weights may stream packed.
    """

    name: str
    folders: tuple[str, ...] = FOLDERS
    in_fp8: bool = False
    limit: float | None = None
    reserve: float = 0.0
    pinned_limit: float | None = None
    mode: Mode = Mode.AUTO
    packs: bool = True

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Wanted:
        """What a request asks for.

        Raises:
            RefusedError: it cannot be read.
        """
        folder = query.get("folder")
        if folder not in (None, *FOLDERS):
            raise RefusedError(400, f"folder must be one of {', '.join(FOLDERS)}")
        return cls(
            query.get("name", ""),
            FOLDERS if folder is None else (folder,),
            in_fp8=query.get("weight_dtype", "").startswith("fp8"),
            limit=_bytes_of(query, "vram_limit_gb") or None,
            reserve=_bytes_of(query, "reserve_vram_gb"),
            pinned_limit=_pinned_limit(query),
            mode=Mode(_one_of(query, "mode", [mode.value for mode in Mode])),
            packs=_one_of(query, "packing", [mode.value for mode in PackingMode]) != PackingMode.OFF.value,
        )

    def path(self) -> str:
        """Where the file is.

        Raises:
            RefusedError: ComfyUI lists no such file.
        """
        for folder in self.folders:
            listed = self.name in folder_paths.get_filename_list(folder)
            if listed and (path := folder_paths.get_full_path(folder, self.name)):
                return path
        raise RefusedError(404, f"{self.name}: there is no such file in {' or '.join(self.folders)}")


def _bytes_of(query: Mapping[str, str], name: str) -> float:
    """An input in GiB.

    Raises:
        RefusedError: it is none.
    """
    try:
        gib = float(query.get(name, "0"))
    except ValueError:
        gib = -1.0
    if not 0 <= gib < MOST_GIB:
        raise RefusedError(400, f"{name} must be a number, 0 or more")
    return gib * GIB


def _one_of(query: Mapping[str, str], name: str, choices: Collection[str]) -> str:
    """An input of Async Offload Settings with a menu; "auto" where it is not given.

    Raises:
        RefusedError: it is none of these.
    """
    if (found := query.get(name, Mode.AUTO.value)) not in choices:
        raise RefusedError(400, f"{name} must be one of {', '.join(choices)}")
    return found


def _pinned_limit(query: Mapping[str, str]) -> float | None:
    """As ``pin_memory`` and ``pinned_limit_gb`` of Async Offload Settings say, or ComfyUI's command line."""
    if not is_pinning(PINNING[_one_of(query, "pin_memory", PINNING)]):
        return 0.0
    return _bytes_of(query, "pinned_limit_gb") or None


def describe_estimate(wanted: Wanted) -> dict[str, Any]:
    """What will stay and what will stream of a model on the GPU that ComfyUI loads it to: plain values, in bytes.

    Raises:
        RefusedError: there is no such file, no plan for it, or no GPU.
    """
    path = wanted.path()
    with open_vram_reader() as reader:
        usage, link = _gpu(reader)
    rate, source = rate_of(measured_bandwidth(usage.device), link)
    compute = known_number(measured_compute(wanted.name, usage.device))
    machine = _machine(usage, rate, compute, wanted)
    try:
        tensors, missing = read_tensors(Path(path)), missing_bytes(Path(path))
        found = estimate(cut(_in_fp8(tensors) if wanted.in_fp8 else tensors), machine)
    except StreamingError as error:
        text = without_folders(str(error))
        raise RefusedError(422, text if wanted.name in text else f"{wanted.name}: {text}") from error
    return {
        "name": wanted.name,
        "loaded": _is_loaded(wanted.name, path),
        "device": usage.device,
        "device_name": usage.name,
        "limit": wanted.limit,
        "link": str(link),
        "rate": rate,
        "rate_source": source,
        "file_bytes": sum(tensor.nbytes for tensor in tensors),
        "missing_bytes": missing,
        "ram_available": max(0, spare_ram()) + pins.locked,
        **as_values(found),
    }


def as_values(found: Estimate) -> dict[str, Any]:
    """What follows from a model and a machine alone."""
    plan, machine, outline = found.plan, found.machine, found.cut.outline
    return {
        "blocks": outline.blocks,
        "model_bytes": outline.model_bytes,
        "vram": round(machine.vram * GIB),
        "reserve": round(machine.reserve * GIB),
        "ram": round(machine.ram * GIB),
        "fits": plan is not None,
        "least_vram": round(found.least_vram * GIB),
        "least_limit": None if found.least_limit is None else round(found.least_limit * GIB),
        "stays": found.stays,
        "device_bytes": 0 if plan is None else plan.device_bytes,
        "streamed_bytes": found.streamed_bytes,
        "streamed_blocks": found.streamed_blocks,
        "pinned_limit": None if machine.pinned_limit is None else round(machine.pinned_limit * GIB),
        "pinnable": None if found.pinnable is None else round(found.pinnable),
        "from_file": round(found.from_file),
        "from_disk": found.from_disk,
        "bus_seconds": found.bus_seconds,
        "packed_bus_seconds": found.packed_bus_seconds,
        "compute_seconds": machine.compute_seconds,
        "step_seconds": found.step_seconds,
        "packed_step_seconds": found.packed_step_seconds,
        "overlaps": machine.overlaps,
    }


def rate_of(measured: float | None, link: Link) -> tuple[float, str]:
    """Bytes per second to the GPU, and how that is known: ``measured``, by its ``link``, or ``assumed``."""
    if (rate := known_number(measured)) is not None:
        return rate, "measured"
    if (most := known_number(link.bytes_per_second)) is not None:
        return LINK_SHARE * most, "link"
    return ASSUMED_LINK * 1e9, ASSUMED


def _gpu(reader: VramReader) -> tuple[DeviceUsage, Link]:
    """The GPU to which ComfyUI loads models, and the link that it will have: idle ones run theirs slowly.

    Raises:
        RefusedError: there is none.
    """
    gpus, home = visible_gpus(), mm.get_torch_device()
    if not gpus:
        raise RefusedError(409, why_no_gpus())
    name = next((name for name, device in gpus.items() if same_device(device, home)), next(iter(gpus)))
    usage = next(each for each in sampler.sample(reader).devices if each.device == name)
    index = gpus[name].index
    if usage.virtual or index is None:
        return usage, NO_LINK
    (best,), (now, _) = best_links([index]), reader.links(index)
    return usage, best if now.width is None else best._replace(width=now.width)


def _machine(usage: DeviceUsage, rate: float, compute: float | None, wanted: Wanted) -> Machine:
    group = group_memory()
    ram = mm.get_total_memory(torch.device("cpu"))
    ram = ram if group is None else min(ram, group.total)
    return Machine(
        vram=(usage.total or 0) / GIB,
        reserve=(0.0 if usage.virtual else ASSUMED_RESERVE) + wanted.reserve / GIB,
        ram=ram / GIB,
        link=rate / 1e9,
        compute_seconds=compute,
        system=os.name,
        limit=None if wanted.limit is None else wanted.limit / GIB,
        pinned_limit=None if wanted.pinned_limit is None else wanted.pinned_limit / GIB,
        keeps_nothing=wanted.mode is Mode.STREAM,
        # Only what is page-locked streams packed; 0 is that nothing may be.
        packs=wanted.packs and wanted.pinned_limit != 0,
        overlaps=copy_streams(wanted.mode) > 0,
    )


def _in_fp8(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors of a file as a loader has them that makes weights fp8."""
    return [
        tensor._replace(dtype=FP8, nbytes=tensor.nbytes // TIMES_FP8[tensor.dtype])
        if tensor.dtype in TIMES_FP8
        else tensor
        for tensor in tensors
    ]


def _is_loaded(name: str, path: str) -> bool:
    """Whether the model of this file is on a device, by us or by ComfyUI itself."""
    ours = (model for model in streamed_models() if model.title == name)
    if any(model.bar.progress() is not None or model.streamer.snapshot().mode != "off" for model in ours):
        return True
    theirs = (loaded.model for loaded in list(mm.current_loaded_models))
    # Patchers of other packs need not say how they were made.
    made = (getattr(each, "cached_patcher_init", None) for each in theirs if not isinstance(each, StreamedModelPatcher))
    return any(factory is not None and factory[1][:1] == (path,) for factory in made)


def add_estimate_route(server: PromptServer) -> None:
    """Register the route. Files are read, and plans made, in a thread."""

    @server.routes.get(ESTIMATE_ROUTE)
    async def get_estimate(request: web.Request) -> web.Response:
        try:
            return web.json_response(await asyncio.to_thread(describe_estimate, Wanted.of(request.query)))
        except RefusedError as error:
            return web.json_response({"error": str(error)}, status=error.code)
