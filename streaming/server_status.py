"""What a running ComfyUI says of its streamed models, asked over HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from .config import format_bytes
from .errors import ServerError

DEFAULT_URL = "http://127.0.0.1:8188"
ROUTE = "/weightstream/v1/status"
TIMEOUT_SECONDS = 10
UNKNOWN = "-"


def ask(url: str) -> dict[str, Any]:
    """The status of the server at ``url``.

    Raises:
        ServerError: nobody answers there, or somebody who has not this pack.
    """
    try:
        with urllib.request.urlopen(url.rstrip("/") + ROUTE, timeout=TIMEOUT_SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ServerError(
            f"{url}: {error.code} for {ROUTE}; is WeightStream installed there, and as new as this?"
        ) from None
    except (OSError, ValueError) as error:
        raise ServerError(f"{url}: no ComfyUI answers ({error}); start it, or give its address with --url") from None


def as_text(status: dict[str, Any]) -> str:
    """For people: a line for each device, the host and each notice, and two for each model."""
    lines = [_device(device) for device in status["devices"]] or ["no GPU; models run in RAM"]
    host = status["host"]
    limit = "" if host["pinned_limit"] is None else f" of {format_bytes(host['pinned_limit'])}"
    lines.append(
        f"RAM    {format_bytes(host['ram_available'])} of {format_bytes(host['ram_total'])} available; "
        f"page-locked {format_bytes(host['pinned'])}{limit}"
    )
    for model in status["models"]:
        reason = f" ({model['reason']})" if model["reason"] else ""
        lines += [f"{model['name']} on {model['device']}: {model['ladder']}{reason}", f"  {model['plan']}"]
    return "\n".join(lines + [f"{notice['name']}: {notice['text']}" for notice in status["notices"]])


def _device(device: dict[str, Any]) -> str:
    parts = ("resident", "staging", "torch", "cache", "other", "free")
    used = ", ".join(f"{name} {_bytes(device[name])}" for name in parts)
    return f"{device['device']}  {device['name']}, {_bytes(device['total'])}: {used}"


def _bytes(count: int | None) -> str:
    return UNKNOWN if count is None else format_bytes(count)
