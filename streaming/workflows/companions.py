"""Which text encoder or VAE goes along with which MODEL."""

from __future__ import annotations

from .following import reached
from .graph import Graph
from .kinds import MODEL
from .loaders import Found


def take_companion(graph: Graph, model: Found, type_: str, others: list[Found], models: list[Found]) -> Found | None:
    """Take the one of ``others`` that goes along with a MODEL; None if there is none.

    It runs when the model's loader runs, neither leads to the other, and what they lead to meets. One that meets no
    MODEL (it may go on in another graph) goes along with the first.
    """
    if not others or not model.leads_on(graph, MODEL):
        return None
    followers = graph.followers()
    met = {id(one): reached(graph, one.gives[MODEL], followers) for one in models if one.leads_on(graph, MODEL)}
    able = []
    for one in others:
        there = reached(graph, one.gives[type_], followers)
        apart = model.gives[MODEL][0].id not in there and one.gives[type_][0].id not in met[id(model)]
        if one.node.mode == model.node.mode and apart:
            able.append((one, [number for number, behind in met.items() if behind & there]))
    found = next((one for one, meets in able if id(model) in meets), None)
    found = found or next((one for one, meets in able if not meets), None)
    if found is not None:
        others.remove(found)
    return found
