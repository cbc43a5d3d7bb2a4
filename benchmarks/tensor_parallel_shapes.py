"""Pure: the blocks whose sharding is measured, and their sizes. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

BF16_BYTES = 2


class Linear(NamedTuple):
    """A linear layer and how many rows go through it."""

    name: str
    rows: int
    inputs: int
    outputs: int

    @property
    def nbytes(self) -> int:
        return BF16_BYTES * (self.inputs + 1) * self.outputs


@dataclass(frozen=True)
class Shape:
    """A model at one picture size.

    Attributes:
        image_tokens, text_tokens: that attend to each other in every block.
        double_blocks: with weights of their own for image and text.
        single_blocks: with one set of weights for both.
    """

    name: str
    image_tokens: int
    text_tokens: int
    double_blocks: int
    single_blocks: int
    hidden: int = 3072
    heads: int = 24
    mlp: int = 12288

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text_tokens

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads

    @property
    def blocks(self) -> dict[str, int]:
        """How many blocks there are of each kind that the model has."""
        counts = {"double": self.double_blocks, "single": self.single_blocks}
        return {kind: count for kind, count in counts.items() if count}

    @property
    def nbytes(self) -> int:
        return sum(count * self.block_bytes(kind) for kind, count in self.blocks.items())

    def block_bytes(self, kind: str) -> int:
        return sum(linear.nbytes for linear in self.linears(kind))

    def linears(self, kind: str) -> list[Linear]:
        """The layers of one block, as the models themselves have them."""
        if kind == "double":
            return self._stream("image", self.image_tokens) + self._stream("text", self.text_tokens)
        return [
            Linear("modulation", 1, self.hidden, 3 * self.hidden),
            Linear("qkv and mlp", self.tokens, self.hidden, 3 * self.hidden + self.mlp),
            Linear("out", self.tokens, self.hidden + self.mlp, self.hidden),
        ]

    def _stream(self, name: str, tokens: int) -> list[Linear]:
        return [
            Linear(f"{name} modulation", 1, self.hidden, 6 * self.hidden),
            Linear(f"{name} qkv", tokens, self.hidden, 3 * self.hidden),
            Linear(f"{name} projection", tokens, self.hidden, self.hidden),
            Linear(f"{name} mlp up", tokens, self.hidden, self.mlp),
            Linear(f"{name} mlp down", tokens, self.mlp, self.hidden),
        ]

    def shrunk(self) -> Shape:
        """One that a CPU runs in no time."""
        return replace(self, image_tokens=48, text_tokens=16, hidden=64, heads=4, mlp=256)


SHAPES = (
    Shape("flux-1024", 4096, 512, double_blocks=19, single_blocks=38),
    Shape("flux-2048", 16384, 512, double_blocks=19, single_blocks=38),
    Shape("qwen-1328", 6889, 128, double_blocks=60, single_blocks=0),
)


def shapes(tiny: bool) -> list[Shape]:
    return [shape.shrunk() for shape in SHAPES] if tiny else list(SHAPES)


def activations(shapes: list[Shape]) -> list[tuple[str, int, int]]:
    """Name, rows and width of what crosses between GPUs in a block."""
    found: dict[tuple[int, int], str] = {}
    for shape in shapes:
        found.setdefault((shape.tokens, shape.hidden), f"{shape.name}, all tokens")
        found.setdefault((shape.text_tokens, shape.hidden), f"{shape.name}, text")
        found.setdefault((shape.tokens, shape.mlp), f"{shape.name}, inside of the MLP")
    return [(name, rows, width) for (rows, width), name in found.items()]
