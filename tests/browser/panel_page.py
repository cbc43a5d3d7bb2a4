"""What tests of the panel share: a workflow that shows it on a node, and how it is looked at."""

from __future__ import annotations

import copy
import importlib.resources
from typing import Any

from servers import TINY

from tools import demo

SEED = 80
AXE = importlib.resources.files("axe_playwright_python") / "axe.min.js"
FAULTS = """async selector => (await axe.run(selector, { resultTypes: ['violations'] })).violations
    .filter(({ impact }) => impact === 'serious' || impact === 'critical')
    .flatMap(({ id, nodes }) => nodes.map(node => `${id}: ${node.html}: ${node.failureSummary}`))"""
UNFOLD = "panel => { for (const each of panel.querySelectorAll('details')) each.open = true }"


def placed_prompt(steps: int = demo.STEPS) -> dict[str, Any]:
    """A model on both devices, with the node that shows the panel."""
    result = copy.deepcopy(demo.api_prompt(TINY, demo.OURS, SEED))
    inputs = {"model": ["model", 0], "devices": "gpu:0,gpu:1"}
    result["placement"] = {"class_type": "WeightStreamGPUPlacement", "inputs": inputs}
    result["lora"]["inputs"]["model"] = ["placement", 0]
    result["sampler"]["inputs"]["steps"] = steps
    return result
