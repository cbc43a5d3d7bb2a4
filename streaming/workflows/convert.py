"""Puts what streams into a workflow or a prompt.

Load Diffusion Model becomes the Streamed Model Loader. Behind every other loader of a MODEL comes Async Offload
Settings. Loaders of ComfyUI-MultiGPU become the host's or ours, and GPU Placement comes where they asked for devices.
What is there already is not put in again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..errors import WorkflowError
from .graph import Graph, Node
from .kinds import MODEL
from .loaders import replace_loaders
from .multigpu import SELECTOR
from .notes import Note, Weight
from .page_graph import PageFile
from .placing import put_placements
from .prompt_graph import PromptGraph
from .settling import put_settings
from .shown_widgets import hide_gone_widgets


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
        _convert(result.workflow, result.notes)
    except WorkflowError:
        raise
    except RecursionError as error:
        raise WorkflowError("it is nested too deeply") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError, AssertionError) as error:
        raise WorkflowError(f"it has links or nodes that cannot be read ({type(error).__name__}: {error})") from error
    return result


def _convert(workflow: Any, notes: list[Note]) -> None:
    if isinstance(workflow, dict) and isinstance(workflow.get("nodes"), list):
        file = PageFile(workflow)
        _convert_graphs(file.graphs, notes)
        hide_gone_widgets(file)
    elif _is_prompt(workflow):
        _convert_graphs([PromptGraph(workflow)], notes)
    else:
        raise WorkflowError("it is no workflow of ComfyUI's page, and no API prompt")


def _is_prompt(workflow: Any) -> bool:
    nodes = [node for node in workflow.values() if node is not None] if isinstance(workflow, dict) else []
    return bool(nodes) and all(
        isinstance(node, dict) and "class_type" in node and isinstance(node.get("inputs"), dict) for node in nodes
    )


def _convert_graphs(graphs: Iterable[Graph], notes: list[Note]) -> None:
    for graph in graphs:

        def tell(code: str, node: Node, /, graph: Graph = graph, **values: Any) -> None:
            notes.append(Note(code, str(node.id), node.kind, graph.name, values))

        loaders = replace_loaders(graph, tell)
        for node in graph.remove_unused(SELECTOR):
            tell("selector-gone", node)
        models = [found for found in loaders if MODEL in found.gives]
        others = [found for found in loaders if MODEL not in found.gives]
        put_settings(graph, models, others, tell)
        put_placements(graph, models, others, tell)
