"""Settings of one MODEL: what the user asks for, and the engine's settings from that and ComfyUI's command line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import comfy.model_management as mm
from comfy.cli_args import args

from ...streaming import Backend, PackingMode, StreamingConfig
from ..host.devices import verifying

GIB = 1024**3
# Inputs in GiB: what an arrow adds, and what a value is rounded to, which is as fine as a minimum that an error names.
STEP_GIB, ROUND_GIB = 0.05, 0.01


class Mode(str, Enum):
    """How a MODEL's weights reach the GPU."""

    AUTO = "auto"
    """Keep what fits, stream the rest."""
    STREAM = "stream"
    """Keep no block: the least VRAM."""
    SYNC = "sync"
    """Keep what fits, copy the rest when it is needed: the reference that all else must equal."""
    OFF = "off"
    """ComfyUI's own way."""


# What may be chosen about page-locking.
PINNING = {"auto": None, "on": True, "off": False}


@dataclass(frozen=True)
class OffloadSettings:
    """What a user may choose. None, or 0 as a number of streams or segments, means automatic.

    Attributes:
        mode: see :class:`Mode`.
        copy_streams: streams that copy in turn.
        prefetch_depth: segments that are copied ahead of the one that is computed.
        vram_limit: bytes of VRAM for weights and staging.
        pin_memory: whether to page-lock.
        pinned_limit: bytes of this model that may be page-locked.
        reserve_vram: bytes of VRAM that stay free beside what a step needs.
        packing: whether weights stream packed (docs/packing.md).
    """

    mode: Mode = Mode.AUTO
    copy_streams: int = 0
    prefetch_depth: int = 0
    vram_limit: int | None = None
    pin_memory: bool | None = None
    pinned_limit: int | None = None
    reserve_vram: int | None = None
    packing: PackingMode = PackingMode.AUTO

    def over(self, earlier: OffloadSettings) -> OffloadSettings:
        """These settings; if they set no limit of VRAM, with the limit of ``earlier``, those of a node before."""
        return replace(self, vram_limit=earlier.vram_limit if self.vram_limit is None else self.vram_limit)


def host_config(settings: OffloadSettings, backend: Backend) -> StreamingConfig:
    """The engine's settings for ``backend``: the user's, else those of the host's command line.

    The options are --async-offload, --disable-async-offload, --disable-pinned-memory, --reserve-vram and --novram.
    Whether copies are verified is set by the environment (``WEIGHTSTREAM_VERIFY``).
    """
    virtual = backend.is_virtual
    return StreamingConfig(
        copy_streams=copy_streams(settings.mode, settings.copy_streams),
        slots=settings.prefetch_depth + 1 if settings.prefetch_depth else 0,
        pin_memory=is_pinning(settings.pin_memory),
        pinned_limit=settings.pinned_limit,
        vram_limit=settings.vram_limit,
        stream_all=settings.mode is Mode.STREAM,
        headroom_bytes=_headroom(settings, virtual),
        adaptive=mm.vram_state != mm.VRAMState.NO_VRAM,
        packing=settings.packing,
        verify=verifying(),
    )


def is_pinning(wanted: bool | None) -> bool:
    """Whether memory is page-locked: as the user says, else as ComfyUI's command line does."""
    return not args.disable_pinned_memory if wanted is None else wanted


def _headroom(settings: OffloadSettings, virtual: bool) -> int:
    if settings.reserve_vram is not None:
        return settings.reserve_vram
    if virtual:
        return 0
    if args.reserve_vram is not None:
        return int(args.reserve_vram * GIB)
    return StreamingConfig.headroom_bytes


def copy_streams(mode: Mode, wanted: int = 0) -> int:
    """Streams that copy in turn: ``wanted`` if that is not 0, else as ComfyUI's command line says. 0 is synchronous."""
    if mode is Mode.SYNC:
        return 0
    if wanted:
        return wanted
    if mm.NUM_STREAMS > 0:
        return mm.NUM_STREAMS
    # On a CPU host NUM_STREAMS is 0 although no option asks for that.
    switched_off = args.disable_async_offload or args.async_offload == 0
    return 0 if switched_off else 2
