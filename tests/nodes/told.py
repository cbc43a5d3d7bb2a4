"""What the status tells of one model, and of the parts of a device."""

from __future__ import annotations

from typing import Any

from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.page.status import full_status


def entry_of(model: StreamedModelPatcher) -> dict[str, Any]:
    (entry,) = [each for each in full_status()["models"] if each["id"] == str(model.streamed.number)]
    return entry


def parts_of(device: dict[str, Any]) -> int:
    return sum(device[name] for name in ("resident", "staging", "torch", "cache", "other", "free"))
