"""The families that are tested, by the host's names for them, and why others are not."""

from __future__ import annotations

from image_families import IMAGES
from unet_families import UNETS
from video_families import VIDEOS

FAMILIES = {**UNETS, **IMAGES, **VIDEOS}

# What the host lists among its models, but does not sample with.
OTHERS = {
    "RT_DETR_v4": "detects objects: nothing is sampled",
    "SAM3": "finds outlines: nothing is sampled",
    "SAM31": "finds outlines: nothing is sampled",
    "DepthAnything3": "estimates depth: nothing is sampled",
}
