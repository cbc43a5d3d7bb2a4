"""Threads of which one at a time runs, and lets the next one go on at each block of its model.

[Note: why they take turns]
ComfyUI sets, for the time of each attention, which of its kernels torch prefers, and sets that back (comfy.ops). The
setting is the process's: of two threads at once one would take the other's away, or leave its own, and torch would
compute with another kernel, which gives other bits. And what other nodes have put into a model was written for one
thread. Nothing is lost by it: threads that launch kernels wait for the interpreter's lock all the same (two H200, FLUX
at 1024^2 with two prompts, which the host limits: 0.36 s a step with turns and without). A turn is a block, so that no
device waits long for kernels of its own: what was launched for it runs on while the others have their turn.

A turn is nobody's by name: a team of devices, of which one thread at a time runs (relay.py), has one together.

Whoever waits is in a queue, and is woken by the one before it: no thread has two turns while another waits. A thread
that has the turn waits for no other that takes part (memory that several models share is built by whoever asks first,
sharing/share.py, Note: nobody waits), so each turn ends.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import nn

T = TypeVar("T")


class Turns:
    """A turn that one of several threads has."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_taken = False
        self._waiting: deque[threading.Semaphore] = deque()

    def take(self) -> None:
        """Wait for the turn."""
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return
            mine = self._queue_up()
        mine.acquire()

    def give(self) -> None:
        """End the turn."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()  # The turn is that one's now.
            else:
                self._is_taken = False

    def pass_on(self) -> None:
        """Let those who wait have theirs, and wait for the next one; go on at once if nobody waits."""
        with self._lock:
            if not self._waiting:
                return
            mine = self._queue_up()
            self._waiting.popleft().release()
        mine.acquire()

    def _queue_up(self) -> threading.Semaphore:
        mine = threading.Semaphore(0)
        self._waiting.append(mine)
        return mine

    def run(self, call: Callable[[], T], blocks: Iterable[nn.Module]) -> T:
        """Run ``call`` in turns, one for each of ``blocks`` that it runs."""
        handles = [block.register_forward_pre_hook(lambda *_: self.pass_on()) for block in blocks]
        self.take()
        try:
            return call()
        finally:
            for handle in handles:
                handle.remove()
            self.give()
