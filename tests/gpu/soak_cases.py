"""What the soak's prompts may be. Each is drawn from its number, so that it can be asked for alone."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import NamedTuple

# By kind, how often: where memory runs out, what is done to models between steps, and who stops a prompt.
FAULTS = {
    "memory runs out at a block": 3,
    "memory runs out in a block": 3,
    "memory runs out outside of blocks": 2,
    "memory runs out in a copy": 2,
    "memory runs out in an allocation": 2,
    "a part is unloaded": 2,
    "the home is unloaded": 2,
    "a part gives way": 2,
    "the home gives way": 2,
    "interrupt": 1,
}
STEPS = 5
SEEDS = (3, 4)
# Weights of LoRAs on the model, one behind another.
LORAS = ((), (), (0.7,), (0.5, -0.3, 0.2))
HOOKS = ("", "", "interpolated", "two")
HOOK_MODES = ("MinVram", "MaxSpeed")
PACKING = ("auto", "on", "on", "off")
# Of the weights, the part for which each device has room; 0 is no limit.
LIMITS = (0.0, 0.45, 0.6, 0.85)


class Fault(NamedTuple):
    """Something goes wrong.

    Attributes:
        kind: one of ``FAULTS``.
        when: how far it is, from 0 to 1, among the calls or steps that it may hit.
        where: which of the blocks, layers or patchers, from 0 to 1.
        share: of the memory, where some is given up.
    """

    kind: str
    when: float
    where: float
    share: float


class Picture(NamedTuple):
    """What is asked for. Equal ones have one latent, however they are made.

    Attributes:
        family: "flux", or "causal" with the sampler ar_video.
        loras: strengths.
        hooks: a LoRA on the conditioning with a schedule; none if empty.
        easycache, controlnet: whether they are used.
        seed: of the noise.
        half: whether the model runs in bfloat16 also where the host would choose float32, so that it may be packed.
    """

    family: str
    loras: tuple[float, ...]
    hooks: str
    easycache: bool
    controlnet: bool
    seed: int
    half: bool


class Prompt(NamedTuple):
    """A picture, how it is made, and what goes wrong meanwhile.

    Attributes:
        number: from 1 on.
        picture: what is asked for.
        hook_mode: of the host.
        devices: over how many the model is split.
        limit: of memory, one of ``LIMITS``.
        packing: of weights, one of ``PACKING``.
        faults: at most two.
    """

    number: int
    picture: Picture
    hook_mode: str
    devices: int
    limit: float
    packing: str
    faults: tuple[Fault, ...]

    @property
    def features(self) -> list[str]:
        """What it has, for counts."""
        picture = self.picture
        found = {
            "LoRA": len(picture.loras) == 1,
            "LoRA stack": len(picture.loras) > 1,
            "hooks": bool(picture.hooks),
            "EasyCache": picture.easycache,
            "ControlNet": picture.controlnet,
            "ar_video": picture.family == "causal",
            f"packing {self.packing}": picture.half,
            f"{self.devices} devices": True,
        }
        return [name for name, has in found.items() if has]


def draw(seed: str, number: int, devices: int, kinds: Collection[str]) -> Prompt:
    """Prompt ``number`` of this seed, with faults of these ``kinds``."""
    chance, chance_of_packing = random.Random(f"{seed}/{number}"), random.Random(f"{seed}/{number}/packing")
    flux = chance.random() < 0.8
    picture = Picture(
        "flux" if flux else "causal",
        chance.choice(LORAS) if flux else (),
        chance.choice(HOOKS) if flux else "",
        flux and chance.random() < 0.3,
        flux and chance.random() < 0.3,
        chance.choice(SEEDS),
        flux and chance_of_packing.random() < 0.6,
    )
    faults = [_fault(chance) for _ in range(chance.choice((0, 1, 1, 1, 2)))]
    limit, mode = chance.choice(LIMITS), chance.choice(HOOK_MODES)
    kept = tuple(fault for fault in faults if fault.kind in kinds)
    return Prompt(number, picture, mode, devices, limit, chance_of_packing.choice(PACKING), kept)


def _fault(chance: random.Random) -> Fault:
    (kind,) = chance.choices([*FAULTS], [*FAULTS.values()])
    return Fault(kind, chance.random(), chance.random(), chance.random())
