"""Puts what streams into a workflow or a prompt.

Load Diffusion Model becomes the Streamed Model Loader. Behind every other loader of a MODEL comes Async Offload
Settings. Loaders of ComfyUI-MultiGPU become the host's or ours, and GPU Placement comes where they asked for devices.
What is there already is not put in again.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import WorkflowError
from .allocations import CPU, DEFAULT
from .graph import Graph, Node
from .kinds import CLIP, DIFFUSION_LOADER, LOADER, MODEL, PLACEMENT, SETTINGS, VAE, Kind
from .multigpu import FIRST, SELECTOR, WAN, Archived, Wish, find, is_archived, share_text
from .notes import Note, Weight
from .page_graph import Numbers, PageGraph, subgraphs_of
from .prompt_graph import PromptGraph

GROUP_NODE = ("workflow>", "workflow/")


@dataclass
class Conversion:
    """What came out.

    Attributes:
        workflow: the JSON, as it came in but for what the notes say.
        notes: what was changed, differs, or is left to the user.
    """

    workflow: dict[str, Any]
    notes: list[Note] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        return any(note.weight is Weight.CHANGED for note in self.notes)


def convert(workflow: Any) -> Conversion:
    """Return a workflow whose models stream; ``workflow`` itself stays as it is.

    Args:
        workflow: as the page saves it, or an API prompt.

    Raises:
        WorkflowError: it is neither.
    """
    try:
        result = Conversion(copy.deepcopy(workflow))
        for graph in _graphs(result.workflow):
            _Pass(graph, result.notes).run()
            if isinstance(graph, PageGraph):
                _forget_widgets(result.workflow, graph)
    except WorkflowError:
        raise
    except RecursionError as error:
        raise WorkflowError("it is nested too deeply") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError, AssertionError) as error:
        raise WorkflowError(f"it has links or nodes that cannot be read ({type(error).__name__}: {error})") from error
    return result


def _graphs(workflow: Any) -> Iterable[Graph]:
    if isinstance(workflow, dict) and isinstance(workflow.get("nodes"), list):
        definitions = subgraphs_of(workflow)
        numbers, ids = Numbers(workflow), [definition["id"] for definition in definitions]
        names = ["", *(definition.get("name") or definition["id"] for definition in definitions)]
        graphs = zip([workflow, *definitions], names, strict=True)
        return [PageGraph(graph, numbers, ids, name) for graph, name in graphs]
    if isinstance(workflow, dict) and workflow and all(map(_is_prompt_node, workflow.values())):
        return [PromptGraph(workflow)]
    raise WorkflowError("it is no workflow of ComfyUI's page, and no API prompt")


def _is_prompt_node(value: Any) -> bool:
    return isinstance(value, dict) and "class_type" in value and isinstance(value.get("inputs"), dict)


def _forget_widgets(workflow: Mapping[str, Any], graph: PageGraph) -> None:
    """Nodes that stand for the subgraph may show widgets of nodes inside: those that are gone are not shown."""
    if graph.id is None or not graph.gone_widgets:
        return
    for outer in (workflow, *subgraphs_of(workflow)):
        for node in outer["nodes"]:
            if node["type"] == graph.id and isinstance(node.get("properties"), dict):
                _hide(node, graph.gone_widgets)


def _hide(node: dict[str, Any], gone: set[tuple[str, str]]) -> None:
    """Take widgets out of those that a node shows, with their values. Some pages save the list as a text of JSON."""
    saved = node["properties"].get("proxyWidgets")
    shown = json.loads(saved) if isinstance(saved, str) else saved
    if not isinstance(shown, list):
        return
    stays = [not isinstance(entry, list) or tuple(map(str, entry[:2])) not in gone for entry in shown]
    kept = list(itertools.compress(shown, stays))
    node["properties"]["proxyWidgets"] = json.dumps(kept) if isinstance(saved, str) else kept
    values = node.get("widgets_values")
    if isinstance(values, list) and len(values) == len(shown):
        node["widgets_values"] = list(itertools.compress(values, stays))


@dataclass
class _Found:
    """A loader.

    Attributes:
        node: as it was found.
        gives: by type, the node and the output that give it; another node's once that was put behind.
        wish: what it asks for.
        streams: whether its MODEL streams by itself.
    """

    node: Node
    gives: dict[str, tuple[Node, int]]
    wish: Wish
    streams: bool


class _Pass:
    """Converts one graph."""

    def __init__(self, graph: Graph, notes: list[Note]) -> None:
        self._graph = graph
        self._notes = notes

    def run(self) -> None:
        loaders = [found for node in self._graph.nodes() if (found := self._replace(node)) is not None]
        for node in self._graph.remove_unused(SELECTOR):
            self._note("selector-gone", node)
        models = [found for found in loaders if MODEL in found.gives]
        others = [found for found in loaders if MODEL not in found.gives]
        self._settle(models, others)
        self._place(models, others)

    # -- loaders -------------------------------------------------------------------------------------------------------

    def _replace(self, node: Node) -> _Found | None:
        """Make a loader what stands for it; None for what loads nothing that is looked after here."""
        if (archived := find(node.kind)) is not None:
            return self._replace_archived(node, archived)
        if is_archived(node.kind):
            self._leave(node)
        elif node.kind.startswith(GROUP_NODE):
            self._note("group-node", node)
        elif node.kind == DIFFUSION_LOADER:
            self._graph.become(node, LOADER, {}, list(LOADER.widgets)[:2])
            self._note("loader", node)
            return _Found(node, {MODEL: (node, 0)}, Wish(), streams=True)
        elif node.kind != LOADER.name and (place := self._graph.model_output(node)) is not None:
            return _Found(node, {MODEL: (node, place)}, Wish(), streams=False)
        return None

    def _leave(self, node: Node) -> None:
        """Tell of a node without an equal; of the many that come together once."""
        if not node.kind.startswith(WAN):
            self._note("no-equal", node)
        elif not any(note.code == "no-equal-wan" and note.graph == self._graph.name for note in self._notes):
            same = [other for other in self._graph.nodes() if other.kind.startswith(WAN) and is_archived(other.kind)]
            self._note("no-equal-wan", node, others=len(same) - 1)

    def _replace_archived(self, node: Node, archived: Archived) -> _Found:
        values = self._graph.values(node, archived.names)
        wish, kind = archived.read(values), archived.kind
        chosen = {name: values[name] for name in kind.widgets if name in values and name != "device"}
        if archived.own_device:
            chosen["device"] = CPU if wish.clip_device == CPU else DEFAULT
            wish.clip_device = DEFAULT if wish.clip_device == CPU else wish.clip_device
        if values.get("high_precision_loras") is False:
            wish.tell("precision")
        streams = kind is LOADER
        if streams and wish.limit_gib:
            chosen["vram_limit_gb"] = wish.limit_gib
        outputs = {type_: (node, self._graph.output(node, type_, place)) for type_, place in archived.outputs.items()}
        self._graph.become(node, kind, chosen, archived.names)
        self._note("loader" if streams else "host", node, **({} if streams else {"name": kind.name}))
        for code, about in wish.notes:
            if code != "limit" or streams:
                self._note(code, node, **about)
        for name in self._graph.take_open_inputs():
            self._note("input-gone", node, name=name)
        return _Found(node, outputs, wish, streams)

    # -- settings ------------------------------------------------------------------------------------------------------

    def _settle(self, models: list[_Found], others: list[_Found]) -> None:
        """Put Async Offload Settings behind models of other loaders, and take along text encoders that shall stream."""
        left = [found for found in others if found.wish.clip_streams and self._leads_on(found, CLIP)]
        for found in models:
            clip = found if found.wish.clip_streams and self._leads_on(found, CLIP) else None
            clip = clip or self._beside(found, CLIP, left, models)
            settled = self._settled(found)
            leading = {node and node.id for node in self._graph.consumers(*found.gives[MODEL])}
            needed = not found.streams and not leading <= settled
            for about in [about for code, about in found.wish.notes if code == "limit" and not found.streams]:
                self._note("limit" if needed else "limit-left", found.node, **about)
            if not needed and clip is None:
                continue
            limit = found.wish.limit_gib if needed else 0.0
            values = {"vram_limit_gb": limit} if limit else {}
            self._insert(SETTINGS, values, {"model": found, "clip": clip}, settled)
            if not found.streams:
                self._note("settings", found.node)
            if clip is not None:
                self._note("settings-clip", clip.node)
        for found in left:
            self._insert(SETTINGS, {}, {"clip": found})
            self._note("settings-clip", found.node)

    def _beside(self, model: _Found, type_: str, others: list[_Found], models: list[_Found]) -> _Found | None:
        """Take the one of ``others`` that goes along with a MODEL; None if there is none.

        It runs when the model's loader runs, neither leads to the other, and what they lead to meets. One that meets no
        MODEL (it may go by a name that only the page knows) goes along with the first.
        """
        if not others or not self._leads_on(model, MODEL):
            return None
        reached = {id(one): self._reached(one, MODEL) for one in models if self._leads_on(one, MODEL)}
        able = []
        for one in others:
            there = self._reached(one, type_)
            apart = model.gives[MODEL][0].id not in there and one.gives[type_][0].id not in reached[id(model)]
            if one.node.mode == model.node.mode and apart:
                able.append((one, [number for number, met in reached.items() if met & there]))
        found = next((one for one, meets in able if id(model) in meets), None)
        found = found or next((one for one, meets in able if not meets), None)
        if found is not None:
            others.remove(found)
        return found

    def _reached(self, found: _Found, type_: str) -> set[Any]:
        """The ids of all that comes behind what a loader gives of a type."""
        followers = self._graph.followers()
        waiting = [node.id for node in self._graph.consumers(*found.gives[type_]) if node is not None]
        reached: set[Any] = set()
        while waiting:
            if (number := waiting.pop()) not in reached:
                reached.add(number)
                waiting += followers.get(number, ())
        return reached - self._graph.frame

    def _leads_on(self, found: _Found, type_: str) -> bool:
        return type_ in found.gives and bool(self._graph.consumers(*found.gives[type_]))

    def _settled(self, found: _Found) -> frozenset[Any]:
        """The ids of the nodes that a loader leads its MODEL to, and behind which it always comes to our settings."""

        known: dict[Any, bool] = {}

        def is_settled(node: Node | None) -> bool:
            if node is None:
                return False
            if node.kind == SETTINGS.name and node.mode in (0, found.node.mode):
                return True
            if node.id not in known:
                known[node.id] = False  # Until it is known: links in a circle lead nowhere.
                behind = [one for place in self._graph.passes_model(node) for one in self._graph.consumers(node, place)]
                known[node.id] = bool(behind) and all(map(is_settled, behind))
            return known[node.id]

        consumers = self._graph.consumers(*found.gives[MODEL])
        return frozenset(node.id for node in consumers if node is not None and is_settled(node))

    # -- placement -----------------------------------------------------------------------------------------------------

    def _place(self, models: list[_Found], others: list[_Found]) -> None:
        """Put GPU Placement where devices were asked for; text encoder and VAE go along with a MODEL."""
        clips = [found for found in others if found.wish.clip_device != DEFAULT and self._leads_on(found, CLIP)]
        vaes = [found for found in others if found.wish.vae_device != DEFAULT and self._leads_on(found, VAE)]
        for found in models:
            own_clip = found.wish.clip_device != DEFAULT and self._leads_on(found, CLIP)
            own_vae = found.wish.vae_device != DEFAULT and self._leads_on(found, VAE)
            clip = found if own_clip else self._beside(found, CLIP, clips, models)
            vae = found if own_vae else self._beside(found, VAE, vaes, models)
            placed = found.wish.devices is not None and self._leads_on(found, MODEL)
            if not placed and clip is None and vae is None:
                continue
            values = _placement_values(found.wish, clip, vae)
            self._insert(PLACEMENT, values, {"model": found, "clip": clip, "vae": vae})
            inputs = ", ".join(f"{name}={value or 'all'}" for name, value in values.items())
            self._note("placement", found.node, inputs=inputs)
        for found in clips:
            self._alone(found, "clip_device", found.wish.clip_device, "Select CLIP Device")
        for found in vaes:
            self._alone(found, "vae_device", found.wish.vae_device, "Select VAE Device")

    def _alone(self, found: _Found, name: str, device: str, instead: str) -> None:
        self._note("alone", found.node, name=name, value=device, instead=instead)

    # -- all -----------------------------------------------------------------------------------------------------------

    def _insert(
        self,
        kind: Kind,
        values: Mapping[str, Any],
        inputs: Mapping[str, _Found | None],
        stay: frozenset[Any] = frozenset(),
    ) -> None:
        """Put a node behind loaders; what they gave comes from it from now on."""
        types = {socket.name: socket.type for socket in kind.sockets}
        connected = {name: found for name, found in inputs.items() if found is not None}
        links = {name: found.gives[types[name]] for name, found in connected.items()}
        node = self._graph.insert(kind, next(iter(connected.values())).node, values, links, stay)
        places = [socket.name for socket in kind.sockets]
        for name, found in connected.items():
            found.gives[types[name]] = (node, places.index(name))

    def _note(self, code: str, node: Node, **values: Any) -> None:
        self._notes.append(Note(code, str(node.id), node.kind, self._graph.name, values))


def _placement_values(wish: Wish, clip: _Found | None, vae: _Found | None) -> dict[str, str]:
    """Widgets of GPU Placement. No devices at all would mean all GPUs."""
    values = {"devices": FIRST if wish.devices is None else ",".join(wish.devices)}
    if wish.ratio:
        values |= {"split": "ratio", "ratio": ",".join(map(share_text, wish.ratio))}
    if clip is not None:
        values["clip_device"] = clip.wish.clip_device
    if vae is not None:
        values["vae_device"] = vae.wish.vae_device
    return values
