"""Large workflows: the work grows as the file does, not as its square."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from weightstream.streaming.workflows.convert import convert
from workflow_files import node, passing, workflow


def column(count: int) -> dict[str, Any]:
    """Loaders with a sampler each above, and below them what has nothing to do with them, all in one column."""
    nodes = [node(1, "PrimitiveNode", [])]
    for number in range(2, 22, 2):
        nodes.append(node(number, "CheckpointLoaderSimpleMultiGPU", ["f", "cuda:1"]))
        nodes.append(node(number + 1, "KSampler", [], model=(number, 0)))
    nodes += [passing(number, "SomebodysNode", (number - 1, 0), "A", "A") for number in range(30, 30 + count)]
    nodes[21]["inputs"][0]["link"] = (1, 0)
    for place, one in enumerate(nodes):
        one["pos"] = [0, 200 * place]
    return workflow(*nodes)


def chain(count: int) -> dict[str, Any]:
    """A loader whose MODEL goes through very many nodes."""
    nodes = [passing(number, "LoraLoader", (number - 1, 0), "MODEL", "MODEL") for number in range(2, 2 + count)]
    return workflow(node(1, "CheckpointLoaderSimple", ["f"]), *nodes)


def loose(count: int) -> dict[str, Any]:
    """Loaders alike that lead nowhere."""
    return workflow(
        *(node(number, "CheckpointLoaderSimpleMultiGPU", ["f", "cuda:1"]) for number in range(1, 1 + count))
    )


def as_prompt(graph: dict[str, Any]) -> dict[str, Any]:
    inputs: dict[int, dict[str, Any]] = {one["id"]: {} for one in graph["nodes"]}
    for _, source, output, target, _, _ in graph["links"]:
        inputs[target]["model"] = [str(source), output]
    return {str(one["id"]): {"class_type": one["type"], "inputs": inputs[one["id"]]} for one in graph["nodes"]}


def calls(workflow: dict[str, Any]) -> int:
    """How many functions are called for a conversion."""
    count = 0

    def note(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        assert convert(workflow).changed
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("in_page", [True, False])
@pytest.mark.parametrize("build", [column, chain, loose])
def test_four_times_the_nodes_are_about_four_times_the_work(build: Any, in_page: bool) -> None:
    small, large = (build(count) if in_page else as_prompt(build(count)) for count in (100, 400))
    assert calls(large) < 6 * calls(small)
