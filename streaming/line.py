"""A model's state in one line for people, on all of its devices together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .config import format_bytes, listed
from .planning.plan import TOLD_WAITING
from .run.telemetry import Snapshot


@dataclass(frozen=True)
class Line:
    """What the line says, as values: a page makes a sentence of its own language from them.

    Attributes:
        devices: names, in the order of the parts; a part that is not loaded is left out.
        seconds: a step, as the plan expects it, or the average of a run that has ended; None before one was measured.
        waiting: the part of it in which compute waits for the bus; None where that is not worth telling.
        more_bytes, more_seconds, more_device: memory that makes the step as fast as it can be, on which device, and the
            step then; 0 where none would.
        kept_bytes, total_bytes: weights that stay in VRAM, and all.
        staged_bytes: of those that stream, the bytes that do not come from page-locked memory.
        synchronous: whether copies are made when they are needed.
        parallel: whether the devices work at the same time, each with all weights. Figures are of the one that has the
            fewest of them, and of the slowest.
    """

    devices: tuple[str, ...]
    seconds: float | None
    waiting: float | None
    more_bytes: int
    more_seconds: float
    more_device: str
    kept_bytes: int
    total_bytes: int
    staged_bytes: int
    synchronous: bool
    parallel: bool = False

    @classmethod
    def of(cls, parts: Sequence[Snapshot], ended: bool = False, parallel: bool = False) -> Line:
        """The line of a model whose parts are on devices of their own, or of one alone.

        ``ended``: their run has ended, so the line has what was measured in it. ``parallel``: each has the whole model.
        """
        loaded = [part for part in parts if part.mode != "off"]
        parallel = parallel and len(loaded) > 1
        seconds, waiting = (_measured(loaded) if ended else None) or _expected(loaded)
        told = seconds is not None and waiting >= TOLD_WAITING
        gains = [part for part in loaded if told and seconds and 0 < part.more_seconds < seconds and part.more_bytes]
        best = min(gains, key=lambda part: part.more_seconds, default=None)
        least = min(loaded, key=_kept, default=None) if parallel else None
        counted = loaded if least is None else [least]
        kept = sum(map(_kept, counted))
        return cls(
            devices=tuple(part.device for part in loaded),
            seconds=seconds,
            waiting=waiting if told else None,
            more_bytes=best.more_bytes if best is not None else 0,
            more_seconds=best.more_seconds if best is not None else 0.0,
            more_device=best.device if best is not None else "",
            kept_bytes=kept,
            total_bytes=kept + sum(part.streamed_weight_bytes for part in counted),
            staged_bytes=sum(part.staged_bytes for part in loaded if not part.building),
            synchronous=any(part.mode == "synchronous" for part in loaded),
            parallel=parallel,
        )

    def as_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.devices:
            return "not loaded"
        return " · ".join(filter(None, (self._step(), *self._bus(), self._where())))

    def _step(self) -> str:
        return "" if self.seconds is None else f"{_seconds(self.seconds)}/step"

    def _bus(self) -> list[str]:
        if self.kept_bytes == self.total_bytes:
            return [f"all {format_bytes(self.total_bytes)} in VRAM"]
        staged = f"{format_bytes(self.staged_bytes)} not page-locked" if self.staged_bytes else ""
        copied = "copied when needed" if self.synchronous else ""
        if self.seconds is None:
            kept = f"{format_bytes(self.kept_bytes)} of {format_bytes(self.total_bytes)} stay in VRAM"
            return [kept, staged, copied]
        if self.waiting is None:
            return ["hardly any waiting for the bus", staged, copied]
        return [f"{self.waiting:.0%} waiting for the bus".replace("%", " %"), self._more(), staged, copied]

    def _more(self) -> str:
        if not self.more_bytes:
            return ""
        where = f" on {self.more_device}" if len(self.devices) > 1 else ""
        return f"+{format_bytes(self.more_bytes)} VRAM{where} → {_seconds(self.more_seconds)}"

    def _where(self) -> str:
        if self.parallel:
            return f"{listed(self.devices)} at the same time"
        return ", ".join(self.devices) if len(self.devices) > 1 else ""


def _kept(part: Snapshot) -> int:
    return part.resident_bytes + part.rest_bytes


def _expected(loaded: Sequence[Snapshot]) -> tuple[float | None, float]:
    """A step as the plans expect it, and the part of waiting. The parts run it together, and each expects all of it."""
    expected = [part.predicted_step_seconds for part in loaded if part.predicted_step_seconds is not None]
    seconds = max(expected, default=0.0)
    if not seconds or len(expected) < len(loaded):
        return None, 0.0
    return seconds, 1 - max(part.compute_seconds or 0.0 for part in loaded) / seconds


def _measured(loaded: Sequence[Snapshot]) -> tuple[float, float] | None:
    """The same of the run that has ended: the slowest part tells how long, and who waits most what is waited for."""
    runs = [part.run for part in loaded if part.run.step_seconds is not None]
    if not runs:
        return None
    return max(run.step_seconds or 0.0 for run in runs), max(run.waiting or 0.0 for run in runs)


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
