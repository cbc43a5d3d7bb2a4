"""How long a step takes whose blocks run on several devices in turn, each of which streams over its own link. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..planning.needs import Need, segment_needs, stages_of, waits_of
from ..planning.pipeline import step_seconds
from ..planning.plan import Plan
from ..planning.profile import Profile
from ..planning.timeline import block_moments
from .assignment import HOP_SECONDS, Assignment


class Share(NamedTuple):
    """What one device does in a step: the plan of its blocks, and what is known of them."""

    plan: Plan
    profile: Profile


class _Step(NamedTuple):
    """A step in which nothing waits: what each device needs when, and how long it takes."""

    needs: list[Need]
    seconds: float


def forecast_of_all(shares: Sequence[Share], assignment: Assignment) -> float:
    """Return the seconds that a step will take under the plans of all devices together.

    Args:
        shares: of the devices, the home first.
        assignment: the device of each block, in the order in which blocks run; each device numbers its own blocks.
    """
    step = _without_waits(shares, assignment)
    if not step.needs:
        return step.seconds
    stages, lead = stages_of(step.needs, [share.profile.bandwidth for share in shares], step.seconds)
    return max(step.seconds, step_seconds(stages, waits_of(step.needs, [share.plan.waits for share in shares]), lead))


def _without_waits(shares: Sequence[Share], assignment: Assignment) -> _Step:
    now, here, needs = _outside_of_blocks(shares, assignment), 0, []
    done = [0] * len(shares)
    for device in assignment.devices:
        plan, profile = shares[device]
        now += HOP_SECONDS * (device != here)
        moments, now = block_moments(plan.outline, profile, done[device], now)
        streamed = [segment for segment in plan.segments if segment.block == done[device]]
        needs += segment_needs(streamed, profile, moments, device)
        done[device] += 1
        here = device
    return _Step(needs, now + HOP_SECONDS * (here != 0))


def _outside_of_blocks(shares: Sequence[Share], assignment: Assignment) -> float:
    """Return the home's compute outside of blocks, which is its step without the blocks and hops of all devices."""
    blocks = sum(sum(share.profile.block_seconds) for share in shares)
    return max(0.0, shares[0].profile.compute_seconds - blocks - HOP_SECONDS * assignment.hops)
