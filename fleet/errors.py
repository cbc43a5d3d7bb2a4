"""What can go wrong in a fleet."""

from __future__ import annotations


class FleetError(Exception):
    """Base of all errors of the fleet; the text says what happened and what to do."""


class FleetConfigError(FleetError):
    """A setting or an argument that cannot be used."""


class WorkerStartError(FleetError):
    """A worker's ComfyUI did not start."""


class WorkerDied(FleetError):
    """A worker's ComfyUI, its actor or its host is gone; what ran on it has no result."""


class PromptRefused(FleetError):
    """A worker's ComfyUI finds a prompt invalid that the front took. ``answer``: its own account."""

    def __init__(self, text: str, answer: dict[str, object]) -> None:
        super().__init__(text, answer)
        self.text = text
        self.answer = answer

    def __str__(self) -> str:
        return self.text
