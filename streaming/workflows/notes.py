"""What a conversion says: one note for each thing that was changed, differs, or is left to the user."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..config import plain
from .kinds import LOADER, PLACEMENT, SETTINGS


class Weight(Enum):
    """What a note means for the user."""

    CHANGED = "changed"
    DIFFERS = "differs"  # It runs, otherwise than before.
    LEFT = "left"  # It has no equal; the text says what to do.


# The page has these in other languages (web/lib/takeover.mjs), by the same codes.
TEXTS: dict[str, tuple[Weight, str]] = {
    "loader": (Weight.CHANGED, f"is a {LOADER.title} now"),
    "host": (Weight.CHANGED, "is {name} now"),
    "settings": (Weight.CHANGED, f"{SETTINGS.title} follows it now"),
    "settings-clip": (Weight.CHANGED, f"streams through {SETTINGS.title} now"),
    "placement": (Weight.CHANGED, f"{PLACEMENT.title} follows it now: {{inputs}}"),
    "placement-used": (Weight.CHANGED, f"goes through {PLACEMENT.title} (node {{number}}) now: {{inputs}}"),
    "selector-gone": (Weight.CHANGED, "is gone: nothing reads it any more"),
    "virtual-vram": (
        Weight.DIFFERS,
        "virtual_vram_gb={gib} is not needed: what does not fit streams from RAM. To keep VRAM free, set vram_limit_gb "
        "to the size of the file less {gib}",
    ),
    "donor": (
        Weight.DIFFERS,
        "{donor} lent memory only; now the blocks are placed on {devices} by their memory and speed, and {donor} may "
        "compute too",
    ),
    "donors": (
        Weight.DIFFERS,
        "other GPUs lent memory only; now the blocks are placed on all GPUs by their memory and speed, and all may "
        "compute",
    ),
    "limit": (Weight.DIFFERS, "vram_limit_gb={gib} stands for {name}={value!r}; the rest streams from RAM"),
    "limit-left": (
        Weight.LEFT,
        "{name}={value!r} is not taken over, because no settings are put behind it; set vram_limit_gb={gib} by hand",
    ),
    "ratio": (
        Weight.DIFFERS,
        "{name}={value!r}: the GPUs share the blocks as {ratio}; what does not fit streams from RAM, with no share of "
        "its own for cpu",
    ),
    "by-memory": (
        Weight.DIFFERS,
        "{name}={value!r}: this division is not kept; the blocks are placed by memory and speed on {devices}",
    ),
    "unread": (Weight.LEFT, "{name}={value!r} cannot be read; set vram_limit_gb, or devices and ratio, by hand"),
    "linked": (Weight.LEFT, "{name} comes through a link, which goes; set it on our nodes by hand"),
    "device": (
        Weight.LEFT,
        "{name}={value!r} has no equal: only NVIDIA and AMD GPUs stream; it stays where ComfyUI puts it",
    ),
    "compute-cpu": (Weight.LEFT, "{name}=cpu has no equal for a MODEL: it computes on the GPU, and streams there"),
    "no-device": (Weight.LEFT, "{name}={value!r} has no equal for this node; it stays where ComfyUI puts it"),
    "alone": (
        Weight.LEFT,
        f"{{name}}={{value!r}}: there is no MODEL beside it that {PLACEMENT.title} could take it along with; use "
        "ComfyUI's {instead}",
    ),
    "placement-stays": (
        Weight.LEFT,
        f"{PLACEMENT.title} (node {{number}}) is there already and stays as it is; set there by hand: {{inputs}}",
    ),
    "link-gone": (Weight.LEFT, "its input {name!r} has no equal here, and its link is gone"),
    "precision": (Weight.LEFT, "high_precision_loras has no equal: a LoRA is computed as ComfyUI does it"),
    "no-equal": (Weight.LEFT, "has no equal here; use the node of the same name without MultiGPU, of its own pack"),
    "no-equal-wan": (
        Weight.LEFT,
        "and {others} more like it: what the Wan wrapper loads cannot be streamed; use its own nodes without MultiGPU, "
        "or ComfyUI's nodes for Wan",
    ),
    "input-gone": (Weight.LEFT, "the subgraph's input {name!r} leads nowhere now; delete it"),
    "group-node": (Weight.LEFT, "is an old group node; convert it to a subgraph in the page, then convert again"),
}


@dataclass(frozen=True)
class Note:
    """One thing to tell.

    Attributes:
        code: a key of :data:`TEXTS`.
        node: the node's number.
        kind: its class as it was.
        graph: the subgraph's name; empty for the workflow itself.
        values: for the text.
    """

    code: str
    node: str
    kind: str
    graph: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def weight(self) -> Weight:
        return TEXTS[self.code][0]

    @property
    def text(self) -> str:
        return TEXTS[self.code][1].format(**self.values)

    def __str__(self) -> str:
        where = f"{self.graph}, " if self.graph else ""
        return f"{where}node {self.node} ({self.kind}): {self.text}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the page."""
        return {
            "code": self.code,
            "weight": self.weight.value,
            "node": self.node,
            "kind": self.kind,
            "graph": self.graph,
            "values": self.values,
            "text": self.text,
        }


def as_lines(notes: list[Note]) -> str:
    """A line for each note; those that are left to the user come last."""
    order = list(Weight)
    ranked = sorted(notes, key=lambda note: order.index(note.weight))
    return "\n".join(plain(f"{note.weight.value:<8} {note}") for note in ranked)
