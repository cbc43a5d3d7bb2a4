"""In which order units become resident, so that what is still streamed is spread evenly over the step. Pure.

[Note: one order for every budget]
The bus is never idle and never late if, at every moment of a step, the bytes needed so far are near their share: the
step's streamed bytes times the part of its compute time that has passed. The order starts with everything streamed and
takes, again and again, the unit without which that difference varies least over the step (its variance in time). A plan
keeps the first units of this order. So more memory only adds residents, less only evicts the last ones, and every plan
on the way is spread as evenly as the choices before it allow.

That takes the square of the number of units. Where there are more than any model has, each half of the step in turn
gives one instead, and so each quarter, and so on: nearly as even, and in no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .profile import Outline, Profile
from .timeline import timeline

# Chosen one by one up to so many units: a second or two. A large model has some thousands.
MOST_CHOSEN = 10_000


def order_of_residency(outline: Outline, profile: Profile) -> tuple[int, ...]:
    """Return the order in effect: the profile's own, or the best for its times."""
    return profile.order or best_order(outline, profile)


@lru_cache(maxsize=16)
def best_order(outline: Outline, profile: Profile) -> tuple[int, ...]:
    """Return all units, the first that becomes resident first (Note: one order for every budget)."""
    if not outline.unit_bytes:
        return ()
    moments = timeline(outline, profile)
    units = [moment.unit for moment in moments]
    if len(units) > MOST_CHOSEN:
        return _by_halves(units)
    starts = np.array([moment.begin for moment in moments])
    total = max(profile.compute_seconds, 1e-9)  # A step has a length, whatever was measured.
    sizes = np.array([outline.unit_bytes[unit] for unit in units], dtype=np.float64)
    share = starts / total
    # Time between a unit and the next one, as a weight: what happens between two needs lasts that long.
    weights = np.diff(np.append(share, 1.0 + share[0]))
    offset_all = share @ weights
    streamed = np.ones(len(units), dtype=bool)
    order: list[int] = []
    # Taking unit j away lowers the curve by b_j * (1[k >= j] - share_k), k being the moments of the other needs.
    step_mean = np.cumsum(weights[::-1])[::-1] - offset_all
    later_share = np.cumsum((share * weights)[::-1])[::-1]
    step_square = np.cumsum(weights[::-1])[::-1] - 2 * later_share + (share**2) @ weights
    step_variance = step_square - step_mean**2
    for _ in units:
        curve = np.cumsum(np.where(streamed, sizes, 0.0))
        curve = curve - curve[-1] * share
        mean = curve @ weights
        together = np.cumsum((curve * weights)[::-1])[::-1] - (curve * share) @ weights
        gain = 2 * sizes * (together - mean * step_mean) - sizes**2 * step_variance
        chosen = int(np.argmax(np.where(streamed, gain, -np.inf)))
        streamed[chosen] = False
        order.append(units[chosen])
    return tuple(order)


def _by_halves(units: Sequence[int]) -> tuple[int, ...]:
    """Return units that are in the order of need so that the first of them, however many, lie evenly over the step."""
    digits = (len(units) - 1).bit_length()
    return tuple(units[place] for place in sorted(range(len(units)), key=lambda place: f"{place:0{digits}b}"[::-1]))
