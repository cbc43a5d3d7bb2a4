"""Cards for one person, by what NVIDIA says of them, and what an H200 takes for models that were measured on it.

From that comes what a card may take that nobody here has (tools/cards.py, docs/cards.md): its compute, if it reaches
the same part of its peak as the H200. That may be wrong by a factor of two.
"""

from __future__ import annotations

from typing import NamedTuple

from .cutting import Cut
from .estimate import GIB, LINK_SHARE

# Bytes a second of one lane, of PCIe 4 and 5: 16 and 32 GT/s, 128 of 130 bits of which are data.
LANE_BYTES = {4: 16e9 * 128 / 130 / 8, 5: 32e9 * 128 / 130 / 8}
# VRAM that the driver, a desktop and a browser take.
OTHERS_BYTES = 1_000_000_000
# Of an SM of Ampere, Ada and Blackwell cards in one clock: 256 fused multiply-adds, bf16 with fp32 accumulation.
SM_FLOPS = 512
H200_TFLOPS = 989.4
# Bytes of a weight, by dtype; those of others are not counted.
WEIGHT_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
# Two models with the same blocks whose weights differ by a larger part are not the same.
SAME_WEIGHTS = 0.05


class Card(NamedTuple):
    """A card for one person, as NVIDIA describes it.

    Attributes:
        sms, boost_mhz: streaming multiprocessors, and the clock that NVIDIA calls boost.
        memory_gb_s: bandwidth of its memory.
        generation, lanes: of the PCIe link that it can have.
    """

    name: str
    vram_gib: int
    sms: int
    boost_mhz: int
    memory_gb_s: int
    generation: int
    lanes: int

    @property
    def tflops(self) -> float:
        return self.sms * self.boost_mhz * SM_FLOPS / 1e6

    @property
    def bandwidth(self) -> float:
        """Bytes a second that are assumed for the bus."""
        return LANE_BYTES[self.generation] * self.lanes * LINK_SHARE

    @property
    def free_bytes(self) -> float:
        return self.vram_gib * GIB - OTHERS_BYTES

    def compute_seconds(self, on_h200: float) -> float:
        """A step with everything in VRAM that takes so long on an H200."""
        return on_h200 * H200_TFLOPS / self.tflops


CARDS = (
    Card("RTX 4060", 8, 24, 2460, 272, 4, 8),
    Card("RTX 3060", 12, 28, 1777, 360, 4, 16),
    Card("RTX 4070", 12, 46, 2475, 504, 4, 16),
    Card("RTX 5070", 12, 48, 2512, 672, 5, 16),
    Card("RTX 4060 Ti", 16, 34, 2535, 288, 4, 8),
    Card("RTX 5060 Ti", 16, 36, 2572, 448, 5, 8),
    Card("RTX 5080", 16, 84, 2617, 960, 5, 16),
    Card("RTX 3090", 24, 82, 1695, 936, 4, 16),
    Card("RTX 4090", 24, 128, 2520, 1008, 4, 16),
)


class KnownModel(NamedTuple):
    """A model that ran on an H200.

    Attributes:
        name, size: of the model and of its picture.
        blocks: how many are in each of its lists, ascending.
        weights: how many it has.
        h200_seconds: of a step with everything in VRAM there.
    """

    name: str
    size: str
    blocks: tuple[int, ...]
    weights: float
    h200_seconds: float


KNOWN = (
    KnownModel("FLUX.1-dev", "1024 x 1024", (19, 38), 11.9e9, 0.176),
    KnownModel("Qwen-Image", "1328 x 1328", (60,), 20.4e9, 0.318),
    KnownModel("Wan 2.1 14B", "832 x 480, 33 frames", (40,), 14.3e9, 1.08),
    KnownModel("SD3.5-large", "1024 x 1024", (38,), 8.15e9, 0.095),
)


def known_model(cut: Cut) -> KnownModel | None:
    """The model that was measured and is built like this one; None where there is none."""
    weights = sum(nbytes / WEIGHT_BYTES[dtype] for dtype, nbytes in cut.dtypes.items() if dtype in WEIGHT_BYTES)
    blocks = tuple(sorted(cut.lists.values()))
    alike = (each for each in KNOWN if each.blocks == blocks and abs(weights / each.weights - 1) < SAME_WEIGHTS)
    return next(alike, None)


def card_named(name: str) -> Card | None:
    """The card of this name, with or without its first word."""
    wanted = name.casefold().removeprefix("nvidia ").removeprefix("geforce ").removeprefix("rtx ").strip()
    return next((card for card in CARDS if card.name.casefold() == f"rtx {wanted}"), None)
