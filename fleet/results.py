"""Results of prompts, as ComfyUI's history has them: those that have none from a worker, and what is read in others."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

# ComfyUI goes on after these, though nothing runs on the GPU any more.
BROKEN_GPU = ("AcceleratorError", "CUDA error", "HIP error", "device-side assert", "unspecified launch failure")


def failed(prompt_id: str, text: str) -> dict[str, Any]:
    """A result that says why there is none, as ComfyUI tells of an error in a node."""
    error = {
        "prompt_id": prompt_id,
        "node_id": "",
        "node_type": "",
        "executed": [],
        "exception_type": "FleetError",
        "exception_message": text,
        "traceback": [],
        "current_inputs": {},
        "current_outputs": [],
        "timestamp": int(time.time() * 1000),
    }
    return _without_outputs("execution_error", error)


def interrupted(prompt_id: str) -> dict[str, Any]:
    """The result of a prompt that was interrupted on a worker that died."""
    values = {"prompt_id": prompt_id, "node_id": "", "node_type": "", "executed": []}
    return _without_outputs("execution_interrupted", {**values, "timestamp": int(time.time() * 1000)})


def _without_outputs(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "outputs": {},
        "meta": {},
        "status": {"status_str": "error", "completed": False, "messages": [[kind, values]]},
    }


def with_reruns(prompt_id: str, lost: Mapping[str, str], entry: dict[str, Any]) -> dict[str, Any]:
    """A result that says that it is of a second run, if it is."""
    if lost and entry.get("status"):
        message = ["weightstream_rerun", {"prompt_id": prompt_id, "lost": dict(lost)}]
        entry["status"]["messages"] = [*entry["status"]["messages"], message]
    return entry


def broken_gpu(entry: Mapping[str, Any]) -> str | None:
    """Why a worker's GPU is of no use after this result."""
    for kind, values in (entry.get("status") or {}).get("messages", ()):
        if kind == "execution_error":
            text = f"{values.get('exception_type')}: {values.get('exception_message')}"
            if "OutOfMemory" not in text and any(mark in text for mark in BROKEN_GPU):
                return f"its GPU does not work any more: {text}"
    return None


def reason_of(answer: Mapping[str, Any]) -> str:
    """What a ComfyUI says against a prompt."""
    error = answer.get("error") or {}
    said = [str(error.get("message", error)) if isinstance(error, Mapping) else str(error)]
    for node_id, node in (answer.get("node_errors") or {}).items():
        for each in node.get("errors", ()):
            said.append(f"node {node_id} ({node.get('class_type')}): {each.get('message')}: {each.get('details')}")
    return "; ".join(said)
