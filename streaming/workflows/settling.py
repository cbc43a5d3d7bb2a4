"""Puts Async Offload Settings behind a MODEL that does not stream, and behind text encoders that shall."""

from __future__ import annotations

from .companions import take_companion
from .following import settled, takers_of
from .graph import Graph
from .kinds import CLIP, MODEL, SETTINGS
from .loaders import Found, Tell
from .putting import put_behind


def put_settings(graph: Graph, models: list[Found], others: list[Found], tell: Tell) -> None:
    """Put settings where a MODEL, or a text encoder, needs them; those that are there already count."""
    waiting = [found for found in others if _clip_streams(graph, found)]
    for found in models:
        stay = settled(graph, found.gives[MODEL], SETTINGS)
        unsettled = not takers_of(graph, found.gives[MODEL]) <= stay
        needed = unsettled and not found.streams
        for about in [about for code, about in found.wish.notes if code == "limit" and not found.streams]:
            tell("limit" if needed else "limit-left", found.node, **about)
        goes_along = unsettled and (needed or found.is_new)
        clip = found if _clip_streams(graph, found) else None
        if clip is None and goes_along:
            clip = take_companion(graph, found, CLIP, waiting, models)
        if needed or clip is not None:
            limit = found.wish.limit_gib if needed else 0.0
            values = {"vram_limit_gb": limit} if limit else {}
            put_behind(graph, SETTINGS, values, {"model": found if goes_along else None, "clip": clip}, stay)
        if needed:
            tell("settings", found.node)
        if clip is not None:
            tell("settings-clip", clip.node)
    for found in waiting:
        put_behind(graph, SETTINGS, {}, {"clip": found})
        tell("settings-clip", found.node)


def _clip_streams(graph: Graph, found: Found) -> bool:
    return found.wish.clip_streams and found.leads_on(graph, CLIP)
