"""Describes the state of a streamed model, for people and for programs. Waits for nothing and changes nothing."""

from __future__ import annotations

from typing import NamedTuple

from .config import StreamingConfig, format_bytes
from .devices.backend import Backend
from .memory.supply import Supply
from .memory.weight_copies import WeightCopies
from .planning.plan import Plan
from .planning.profile import Profile
from .planning.state import Standing, State
from .run.telemetry import Activity, Snapshot


class Findings(NamedTuple):
    """What is not as one would expect, in words; empty where all is.

    Attributes:
        copies: why copies are synchronous, or when blocks begin.
        unpacked: why weights do not stream packed.
    """

    copies: str = ""
    unpacked: str = ""


def explain(now: Standing, copies: WeightCopies, supply: Supply, building: bool, findings: Findings) -> str:
    """The plan in effect, and where its streamed weights come from, in a line.

    ``building``: whether master copies are still to be built.
    """
    return "; ".join(filter(None, (_explain(now, copies, supply, building), *findings)))


def _explain(now: Standing, copies: WeightCopies, supply: Supply, building: bool) -> str:
    plan = now.plan
    if plan is None:
        return "not loaded"
    text = plan.explain()
    if now.state is State.REDUCED:
        given_up = plan.resident_bytes - copies.resident_bytes
        what = format_bytes(given_up) if given_up else "page-locked memory"
        return f"gave up {what} until it runs again; before that: {text}"
    return f"{text}; {_memory_text(plan, copies, supply, building)}" if plan.segments else text


def take_snapshot(
    now: Standing,
    copies: WeightCopies,
    supply: Supply,
    backend: Backend,
    config: StreamingConfig,
    profile: Profile,
    activity: Activity,
    building: bool,
    findings: Findings,
) -> Snapshot:
    """The whole state in one value. What is passed may go on changing meanwhile, on another thread."""
    plan, arena = now.plan, supply.arena
    pinned = copies.pinned_bytes(plan) if plan is not None else 0
    blocks = len(profile.block_seconds)
    forecast = plan.forecast if plan is not None else None
    return Snapshot(
        device=backend.name,
        mode=_mode(plan, config),
        explain=explain(now, copies, supply, building, findings),
        note="; ".join(filter(None, (arena.reason, findings.copies))),
        why_unpacked=findings.unpacked,
        blocks=blocks,
        resident_blocks=plan.resident_blocks if plan is not None else 0,
        streamed_blocks=blocks - plan.resident_blocks if plan is not None else 0,
        segments=len(plan.segments) if plan is not None else 0,
        resident_bytes=copies.resident_bytes,
        rest_bytes=plan.rest_bytes if plan is not None else 0,
        staging_bytes=plan.staging_bytes if plan is not None else 0,
        streamed_block_bytes=plan.streamed_bytes if plan is not None else 0,
        streamed_weight_bytes=plan.streamed_weight_bytes if plan is not None else 0,
        pinned_bytes=arena.pinned_bytes,
        pageable_bytes=arena.pageable_bytes,
        shared_bytes=arena.shared_bytes,
        staged_bytes=plan.streamed_bytes - pinned if plan is not None else 0,
        ring_bytes=supply.reader.ring_bytes,
        building=building,
        locking=supply.builder.active,
        device_bytes=backend.allocated,
        device_peak_bytes=backend.peak,
        device_budget_bytes=now.device_budget,
        limited_by=forecast.limited_by if forecast is not None else "",
        predicted_step_seconds=forecast.seconds if forecast is not None else None,
        more_bytes=forecast.more_bytes if forecast is not None else 0,
        more_seconds=forecast.more_seconds if forecast is not None else 0.0,
        compute_seconds=profile.compute_seconds if profile.measured else None,
        bandwidth_bytes_per_second=profile.bandwidth if profile.measured else None,
        step_seconds=activity.step_seconds,
        busy=activity.busy,
        idle_seconds=activity.idle_seconds,
        counters=activity.counters,
        run=activity.run,
        last_run=activity.last_run,
    )


def _memory_text(plan: Plan, copies: WeightCopies, supply: Supply, building: bool) -> str:
    """How much streams from page-locked memory, how much from elsewhere, and why."""
    pinned = copies.pinned_bytes(plan)
    text = f"{format_bytes(pinned)} from page-locked memory"
    if copies.backend.links > 1:
        text += f" over {copies.backend.links} links"
    if pinned == plan.streamed_bytes:
        return text
    staged = format_bytes(plan.streamed_bytes - pinned)
    if supply.arena.reason is not None:
        return f"{text}, {staged} staged from the file or pageable memory ({supply.arena.reason})"
    if building:
        return f"{text}, {staged} from the file until they are page-locked too"
    return f"{text}, {staged} staged from the file or pageable memory"


def _mode(plan: Plan | None, config: StreamingConfig) -> str:
    if plan is None:
        return "off"
    if not plan.segments:
        return "resident"
    return "synchronous" if config.synchronous else "streamed"
