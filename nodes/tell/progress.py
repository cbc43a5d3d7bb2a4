"""The bar and the text on a node while a model's weights are read. ComfyUI's interrupt is raised here meanwhile."""

from __future__ import annotations

import time

import comfy.model_management as mm
import comfy.utils

from ...streaming import Progress, format_bytes, format_rate
from ..host.hosts import get_progress_state
from . import messages

# Seconds between two texts. The host's bar has a limit of its own.
TEXT_SECONDS = 0.25
# Progress that is older belongs to a load that was given up.
TOLD_SECONDS = 3.0


class LoadingBar:
    """Shows :class:`streaming.Progress` on the loader node.

    Args:
        node_id: the loader node; None outside of a prompt, where nothing is shown.

    Attributes:
        node_id: the node.
        wrote: whether the text on the node is a text of progress.
    """

    def __init__(self, node_id: str | None) -> None:
        self.node_id = node_id
        self._bar: comfy.utils.ProgressBar | None = None
        self._last_text = 0.0
        self._told: tuple[float, Progress] | None = None
        self.wrote = False

    def progress(self) -> Progress | None:
        """How far loading is; None when nothing is loaded, or was given up."""
        told = self._told
        return told[1] if told is not None and time.monotonic() - told[0] < TOLD_SECONDS else None

    def __call__(self, progress: Progress | None) -> None:
        """Show how far it is, if anything is being loaded; raises ComfyUI's interrupt when the user has cancelled."""
        mm.throw_exception_if_processing_interrupted()
        if progress is None:
            return
        done = progress.done_bytes >= progress.total_bytes
        self._told = None if done else (time.monotonic(), progress)
        if self.node_id is None:
            return
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(progress.total_bytes, node_id=self.node_id)
        self._bar.update_absolute(progress.done_bytes, progress.total_bytes)
        if done:
            self._end()
        elif time.monotonic() - self._last_text >= TEXT_SECONDS:
            self._last_text = time.monotonic()
            self.wrote = True
            messages.show(describe(progress), self.node_id)

    def _end(self) -> None:
        """Tell the host that the progress has ended: the node ran long ago, and the page would show it as running."""
        self._bar = None
        if comfy.utils.PROGRESS_BAR_HOOK is not None and get_progress_state is not None:
            get_progress_state().finish_progress(self.node_id)


def describe(progress: Progress) -> str:
    """``reading 12.3 GiB of 22.2 GiB, 9.8 GB/s``."""
    amount = f"reading {format_bytes(progress.done_bytes)} of {format_bytes(progress.total_bytes)}"
    if progress.seconds <= 0:
        return amount
    return f"{amount}, {format_rate(progress.done_bytes / progress.seconds)}"
