"""Why weights stream as they are, in words, where the settings would have them packed (docs/packing.md).

Where ``packing`` is ``on`` each reason is said. Where the choice is ours only a GPU without a kernel that unpacks is,
and only if packing could help.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from .config import PackingMode, StreamingConfig
from .planning.plan import Plan
from .planning.planner import Planner

NOT_PACKED = "weights do not stream packed"


class Decoder(NamedTuple):
    """Who unpacks on the device, as far as that was tried.

    Attributes:
        bytes_per_second: of weights; None before it was measured.
        slow: why it is not our kernel; empty where it is, and on virtual devices.
        failure: what went wrong when it was tried; empty where nothing did.
    """

    bytes_per_second: float | None = None
    slow: str = ""
    failure: str = ""


def find_obstacle(config: StreamingConfig, decoder: Decoder) -> str:
    """Return what keeps all weights of a model from being packed on its device; nothing where they may be.

    Args:
        config: settings.
        decoder: of the device.
    """
    obstacles = (
        (config.synchronous, "copies are synchronous"),
        (not config.pin_memory, "they are not page-locked"),
        (bool(decoder.failure), f"they cannot be packed ({decoder.failure})"),
    )
    return next((text for holds, text in obstacles if holds), "")


def explain_unpacked(plan: Plan, planner: Planner, mode: PackingMode, obstacle: str, slow: str) -> str:
    """Return why what ``plan`` streams is not packed, or is unpacked slowly; nothing where all is as it was asked for.

    Args:
        plan: in effect.
        planner: has made it.
        mode: what was asked for.
        obstacle: what keeps all weights from being packed (:func:`find_obstacle`).
        slow: why a kernel of ours does not unpack (:class:`Decoder`).
    """
    if not plan.segments:
        return ""
    if mode is PackingMode.ON:
        return _explain_where_asked(plan, planner, obstacle, slow)
    waits_for_the_bus = plan.forecast is not None and plan.forecast.limited_by == "bus"
    if mode is PackingMode.AUTO and slow and waits_for_the_bus and not plan.packed:
        return f"{NOT_PACKED}: {_no_kernel(slow)}"
    return ""


def _explain_where_asked(plan: Plan, planner: Planner, obstacle: str, slow: str) -> str:
    if not obstacle and planner.writes_expected:
        obstacle = "hooks change them in this prompt"
    if obstacle and not plan.packed:  # Those that are packed stay so when copies become synchronous (verify.py).
        return f"{NOT_PACKED}: {obstacle}"
    packing = planner.packing  # Read once: another thread may take it away.
    if packing is None:  # Times are not known yet.
        return ""
    able = {unit for unit in plan.streamed if packing.slot_bytes[unit] < plan.outline.unit_bytes[unit]}
    if not able:
        return f"{NOT_PACKED}: none that streams is held in bfloat16 or float16, is large and gets smaller"
    if planner.cramped and not plan.packed:
        return f"{NOT_PACKED}: there is no room in VRAM to unpack them in"
    left, refusals = able - plan.packed, planner.refusals
    texts = (
        _count(left & refusals.too_large, able, "they take more room than was planned"),
        _count(left & refusals.without_room, able, "no page-locked memory is left for them"),
        _count(left & refusals.written, able, "other code writes to them"),
        _count(left & refusals.left, able, "another process packs them for both"),
        f"weights are unpacked slowly: {_no_kernel(slow)}" if slow and plan.packed else "",
    )
    return "; ".join(filter(None, texts))


def _count(units: Collection[int], able: Collection[int], reason: str) -> str:
    return f"{len(units)} of {len(able)} layers do not stream packed: {reason}" if units else ""


def _no_kernel(slow: str) -> str:
    return f"there is no kernel here that unpacks them ({slow})"
