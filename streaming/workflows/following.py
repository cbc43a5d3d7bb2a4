"""Where an output leads: what comes behind it in its graph, and which nodes a MODEL comes to on all of its ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .graph import MUTED, Graph, Node, Taker
from .kinds import Kind

# A node and one of its outputs.
Output = tuple[Node, int]


def takers_of(graph: Graph, output: Output) -> frozenset[Any]:
    """The ids of what an output leads to."""
    return frozenset(taker.node.id for taker in graph.takers(*output))


def reached(graph: Graph, output: Output, followers: Mapping[Any, set[Any]] | None = None) -> set[Any]:
    """The ids of all nodes that come behind an output; ``followers`` are the graph's, for who asks often."""
    followers = graph.followers() if followers is None else followers
    waiting = list(takers_of(graph, output))
    found: set[Any] = set()
    while waiting:
        if (number := waiting.pop()) not in found:
            found.add(number)
            waiting += followers.get(number, ())
    return found - graph.frame


def settled(graph: Graph, output: Output, kind: Kind) -> frozenset[Any]:
    """The ids of those takers of a MODEL from which on it comes to a node of ``kind`` on all of its ways."""
    takers = graph.takers(*output)
    behind = _ways(takers, kind, output[0].mode)
    done = {key for key, there in behind.items() if there is None}
    before: dict[Any, list[Any]] = {}
    missing: dict[Any, set[Any]] = {}
    for key, there in behind.items():
        missing[key] = {taker.key for taker in there or ()}
        for one in missing[key]:
            before.setdefault(one, []).append(key)
    waiting = list(done)
    while waiting:
        key = waiting.pop()
        for one in before.get(key, ()):
            missing[one].discard(key)
            if not missing[one] and one not in done:
                done.add(one)
                waiting.append(one)
    return takers_of(graph, output) - {taker.node.id for taker in takers if taker.key not in done}


def first_behind(graph: Graph, output: Output, kind: Kind) -> list[Taker]:
    """The nodes of ``kind`` that a MODEL comes to first on its ways, each once."""
    found: dict[Any, Taker] = {}
    _ways(graph.takers(*output), kind, output[0].mode, found)
    return list(found.values())


def _ways(
    takers: Sequence[Taker], kind: Kind, mode: int, found: dict[Any, Taker] | None = None
) -> dict[Any, Sequence[Taker] | None]:
    """By its key what comes behind each input that a MODEL comes to; None for those of nodes of ``kind``.

    What is muted leads nowhere, and of ``kind`` what is bypassed does not count, unless the loader is so too.
    """
    behind: dict[Any, Sequence[Taker] | None] = {}
    waiting = list(takers)
    while waiting:
        taker = waiting.pop()
        if taker.key in behind:
            continue
        node = taker.node
        if node.kind == kind.name and node.mode in (0, mode):
            behind[taker.key] = None
            if found is not None:
                found.setdefault((id(taker.graph), node.id), taker)
        else:
            runs = node.mode != MUTED or node.mode == mode
            behind[taker.key] = there = taker.graph.passed_on(taker) if runs else []
            waiting += there
    return behind
