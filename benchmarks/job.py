"""What a process that measures is told: one contender's run of one case."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import CASES, FAST_DISK, Case


@dataclass(frozen=True)
class Job:
    """One contender's run of one case.

    Attributes:
        steps: denoising steps of the measured run.
        free_bytes: VRAM that was free before this process started.
    """

    case: Case
    contender: str
    checkpoint: Path
    comfyui: Path
    steps: int
    free_bytes: int

    @property
    def base(self) -> str:
        """The contender without what is forced of ComfyUI's fast disk."""
        return FAST_DISK[self.contender].base if self.contender in FAST_DISK else self.contender

    @property
    def is_ours(self) -> bool:
        return self.contender.startswith("weightstream")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "case": self.case.name,
            "tiny": self.case.tiny,
            "contender": self.contender,
            "checkpoint": str(self.checkpoint),
            "comfyui": str(self.comfyui),
            "steps": self.steps,
            "free_bytes": self.free_bytes,
        }

    @classmethod
    def from_dict(cls, wanted: dict[str, Any]) -> Job:
        """A job from what :meth:`as_dict` gave; other keys are left to the caller."""
        case = CASES[wanted["case"]]
        return cls(
            case.shrunk() if wanted["tiny"] else case,
            wanted["contender"],
            Path(wanted["checkpoint"]),
            Path(wanted["comfyui"]),
            wanted["steps"],
            wanted["free_bytes"],
        )
