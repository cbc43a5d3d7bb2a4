"""Workflows of loaders, what takes what they give, and what has nothing to do with them, put together at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from weightstream.streaming.workflows.kinds import LOADER, PLACEMENT, SETTINGS
from weightstream.streaming.workflows.multigpu import HOSTS, find

COLUMNS, COLUMN, ROW = 9, 900, 700
# Each class: its inputs that are no widgets, and its outputs, by types.
KINDS: dict[str, tuple[str, str]] = {
    "UNETLoader": ("", "MODEL"),
    "UNETLoaderMultiGPU": ("", "MODEL"),
    "UNETLoaderDisTorch2MultiGPU": ("", "MODEL"),
    "UnetLoaderGGUF": ("", "MODEL"),
    "UnetLoaderGGUFDisTorch2MultiGPU": ("", "MODEL"),
    "CheckpointLoaderSimple": ("", "MODEL CLIP VAE"),
    "CheckpointLoaderSimpleDisTorch2MultiGPU": ("", "MODEL CLIP VAE"),
    "CheckpointLoaderAdvancedMultiGPU": ("", "MODEL CLIP VAE"),
    LOADER.name: ("", "MODEL CLIP VAE"),
    "CLIPLoader": ("", "CLIP"),
    "CLIPLoaderMultiGPU": ("", "CLIP"),
    "DualCLIPLoaderDisTorch2MultiGPU": ("", "CLIP"),
    "VAELoaderMultiGPU": ("", "VAE"),
    "ControlNetLoaderMultiGPU": ("", "CONTROL_NET"),
    SETTINGS.name: ("MODEL CLIP", "MODEL CLIP"),
    PLACEMENT.name: ("MODEL CLIP VAE", "MODEL CLIP VAE"),
    "LoraLoader": ("MODEL CLIP", "MODEL CLIP"),
    "LoraLoaderModelOnly": ("MODEL", "MODEL"),
    "ModelSamplingFlux": ("MODEL", "MODEL"),
    "CLIPTextEncode": ("CLIP", "CONDITIONING"),
    "KSampler": ("MODEL CONDITIONING CONDITIONING LATENT", "LATENT"),
    "VAEDecode": ("LATENT VAE", "IMAGE"),
    "EmptyLatentImage": ("", "LATENT"),
    "SaveImage": ("IMAGE", ""),
    "Note": ("", ""),
}
# Only in the page: what comes to an output goes on to another input.
ONLY_IN_PAGE: dict[str, tuple[str, str]] = {"Reroute": ("*", "MODEL"), "SetNode": ("MODEL", "MODEL")}
DEVICES = ("cuda:0", "cuda:1", "cuda:2", "cpu", "default")
ALLOCATIONS = ("", "", "cuda:0,2.5gb;cpu,*", "cuda:0,60%;cuda:1,30%;cpu,10%", "cuda:1,0.5;cpu,0.5", "half of it")
VALUES: dict[str, tuple[Any, ...]] = {
    "virtual_vram_gb": (0, 0, 4.0),
    "donor_device": ("cpu", "cuda:1"),
    "allocations": ALLOCATIONS,
    "device": DEVICES,
}


def random_workflow(seed: int, only_in_page: bool) -> dict[str, Any]:
    """A workflow in the page's form; ``only_in_page`` adds nodes, modes and ids that no API prompt has."""
    chance = random.Random(seed)
    kinds = {**KINDS, **(ONLY_IN_PAGE if only_in_page else {})}
    chosen = [chance.choice(list(kinds)) for _ in range(chance.randint(2, 22))]
    # Loaders first: nodes take what those before them give.
    chosen.sort(key=lambda kind: (kinds[kind][0] != "", chance.random()))
    numbers = chance.sample(range(1, 200), len(chosen))
    places = [(COLUMN * (place % COLUMNS), ROW * (place // COLUMNS)) for place in range(3 * len(chosen))]
    chance.shuffle(places)
    nodes = [
        _node(chance, number, kind, *kinds[kind], list(places.pop()))
        for number, kind in zip(numbers, chosen, strict=True)
    ]
    links: list[list[Any]] = []
    for place, one in enumerate(nodes):
        for slot_place, slot in enumerate(one["inputs"]):
            sources = _sources(nodes[:place], slot["type"])
            if sources and chance.random() < (0.9 if slot_place == 0 else 0.6):
                _link(links, *chance.choice(sources), one, slot_place)
    if only_in_page:
        _add_what_only_a_page_has(chance, nodes, links)
    chance.shuffle(nodes)
    graph = {"last_node_id": 0, "last_link_id": 0, "nodes": nodes, "links": links, "version": 0.4}
    if only_in_page and chance.random() < 0.5:
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        graph["links"] = [dict(zip(names, link, strict=True)) for link in links]
    return graph


def _node(chance: random.Random, number: int, kind: str, takes: str, gives: str, place: list[int]) -> dict[str, Any]:
    inputs = [{"name": _name(takes.split(), place), "type": type_} for place, type_ in enumerate(takes.split())]
    return {
        "id": number,
        "type": kind,
        "pos": place,
        "size": [300, 200],
        "mode": 0,
        "inputs": [{**one, "link": None} for one in inputs],
        "outputs": [{"name": type_, "type": type_, "links": []} for type_ in gives.split()],
        "properties": {"ver": "1"},
        "widgets_values": [_value(chance, name) for name in widget_names(kind)],
    }


def _name(types: list[str], place: int) -> str:
    return types[place].lower() + (str(place) if types.count(types[place]) > 1 else "")


def widget_names(kind: str) -> list[str]:
    """The widgets that a class has in these workflows."""
    if (archived := find(kind)) is not None:
        return list(archived.names)
    for known in (LOADER, SETTINGS, PLACEMENT):
        if known.name == kind:
            return list(known.widgets)
    return list(HOSTS[kind][0].widgets) if kind in HOSTS else ["text"]


def _value(chance: random.Random, name: str) -> Any:
    for known in (LOADER, SETTINGS, PLACEMENT):
        if name in known.widgets and (name not in ("unet_name", "clip_device", "vae_device") or chance.random() < 0.5):
            return known.widgets[name]
    return next((chance.choice(values) for part, values in VALUES.items() if part in name), f"{name}.safetensors")


def _sources(nodes: list[dict[str, Any]], type_: str) -> list[tuple[dict[str, Any], int]]:
    wanted = "MODEL" if type_ == "*" else type_
    return [(one, place) for one in nodes for place, slot in enumerate(one["outputs"]) if slot["type"] == wanted]


def _link(links: list[list[Any]], source: dict[str, Any], output: int, target: dict[str, Any], place: int) -> None:
    number = len(links) + 7
    type_ = source["outputs"][output]["type"]
    links.append([number, source["id"], output, target["id"], place, type_])
    source["outputs"][output]["links"].append(number)
    target["inputs"][place]["link"] = number


def _add_what_only_a_page_has(chance: random.Random, nodes: list[dict[str, Any]], links: list[list[Any]]) -> None:
    """Some nodes are muted or bypassed, some devices come from a selector, and Get nodes give what Set nodes take."""
    for one in nodes:
        one["mode"] = chance.choice((0, 0, 0, 0, 2, 4))
        if one["type"] == "SetNode":
            one["widgets_values"] = [chance.choice("ab")]
    free = 201
    for one in [one for one in nodes if "device" in widget_names(one["type"]) and chance.random() < 0.4]:
        kind, name = chance.choice((("DeviceSelectorMultiGPU", "device"), ("PrimitiveNode", "device"), ("Any", "more")))
        source = _node(chance, free, kind, "", "COMBO", [COLUMN * (free - 200), -2 * ROW])
        source["widgets_values"] = [chance.choice(DEVICES)]
        one["inputs"].insert(0, {"name": name, "type": "COMBO", "link": None})
        for link in links:
            link[4] += link[3] == one["id"]
        _link(links, source, 0, one, 0)
        nodes.append(source)
        free += 1
    for name in "ab":
        getter = _node(chance, free, "GetNode", "", "MODEL", [COLUMN * (free - 200), -2 * ROW])
        getter["widgets_values"] = [name]
        sampler = _node(chance, free + 1, chance.choice(("KSampler", SETTINGS.name)), "MODEL", "MODEL", [0, 0])
        sampler["pos"] = [COLUMN * (free - 199), -2 * ROW]
        _link(links, getter, 0, sampler, 0)
        nodes += [getter, sampler]
        free += 2


def as_prompt(graph: Mapping[str, Any]) -> dict[str, Any]:
    """The API prompt of a workflow that has nothing that is only in the page."""
    sources = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    return {
        str(one["id"]): {
            "class_type": one["type"],
            "inputs": {
                **dict(zip(widget_names(one["type"]), one["widgets_values"], strict=False)),
                **{slot["name"]: sources[slot["link"]] for slot in one["inputs"] if slot["link"] is not None},
            },
        }
        for one in graph["nodes"]
    }


def by_sources(prompt: Mapping[str, Any]) -> list[Any]:
    """What each node of a prompt computes, whatever ids they have: its class, its values, and what comes to it."""
    known: dict[str, Any] = {}
    defaults = {kind.name: kind.widgets for kind in (LOADER, SETTINGS, PLACEMENT)}

    def described(number: str) -> Any:
        if number not in known:
            node = prompt[number]
            inputs = {**defaults.get(node["class_type"], {}), **node["inputs"]}
            known[number] = (node["class_type"], sorted((name, of(value)) for name, value in inputs.items()))
        return known[number]

    of: Callable[[Any], str] = lambda value: (  # noqa: E731
        repr((described(value[0]), value[1])) if isinstance(value, list) else repr(value)
    )
    return sorted(map(repr, map(described, prompt)))
