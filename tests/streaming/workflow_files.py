"""Workflows in the form in which the page saves them, and a check that their links hold together."""

from __future__ import annotations

from typing import Any

# Outputs of the classes that these workflows have; where a class is missing it has none.
OUTPUTS = {
    "CLIP": ("CLIPLoader", "CLIPLoaderMultiGPU", "CLIPLoaderDisTorch2MultiGPU", "DualCLIPLoaderMultiGPU"),
    "VAE": ("VAELoader", "VAELoaderMultiGPU", "VAELoaderDisTorch2MultiGPU"),
    "MODEL": (
        *("UNETLoader", "UNETLoaderMultiGPU", "UNETLoaderDisTorch2MultiGPU", "UnetLoaderGGUF", "LoraLoaderModelOnly"),
        *("UnetLoaderGGUFDisTorchMultiGPU", "SomebodysLoader", "WeightStreamGPUPlacement"),
    ),
    "MODEL CLIP VAE": (
        *("CheckpointLoaderSimple", "CheckpointLoaderSimpleMultiGPU", "CheckpointLoaderAdvancedMultiGPU"),
        *("CheckpointLoaderSimpleDisTorch2MultiGPU", "CheckpointLoaderAdvancedDisTorch2MultiGPU"),
    ),
    "LATENT": ("KSampler",),
    "IMAGE": ("VAEDecode",),
    "CONDITIONING": ("CLIPTextEncode",),
    "MULTIGPUDEVICE": ("DeviceSelectorMultiGPU",),
    "COMBO": ("PrimitiveNode",),
}
INPUTS = {
    "KSampler": {"model": "MODEL", "positive": "CONDITIONING"},
    "VAEDecode": {"samples": "LATENT", "vae": "VAE"},
    "CLIPTextEncode": {"clip": "CLIP"},
    "LoraLoaderModelOnly": {"model": "MODEL"},
    "WeightStreamGPUPlacement": {"model": "MODEL"},
    "WeightStreamOffloadSettings": {"model": "MODEL"},
}
# What the frame of a subgraph is called in links.
FRAME_IN, FRAME_OUT = -10, -20


def node(number: int, kind: str, values: list[Any], mode: int = 0, **inputs: tuple[int, int]) -> dict[str, Any]:
    """A node; ``inputs`` are links by the names of inputs, each a node and its output."""
    types = next((types.split() for types, kinds in OUTPUTS.items() if kind in kinds), [])
    names = {**INPUTS.get(kind, {}), **{name: "COMBO" for name in inputs if name not in INPUTS.get(kind, {})}}
    return {
        "id": number,
        "type": kind,
        "pos": [400 * (number % 3), 300 * (number // 3)],
        "size": [320, 130],
        "flags": {},
        "order": number,
        "mode": mode,
        "inputs": [{"name": name, "type": type_, "link": inputs.get(name)} for name, type_ in names.items()],
        "outputs": [{"name": name, "type": name, "links": []} for name in types],
        "properties": {"cnr_id": "comfyui-multigpu", "ver": "2.6.3", "Node name for S&R": kind},
        "widgets_values": values,
    }


def passing(number: int, kind: str, source: tuple[int, int], takes: str, gives: str, mode: int = 0) -> dict[str, Any]:
    """A node with one input and one output of these types."""
    there = node(number, kind, [], mode, model=source)
    there["inputs"][0]["type"] = takes
    return {**there, "outputs": [{"name": gives, "type": gives, "links": []}]}


def settings(number: int, source: tuple[int, int], mode: int = 0) -> dict[str, Any]:
    """Async Offload Settings behind a MODEL."""
    return passing(number, "WeightStreamOffloadSettings", source, "MODEL", "MODEL", mode)


def workflow(*nodes: dict[str, Any], first_link: int = 0, as_objects: bool = False) -> dict[str, Any]:
    """The nodes as a workflow, with the links that they ask for."""
    links: list[Any] = []
    by_number = {one["id"]: one for one in nodes}
    for one in nodes:
        for place, slot in enumerate(one["inputs"]):
            if (wanted := slot["link"]) is None:
                continue
            source, output = wanted
            slot["link"] = number = first_link + len(links) + 1
            if source in by_number:
                by_number[source]["outputs"][output]["links"].append(number)
            values = (number, source, output, one["id"], place, slot["type"])
            names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
            links.append(dict(zip(names, values, strict=True)) if as_objects else list(values))
    return {
        "last_node_id": max(by_number),
        "last_link_id": first_link + len(links),
        "nodes": list(nodes),
        "links": links,
        "version": 0.4,
    }


def check_links(graph: dict[str, Any]) -> None:
    """Both ends of each link know of it and have its type, and nobody knows of a link that is not there."""
    nodes = {one["id"]: one for one in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"])
    links = [list(link.values())[:6] if isinstance(link, dict) else link for link in graph["links"]]
    assert len({link[0] for link in links}) == len(links)
    for number, source, output, target, place, type_ in links:
        if source != FRAME_IN:
            slot = nodes[source]["outputs"][output]
            assert number in slot["links"]
            assert slot["type"] in (type_, "*")
        if target != FRAME_OUT:
            slot = nodes[target]["inputs"][place]
            assert slot["link"] == number
            assert slot["type"] in (type_, "*")
    known = {link[0] for link in links}
    for one in graph["nodes"]:
        assert {slot["link"] for slot in one["inputs"]} - {None} <= known
        assert {number for slot in one["outputs"] for number in slot["links"] or ()} <= known
    assert not overlapping(graph)


def overlapping(graph: dict[str, Any]) -> list[tuple[int, int]]:
    """Pairs of nodes that lie over each other on the canvas."""
    boxes = [
        (one["id"], *one["pos"], one["pos"][0] + one["size"][0], one["pos"][1] + one["size"][1])
        for one in graph["nodes"]
    ]
    return [
        (one[0], other[0])
        for place, one in enumerate(boxes)
        for other in boxes[place + 1 :]
        if one[1] < other[3] and other[1] < one[3] and one[2] < other[4] and other[2] < one[4]
    ]


def subgraph(definition: str, name: str, graph: dict[str, Any], inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """A graph as the definition of a subgraph."""
    return {
        "id": definition,
        "name": name,
        "version": 1,
        "state": {"lastNodeId": graph["last_node_id"], "lastLinkId": graph["last_link_id"]},
        "inputNode": {"id": FRAME_IN, "bounding": [-400, 0, 120, 60]},
        "outputNode": {"id": FRAME_OUT, "bounding": [1600, 0, 120, 60]},
        "inputs": inputs,
        "outputs": [],
        "nodes": graph["nodes"],
        "links": graph["links"],
    }
