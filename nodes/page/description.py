"""What the status tells of streamed models: plain values, ready for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...streaming import Run, Snapshot, format_bytes
from ..model.streamed_model import StreamedModel
from ..tell.names import without_folders
from .causes import Facts, find_causes
from .environment import describe_settings
from .runs import is_running, run_that_counts
from .together import Together, together_of
from .usage import DeviceUsage


def describe_models(models: Iterable[StreamedModel], ended: bool = False) -> list[dict[str, Any]]:
    """One entry for each of them, and so for each device of a split one. Plain values, ready for JSON.

    ``ended``: the caller knows that nothing runs.
    """
    return [describe_model(model, model.streamer.snapshot(), ended) for model in models]


def describe_model(model: StreamedModel, now: Snapshot, ended: bool) -> dict[str, Any]:
    """How a model stands on its device: plain values; sizes in bytes, rates in bytes per second."""
    ladder, reason = ladder_step(now)
    loading = model.bar.progress()
    running = not ended and is_running(now)
    return {
        **now.as_dict(),
        "id": str(model.number),
        "name": model.title,
        "device": model.gpu,
        "node_id": model.node_id,
        "settings": describe_settings(model),
        "ladder": ladder,
        "reason": without_folders(reason),
        "plan": without_folders(now.explain),
        "explain": without_folders(now.explain),
        "note": without_folders(now.note),
        "running": running,
        "parallel": {"devices": list(model.beside), "alone": without_folders(model.alone)} if model.beside else None,
        "loading": loading
        and {
            "done": loading.done_bytes,
            "total": loading.total_bytes,
            "rate": loading.done_bytes / loading.seconds if loading.seconds > 0 else None,
        },
        "last_run": _describe_run(now.last_run if running else now.run, now.blocks),
    }


def describe_causes(models: Iterable[StreamedModel], devices: Sequence[DeviceUsage]) -> list[dict[str, Any]]:
    """Why the models that are loaded are not faster, the dearest reason of each device first (causes.py)."""
    usage = {device.device: device for device in devices}
    known = [(model, model.streamer.snapshot()) for model in models if model.gpu in usage]
    return [
        {"model": str(model.number), "device": model.gpu, **cause.as_dict()}
        for model, now in known
        for cause in find_causes(facts_of(model, now, usage[model.gpu], together_of(model, known, usage)))
    ]


def facts_of(model: StreamedModel, now: Snapshot, device: DeviceUsage, together: Together | None = None) -> Facts:
    """What is known of a model on its device: of the run that has ended, or of one that is on, once it has settled."""
    ladder, reason = ladder_step(now)
    run = run_that_counts(now)
    config = model.streamer.config
    loads = model.bar.progress() is not None or (now.building and now.staged_bytes > 0)
    return Facts(
        loading=ladder != "unloaded" and loads,
        synchronous=ladder == "synchronous",
        why_synchronous=without_folders(reason) if ladder == "synchronous" else "",
        streamed=now.streamed_block_bytes,
        staged=now.staged_bytes,
        why_staged=without_folders(now.note),
        why_unpacked=without_folders(now.why_unpacked),
        bandwidth=now.bandwidth_bytes_per_second,
        step=run.step_seconds,
        waited=_waited(run),
        compute=now.compute_seconds,
        link=device.link,
        card=device.card,
        total=device.total,
        free=device.free,
        others=device.other,
        limit=config.vram_limit,
        kept=now.device_bytes,
        headroom=config.headroom_bytes,
        together=together,
    )


def ladder_step(now: Snapshot) -> tuple[str, str]:
    """How weights reach the device, and why not in a better way.

    The steps, the best first: ``resident``, ``pinned`` (page-locked memory), ``staged`` (through a small ring),
    ``synchronous`` (copied when needed); ``unloaded`` stands beside them.
    """
    if now.mode == "off":
        return "unloaded", ""
    if now.mode == "resident":
        return "resident", now.note
    if now.mode == "synchronous":
        return "synchronous", now.note or "its settings ask for it"
    if now.staged_bytes == 0:
        kept = now.resident_bytes + now.rest_bytes
        return "pinned", f"{format_bytes(kept)} of {format_bytes(kept + now.streamed_weight_bytes)} stay in VRAM"
    if now.building:
        made = "page-locked copies are made now" if now.locking else "page-locked copies are made before the next step"
        return "staged", now.note or made
    return "staged", now.note


def _waited(run: Run) -> float | None:
    """Seconds of an average step in which compute waits."""
    return None if run.step_seconds is None or run.waiting is None else run.waiting * run.step_seconds


def _describe_run(run: Run | None, blocks: int) -> dict[str, Any] | None:
    """A run with steps; None for one without. What a step took is the average of those that count."""
    if run is None or run.counters.steps == 0:
        return None
    counters, waited = run.counters, _waited(run)
    return {
        "steps": counters.steps,
        "reruns": counters.reruns,
        "bytes": counters.streamed_bytes,
        "rate": run.rate,
        "waiting": run.waiting,
        "stall_ms_per_block": None if waited is None else 1000 * waited / max(1, blocks),
        "misses": counters.misses,
        "corrupted": counters.corrupted,
        "step_seconds": run.step_seconds,
    }
