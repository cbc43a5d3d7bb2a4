"""Nodes that stand for a subgraph may show widgets of nodes inside: those that are gone are not shown any more."""

from __future__ import annotations

import itertools
import json
from typing import Any

from .page_graph import PageFile

# A node and the name of one of its widgets.
Widgets = set[tuple[str, str]]


def hide_gone_widgets(file: PageFile) -> None:
    """Hide the widgets that the conversion has removed, also where a subgraph around shows them again."""
    waiting = [(graph, graph.gone_widgets) for graph in file.graphs]
    while waiting:
        inner, gone = waiting.pop()
        for outer, instance in file.instances(inner) if gone else ():
            waiting.append((outer, _hide(outer.saved(instance), gone)))


def _hide(node: dict[str, Any], gone: Widgets) -> Widgets:
    """Take widgets out of those that a node shows, with their values. Some pages save the list as a text of JSON.

    Returns those that were shown, as widgets of this node.
    """
    properties = node.get("properties")
    saved = properties.get("proxyWidgets") if isinstance(properties, dict) else None
    shown = json.loads(saved) if isinstance(saved, str) else saved
    if not isinstance(shown, list):
        return set()
    stays = [not isinstance(entry, list) or tuple(map(str, entry[:2])) not in gone for entry in shown]
    kept = list(itertools.compress(shown, stays))
    node["properties"]["proxyWidgets"] = json.dumps(kept) if isinstance(saved, str) else kept
    values = node.get("widgets_values")
    if isinstance(values, list) and len(values) == len(shown):
        node["widgets_values"] = list(itertools.compress(values, stays))
    return {(str(node["id"]), str(entry[1])) for entry, stay in zip(shown, stays, strict=True) if not stay}
