"""Puts GPU Placement where devices were asked for; one that is there already is used as far as it has room."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .allocations import DEFAULT
from .companions import take_companion
from .following import first_behind, reached, settled, takers_of
from .graph import Graph, Node
from .kinds import CLIP, MODEL, PLACEMENT, VAE
from .loaders import Found, Tell
from .multigpu import FIRST, Wish, share_text
from .putting import lead_through, put_behind

Values = dict[str, str]


def put_placements(graph: Graph, models: list[Found], others: list[Found], tell: Tell) -> None:
    """Place each MODEL that asks for GPUs; text encoder and VAE go along with a MODEL."""
    # A MODEL that leads nowhere takes nothing along: it would be loaded for that alone.
    unused = [found for found in models if not found.leads_on(graph, MODEL)]
    clips = [found for found in (*others, *unused) if _clip_placed(graph, found)]
    vaes = [found for found in (*others, *unused) if _vae_placed(graph, found)]
    left_out = set(map(id, unused))
    for found in [found for found in models if id(found) not in left_out]:
        clip = found if _clip_placed(graph, found) else take_companion(graph, found, CLIP, clips, models)
        vae = found if _vae_placed(graph, found) else take_companion(graph, found, VAE, vaes, models)
        wanted = found.wish.devices is not None
        if not wanted and clip is None and vae is None:
            continue
        stay = settled(graph, found.gives[MODEL], PLACEMENT)
        if takers_of(graph, found.gives[MODEL]) <= stay:
            _use_placement(graph, found, clip, vae, wanted, tell)
        else:
            values = _of_model(found.wish) | _of_clip(clip) | _of_vae(vae)
            put_behind(graph, PLACEMENT, values, {"model": found, "clip": clip, "vae": vae}, stay)
            tell("placement", found.node, inputs=_text(values))
    for found in clips:
        tell("alone", found.node, name="clip_device", value=found.wish.clip_device, instead="Select CLIP Device")
    for found in vaes:
        tell("alone", found.node, name="vae_device", value=found.wish.vae_device, instead="Select VAE Device")


def _use_placement(graph: Graph, found: Found, clip: Found | None, vae: Found | None, wanted: bool, tell: Tell) -> None:
    """Use the placement that a MODEL comes to on all of its ways. What it says already stays, and is told."""
    there = first_behind(graph, found.gives[MODEL], PLACEMENT)
    place = there[0].node if len(there) == 1 and there[0].graph is graph else None
    number = ", ".join(sorted({str(taker.node.id) for taker in there}, key=lambda text: (len(text), text)))
    if wanted:
        values = _of_model(found.wish)
        if place is None or not _says(graph, place, values):
            tell("placement-stays", found.node, number=number, inputs=_text(values))
    for name, companion, values in (("clip", clip, _of_clip(clip)), ("vae", vae, _of_vae(vae))):
        if companion is None:
            continue
        if place is not None and _has_room(graph, place, name, companion):
            lead_through(graph, companion, place, PLACEMENT, name)
            graph.set_values(place, PLACEMENT, values)
            tell("placement-used", companion.node, number=number, inputs=_text(values))
        else:
            tell("placement-stays", companion.node, number=number, inputs=_text(values))


def _says(graph: Graph, place: Node, values: Mapping[str, Any]) -> bool:
    said = {**PLACEMENT.widgets, **graph.values(place, list(PLACEMENT.widgets))}
    return all(said[name] == value for name, value in values.items())


def _has_room(graph: Graph, place: Node, name: str, companion: Found) -> bool:
    """Whether a companion can go through a placement: nothing does so yet, and neither leads to the other."""
    source = companion.gives[name.upper()]
    behind = {number for output in range(len(PLACEMENT.outputs)) for number in reached(graph, (place, output))}
    is_free = not graph.is_linked(place, name) and _says(graph, place, {f"{name}_device": DEFAULT})
    return is_free and source[0].id not in behind and place.id not in reached(graph, source)


def _clip_placed(graph: Graph, found: Found) -> bool:
    return found.wish.clip_device != DEFAULT and found.leads_on(graph, CLIP)


def _vae_placed(graph: Graph, found: Found) -> bool:
    return found.wish.vae_device != DEFAULT and found.leads_on(graph, VAE)


def _of_model(wish: Wish) -> Values:
    """No devices at all would mean all GPUs."""
    values = {"devices": FIRST if wish.devices is None else ",".join(wish.devices)}
    return values | ({"split": "ratio", "ratio": ",".join(map(share_text, wish.ratio))} if wish.ratio else {})


def _of_clip(clip: Found | None) -> Values:
    return {} if clip is None else {"clip_device": clip.wish.clip_device}


def _of_vae(vae: Found | None) -> Values:
    return {} if vae is None else {"vae_device": vae.wish.vae_device}


def _text(values: Values) -> str:
    return ", ".join(f"{name}={value or 'all'}" for name, value in values.items())
