"""What differs between versions of ComfyUI: all that the benchmarks know of it stands here.

It is read from the source of the ComfyUI that is measured and not concluded from its version, so that a checkout
between two releases is measured as it is. No torch, no ComfyUI: run.py asks before any contender is started.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import re
from pathlib import Path

DYNAMIC_VRAM_IS_ON = "comfy.memory_management.aimdo_enabled"
# What a result file says of the versions, beside ComfyUI's own.
PACKAGES = ("torch", "comfy-aimdo", "comfy-kitchen")


def version(comfyui: Path) -> str:
    found = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (comfyui / "comfyui_version.py").read_text("utf-8"))
    return found.group(1) if found else "unknown"


def versions_of(comfyui: Path) -> dict[str, str]:
    """ComfyUI's version and those of what it runs on in this interpreter."""
    found = {"comfyui": version(comfyui)}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def options(comfyui: Path) -> set[str]:
    """The options of its command line.

    With ``--fast-disk`` dynamic VRAM reads weights from the file again where it would keep copies in RAM. 0.30 has it,
    off by default. 0.37 decides by the disk that the file is on, and has ``--disable-fast-disk`` too.
    """
    return set(re.findall(r'"(--[a-z0-9-]+)"', (comfyui / "comfy" / "cli_args.py").read_text("utf-8")))


def lacking_option(comfyui: Path, option: str) -> str | None:
    """Why a contender that needs ``option`` cannot run, or None if it can."""
    if option in options(comfyui):
        return None
    return f"ComfyUI {version(comfyui)} has no {option}"


def end_of_node(comfyui: Path) -> list[str]:
    """The functions, by their full names and in order, that the executor calls after a node when dynamic VRAM is on.

    Until 0.33 buffers are reset before the queues of prefetched weights are emptied. Since 0.35 the queues come first:
    emptying them also ends a record of allocations that the buffers may be part of.
    """
    for step in ast.walk(ast.parse((comfyui / "execution.py").read_text("utf-8"))):
        for last in step.finalbody if isinstance(step, ast.Try) else ():
            if isinstance(last, ast.If) and ast.unparse(last.test) == DYNAMIC_VRAM_IS_ON:
                return [_plain_call(each.value) for each in last.body if isinstance(each, ast.Expr)]
    raise RuntimeError(f"execution.py of ComfyUI {version(comfyui)} does not end a node as any version that is known")


def _plain_call(call: ast.expr) -> str:
    if not isinstance(call, ast.Call) or call.args or call.keywords:
        raise RuntimeError(f"ComfyUI ends a node with {ast.unparse(call)}, which the benchmarks cannot repeat")
    return ast.unparse(call.func)
