"""When each segment is needed in a step in which nothing waits, and until when. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .pipeline import Stage
from .profile import Profile
from .segments import Segment
from .timeline import Moment


class Need(NamedTuple):
    """When a step needs a segment, in seconds of compute from the step's begin, and the link that brings it."""

    segment: Segment
    begin: float
    end: float
    link: int = 0


def segment_needs(
    segments: Sequence[Segment], profile: Profile, moments: Iterable[Moment], link: int = 0
) -> list[Need]:
    """Return when the step needs each of ``segments``, in order; ``moments`` say when it needs each unit."""
    segment_of = {unit: segment for segment in segments for unit in segment.units}
    found: list[Need] = []
    for moment in moments:
        segment = segment_of.get(moment.unit)
        if segment is None:
            continue
        if found and found[-1].segment is segment:
            if segment.runs:
                found[-1] = found[-1]._replace(end=moment.end)
        elif segment.runs:
            found.append(Need(segment, moment.begin, moment.end, link))
        else:
            end = moment.block_begin + profile.block_seconds[segment.block]
            found.append(Need(segment, moment.block_begin, end, link))
    return found


def stages_of(needs: Sequence[Need], bandwidths: Sequence[float], total: float) -> tuple[list[Stage], float]:
    """Return needs as stages of a step of ``total`` seconds without waits, and the seconds before the first of them.

    A packed segment is unpacked whenever it is needed, before anything else is computed.
    """
    ends = (*(need.begin for need in needs[1:]), total)
    stages = [
        Stage(
            need.segment.nbytes / bandwidths[need.link],
            need.end - need.begin + need.segment.unpack_seconds,
            end - need.begin + need.segment.unpack_seconds,
            need.link,
        )
        for need, end in zip(needs, ends, strict=True)
    ]
    return stages, needs[0].begin


def waits_of(needs: Sequence[Need], waits: Sequence[Mapping[Segment, Segment]]) -> list[int]:
    """Return, for each need, the index of the need whose memory it reuses; ``waits``: segments likewise, by link."""
    place_of = {(need.link, need.segment): place for place, need in enumerate(needs)}
    return [place_of[need.link, waits[need.link][need.segment]] for need in needs]
