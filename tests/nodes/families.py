"""The families that are tested, by the host's names for them, and why others are not."""

from __future__ import annotations

import comfy.supported_models
import family_uses
from family import Family
from image_families import IMAGES
from newer_families import NEWER, WAYS
from unet_families import UNETS
from video_families import VIDEOS
from weightstream.nodes.host.hosts import NEWEST_KNOWN, release

# Every family that is known, whether this host has it or not.
KNOWN: dict[str, Family] = {**UNETS, **IMAGES, **VIDEOS, **NEWER}

# What the host lists among its models, but does not sample with.
OTHERS = {
    "RT_DETR_v4": "detects objects: nothing is sampled",
    "SAM3": "finds outlines: nothing is sampled",
    "SAM31": "finds outlines: nothing is sampled",
    "DepthAnything3": "estimates depth: nothing is sampled",
}
OTHERS_SINCE = "0.30"

NAMES = [model.__name__ for model in comfy.supported_models.models]

# Those that this host has; tests run them.
FAMILIES = {name: family for name, family in KNOWN.items() if name in NAMES}
LACKING = {name: family for name, family in KNOWN.items() if name not in NAMES}
# Each family, and its other uses: what the host calls it, and how to make and run it.
USES = {name: (name, family) for name, family in FAMILIES.items()}
for way, (name, family) in (family_uses.USES | WAYS).items():
    if name in FAMILIES:
        USES[f"{name}, {way}"] = name, family


def missing(host_version: str, names: list[str]) -> list[str]:
    """Families that a host of this version should have, and that are not among its ``names``."""
    return [name for name in KNOWN if name not in names and release(KNOWN[name].since) <= release(host_version)]


def strangers(names: list[str]) -> list[str]:
    """Those of a host's ``names`` that nobody here knows."""
    return [name for name in names if name not in KNOWN and name not in OTHERS]


def is_known(host_version: str) -> bool:
    """Whether the list of models of a host of this version was read. Later ones may have some that nobody has seen."""
    return release(host_version) <= release(NEWEST_KNOWN)
