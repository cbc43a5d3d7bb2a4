"""Where there is room for a node on the canvas."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

GAP, TITLE = 40, 30

Box = tuple[float, float, float, float]


def free_place(beside: Mapping[str, Any], size: tuple[int, int], nodes: Iterable[Mapping[str, Any]]) -> list[float]:
    """The nearest place in a node's column, or in one beside it, where no other node lies."""
    taken = [_box(node) for node in nodes]
    left, top, right, _ = _box(beside)
    width, height = size[0], size[1] + TITLE
    places = []
    for x in (left, left - width - GAP, right + GAP):
        column = [(box[1], box[3]) for box in taken if x < box[2] + GAP / 2 and box[0] < x + width + GAP / 2]
        y = _nearest(top, height, column)
        places.append((abs(x - left) + abs(y - top), x, y))
    _, x, y = min(places)
    return [x, y + TITLE]


def _nearest(top: float, height: float, taken: list[tuple[float, float]]) -> float:
    """The upper end next to ``top`` of a stretch of ``height`` that lies in none of those that are taken."""
    above = below = top
    # Upwards by the lower ends and downwards by the upper ends: what was passed lies behind.
    for begin, end in sorted(taken, key=lambda one: -one[1]):
        if begin < above + height + GAP and above < end + GAP:
            above = begin - height - GAP
    for begin, end in sorted(taken):
        if begin < below + height + GAP and below < end + GAP:
            below = end + GAP
    return min((abs(top - above), above), (abs(below - top), below))[1]


def _box(node: Mapping[str, Any]) -> Box:
    """Left, top, right and bottom, the title included."""
    (x, y), (width, height) = _pair(node.get("pos"), (0, 0)), _pair(node.get("size"), (340, 120))
    return x, y - TITLE, x + width, y + height


def _pair(value: Any, default: tuple[float, float]) -> tuple[float, float]:
    """Two numbers; older pages saved them as an object."""
    values = list(value.values()) if isinstance(value, dict) else value
    numbers = values[:2] if isinstance(values, list) else []
    known = len(numbers) == 2 and all(isinstance(one, (int, float)) and math.isfinite(one) for one in numbers)
    return (float(numbers[0]), float(numbers[1])) if known else default
