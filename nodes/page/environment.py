"""What somebody who reads a report has to know of the process: versions, and how ComfyUI was started. No paths."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any

import torch

from ...streaming import VramReader
from ..model.offload import OffloadSettings
from ..model.streamed_model import StreamedModel

UNKNOWN = "unknown"
PAGE = "comfyui-frontend-package"
# A value that is shown; others may name folders, people or machines.
NUMBER = re.compile(r"\d+(\.\d+)?|\d+(,\d+)+")


def describe_environment(reader: VramReader) -> dict[str, str]:
    """Names and versions, as a report has them."""
    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or (f"ROCm {torch.version.hip}" if torch.version.hip else "none"),
        "driver": reader.driver() or UNKNOWN,
        "system": f"{platform.system()} {platform.release()}",
        "page": _version_of(PAGE),
        "options": " ".join(shown_options(sys.argv[1:])) or "none",
    }


def shown_options(words: Sequence[str]) -> Iterator[str]:
    """Options of a command line: all names, and of the values only numbers."""
    for word in words:
        name, _, value = word.partition("=")
        if name.startswith("-"):
            yield name
        if NUMBER.fullmatch(value if name.startswith("-") else word):
            yield value or word


def describe_settings(model: StreamedModel) -> dict[str, Any]:
    """What the nodes of a model set, and is not automatic."""
    settings: OffloadSettings | None = getattr(model.loaded(), "settings", None)
    if settings is None:
        return {}
    chosen = {field.name: getattr(settings, field.name) for field in fields(settings)}
    automatic = OffloadSettings()
    return {
        name: value.value if isinstance(value, Enum) else value
        for name, value in chosen.items()
        if value != getattr(automatic, name)
    }


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN
