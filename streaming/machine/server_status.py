"""What a running ComfyUI says of its streamed models, asked over HTTP."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from ..config import format_bytes, format_rate, plain
from ..errors import ServerError

DEFAULT_URL = "http://127.0.0.1:8188"
SCHEMA = 1
ROUTE = "/weightstream/v1/status"
TIMEOUT_SECONDS = 10
# Of an answer; a status has some ten thousand.
MOST_BYTES = 1 << 26
UNAUTHORIZED = 401
UNKNOWN = "-"
# Of a fleet's workers, where the state's own name does not say it.
WORKER_STATES = {"restarting": "started again", "failed": "cannot be started"}
# What people read for names of fields and of states; the others are words already.
FIELD_WORDS = {"resident": "stay"}
STATE_WORDS = {"resident": "all stays in VRAM", "pinned": "page-locked"}


def ask(url: str | None = None) -> dict[str, Any]:
    """Return the status of the server at ``url``, or of the one at ComfyUI's usual address.

    ``url`` may end with ``?token=TOKEN``, as a fleet prints it.

    Raises:
        ServerError: no server answers there, or it lacks this pack or has another version of it.
    """
    url = url or DEFAULT_URL
    if "://" not in url:
        url = f"http://{url}"
    url, _, query = url.partition("?")
    token = urllib.parse.parse_qs(query).get("token")
    headers = {"Authorization": f"Bearer {token[0]}"} if token else {}
    try:
        request = urllib.request.Request(url.rstrip("/") + ROUTE, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            status = json.loads(answer.read(MOST_BYTES))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == UNAUTHORIZED:
            raise ServerError(f"{url}: it wants a token: give its address with --url {url}?token=TOKEN") from None
        raise ServerError(f"{url}: {error.code} for {ROUTE}; is WeightStream installed there?") from None
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
        raise ServerError(f"{url}: no ComfyUI answers ({error}); start it, or give its address with --url") from None
    if not isinstance(status, dict) or status.get("schema") != SCHEMA:
        raise ServerError(f"{url}: it has another version of WeightStream, whose status cannot be read here")
    return status


def as_text(status: dict[str, Any]) -> str:
    """Return the status as text: a line for each worker, device, the host and each notice, and some for each model.

    Raises:
        ServerError: it is not what this pack's servers say.
    """
    try:
        return "\n".join(map(plain, _lines(status)))
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ServerError(f"the server's status cannot be read ({type(error).__name__}: {error})") from error


def _lines(status: dict[str, Any]) -> list[str]:
    lines = describe_fleet(status["fleet"], status["time"]) if "fleet" in status else []
    lines += [_device(device) for device in status["devices"]] or [f"no devices: {status['why_no_devices']}"]
    host = status["host"]
    limit = "" if host["pinned_limit"] is None else f" of {format_bytes(host['pinned_limit'])}"
    lines.append(
        f"RAM    {format_bytes(host['ram_available'])} of {format_bytes(host['ram_total'])} available; "
        f"page-locked {format_bytes(host['pinned'])}{limit}{_shared(host)}"
    )
    lines += [line for model in status["models"] for line in describe_model(model)]
    return lines + [f"{notice['name']}: {notice['text']}" for notice in status["notices"]]


def describe_fleet(fleet: dict[str, Any], now: float) -> list[str]:
    """Return a line about a fleet, and one for each of its workers. ``now``: of the server, when it said this."""
    workers = fleet["workers"]
    several = len({worker["host"] for worker in workers if worker["host"]}) > 1
    ran_again = f"; {fleet['reruns']} ran again because a worker died" if fleet["reruns"] else ""
    lines = [f"fleet  {_count(len(workers), 'worker')}; {_count(fleet['waiting'], 'prompt')} waiting{ran_again}"]
    for worker in workers:
        title = f"{worker['name']} on {worker['host']}" if several and worker["host"] else worker["name"]
        loaded = ", ".join(worker["loaded"]) or "no model"
        done = f"{_count(worker['done'], 'prompt')} done, {_count(worker['changes'], 'change')} of models"
        lines.append(f"{title}: {_worker_state(worker, now)}; {done}; loaded: {loaded}")
    return lines


def _worker_state(worker: dict[str, Any], now: float) -> str:
    text = WORKER_STATES.get(worker["state"], worker["state"])
    if worker["since"] is not None:
        text += f" for {max(0.0, now - worker['since']):.0f} s"
    return f"{text} ({worker['reason']})" if worker["reason"] else text


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _shared(host: dict[str, Any]) -> str:
    """How much of that other processes of the machine have too, where a server shares at all."""
    if "shared_bytes" not in host:
        return ""
    why = f" ({host['why_unshared']})" if host["why_unshared"] else ""
    return f", {format_bytes(host['shared_bytes'])} of it shared{why}"


def describe_model(model: dict[str, Any]) -> list[str]:
    """Return lines about one model on one device: how its weights get there, its plan, and its last run."""
    reason = f" ({model['reason']})" if model["reason"] else ""
    state = ", running" if model["running"] else ""
    ladder = STATE_WORDS.get(model["ladder"], model["ladder"])
    lines = [f"{model['name']} on {model['device']}: {ladder}{reason}{state}", f"  plan: {model['plan']}"]
    if (loading := model["loading"]) is not None:
        lines.append(f"  loading: {format_bytes(loading['done'])} of {format_bytes(loading['total'])}")
    run = model["last_run"]
    if run is None:
        return [*lines, "  no run has ended yet"]
    step = "" if run["step_seconds"] is None else f" of {run['step_seconds']:.3f} s, {_percent(run['waiting'])} waiting"
    rate = "" if run["rate"] is None else f", {format_rate(run['rate'])} on average"
    again = f" ({run['reruns']} ran again)" if run["reruns"] else ""
    damaged = f"; {run['corrupted']} arrived damaged" if run["corrupted"] else ""
    each = UNKNOWN if run["stall_ms_per_block"] is None else f"{run['stall_ms_per_block']:.3f} ms"
    return [
        *lines,
        f"  last run: {run['steps']} steps{again}{step}; {format_bytes(run['bytes'])} copied{rate}",
        f"  waiting {each} a block and step; {run['misses']} copies came late{damaged}",
    ]


def _device(device: dict[str, Any]) -> str:
    parts = ("resident", "staging", "torch", "cache", "other", "free")
    used = ", ".join(f"{FIELD_WORDS.get(name, name)} {_bytes(device[name])}" for name in parts)
    rate = UNKNOWN if device["copy_rate"] is None else format_rate(device["copy_rate"])
    waiting = _percent(device["stalled"])
    title = f"{device['device']}  {device['name']}, {_bytes(device['total'])}"
    return f"{title}: {used}; peak {_bytes(device['peak'])}; copies {rate}, waiting {waiting}"


def _percent(part: float | None) -> str:
    return UNKNOWN if part is None else f"{100 * part:.0f} %"


def _bytes(count: int | None) -> str:
    return UNKNOWN if count is None else format_bytes(count)
