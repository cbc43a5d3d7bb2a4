"""What the soak's user may ask for, and how it is drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

# The kind of a node, and what is set on it.
Node = tuple[Any, ...]

# By the model's name.
FILES = {
    "plain": "plain.safetensors",
    "half": "half.safetensors",
    "quantised": "quantised.safetensors",
    "pickled": "pickled.pt",
}
STRENGTHS = (0.0, 0.7, -0.4)
SEEDS = (3, 4)
# Of VRAM, as parts of the model: none, and from little more than the least to most of it.
LIMITS = (0.0, 0.5, 0.65, 0.85)
# How a prompt's model is loaded, and how often. "settings" is our node behind the host's loader, "off" one more of it
# that gives the model back to the host, "both" our node behind our loader.
WAYS = {"ours": 2, "host's": 2, "settings": 3, "off": 2, "both": 3}
MODES = ("auto", "stream", "sync")
# How often, as a CPU unpacks too slowly for auto to pack.
PACKING = {"auto": 1, "on": 2, "off": 1}
# The longest time until somebody presses a button; a prompt takes about a third of it.
IMPATIENCE_SECONDS = 0.3
# Runs of layers in one prompt, about.
LAYER_RUNS = 150


class Prompt(NamedTuple):
    """What a user asks for.

    Attributes:
        name: of the model.
        strength: of its LoRA; with 0 there is none.
        seed: of the noise.
        way: how the model is loaded (``WAYS``).
        limit: of VRAM, as a part of the model; 0 is none.
        mode, packing: of the settings node.
        lora_first: whether the LoRA is in front of the settings, and not behind.
        stop: how it is interrupted, and when; None runs to the end.
    """

    name: str
    strength: float
    seed: int
    way: str
    limit: float
    mode: str
    packing: str
    lora_first: bool
    stop: tuple[str, float] | None

    def nodes(self, model_bytes: int) -> Iterator[Node]:
        """The row of nodes that gives the model, which takes ``model_bytes``."""
        limit = int(self.limit * model_bytes)
        lora = [("lora", self.name, self.strength)] if self.strength else []
        modes = {"settings": [self.mode], "off": [self.mode, "off"], "both": [self.mode]}.get(self.way, [])
        yield ("ours", self.name, limit) if self.way in ("ours", "both") else ("host's", self.name)
        yield from lora if self.lora_first else []
        yield from (("settings", mode, limit, self.packing) for mode in modes)
        yield from [] if self.lora_first else lora


def draw(chance: random.Random) -> Prompt:
    stops = {
        "never": None,
        "raised": ("raised", chance.randrange(LAYER_RUNS)),
        "asked": ("asked", chance.randrange(LAYER_RUNS)),
        "pressed": ("pressed", chance.uniform(0, IMPATIENCE_SECONDS)),
    }
    return Prompt(
        chance.choice([*FILES, "half"]),  # Of the others a CPU packs nothing.
        chance.choice(STRENGTHS),
        chance.choice(SEEDS),
        *chance.choices([*WAYS], [*WAYS.values()]),
        chance.choice(LIMITS),
        chance.choice(MODES),
        *chance.choices([*PACKING], [*PACKING.values()]),
        chance.random() < 0.5,
        stops[chance.choices([*stops], [6, 1, 1, 1])[0]],
    )
