"""Several calls at the same time, of which one at a time runs: they hand a baton on where one needs another.

[Note: one baton]
Each call has a thread, because each is in the middle of a model's forward when it has to wait for another. But only the
thread that has the baton runs; all others wait for theirs. So
 1. Python code, whoever wrote it, never runs on two of these threads at once: what was written for one thread works;
 2. a thread never waits for the interpreter's lock, which another might keep for milliseconds;
 3. the order in which calls run is the same in every run, and a test that has seen one order has seen them all.
Two such relays, of teams of devices with a prompt each, take turns (turns.py), as single devices do.
Devices are not held up by that: what a call queues on its device runs on while another call queues its own. One thread
at a time is enough while queueing takes less time than the devices need (docs/parallel.md).

The baton goes round by number, past calls that have ended. A call that waits for something that another brings hands it
on until that is there (:meth:`Relay.until`). Each of the others runs until it waits too or has ended, so after a round
in which nothing came, nothing will: that is an error, and nobody waits for ever.

[Note: all begin again]
A call may have to begin again in its middle, as a model does on a device that was out of memory. What the others have
brought is of no use then. So it says so (:meth:`Relay.begin_again`) and waits; each of the others is ended by an error
at its next wait, and called again when all have come as far. The last one to come has what was brought forgotten
(``on_again``), which is after everything of before and ahead of everything that is new.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ..errors import StreamingError

# For each device: one that is out of memory takes up to four to find out what it can do without (runner.py).
MOST_BEGINS = 5


class HeldUpError(StreamingError):
    """A call was ended because another has failed, or waits for what nobody brings."""


class BegunAgainError(Exception):
    """A call was ended because another has begun again, and is called once more. Nothing has failed in it."""


class Workers:
    """A thread for each device that others than the caller's compute on, kept from one run to the next: libraries keep
    state for each thread. Runs on other devices may be under way at the same time."""

    def __init__(self) -> None:
        self._free: dict[Hashable, list[ThreadPoolExecutor]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def borrowed(self, devices: Sequence[Hashable]) -> Iterator[list[ThreadPoolExecutor]]:
        """Their threads, which are nobody else's while this lasts: a run that waited for the thread of one inside of
        which it is would wait for ever."""
        with self._lock:
            free = [self._free.setdefault(device, []) for device in devices]
            threads = [known.pop() if known else _make_thread() for known in free]
        try:
            yield threads
        finally:
            with self._lock:
                for known, thread in zip(free, threads, strict=True):
                    known.append(thread)


def _make_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="weightstream-parallel")


class Relay:
    """Calls of one run (Note: one baton).

    Args:
        devices: that the calls compute on, each its own.

    Attributes:
        on_again: forgets what calls have brought; it is called while none of them goes on (Note: all begin again).
    """

    def __init__(self, devices: Sequence[Hashable]) -> None:
        self._devices = devices
        self._batons = [threading.Semaphore(0) for _ in devices]
        self._running = [True] * len(devices)
        self._error: BaseException | None = None
        self.on_again: Callable[[], None] = lambda: None
        # Which begin the calls are to be at, which is the last that all have come to, and at which each is.
        self._begin = self._common_begin = 0
        self._begun = [0] * len(devices)

    def run(self, calls: Sequence[Callable[[], Any]], workers: Workers) -> list[Any]:
        """Run all calls, the first on this thread, and return their results.

        Raises:
            BaseException: what the first call that failed has raised; the others have ended.
        """
        context = contextvars.copy_context()
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        with workers.borrowed(self._devices[1:]) as threads:
            futures = []
            for number, (thread, call) in enumerate(zip(threads, calls[1:], strict=True), 1):
                one = self._in_turn(number, call, modes)
                try:
                    futures.append(thread.submit(lambda one=one: context.copy().run(one)))
                except BaseException as error:  # The system gives no thread.
                    self._error = error
                    self._running[number:] = [False] * (len(calls) - number)
                    break
            results = [self._one(0, calls[0])]
            results += [future.result() for future in futures]
        if self._error is None:
            return results
        try:
            raise self._error
        finally:
            self._error = None  # It has the frames of all calls, and these have the relay: a circle would keep tensors.

    def _in_turn(self, me: int, call: Callable[[], Any], modes: tuple[bool, bool]) -> Callable[[], Any]:
        def run() -> Any:
            self._batons[me].acquire()
            with torch.inference_mode(modes[0]), torch.set_grad_enabled(modes[1]):
                return self._one(me, call)

        return run

    def _one(self, me: int, call: Callable[[], Any]) -> Any:
        """Run a call that has the baton, and hand that on at its end. What it raises is kept for :meth:`run`."""
        try:
            while self._error is None:
                with suppress(BegunAgainError):
                    return call()
                self._come_to_begin(me)  # Out here: the error, which is gone now, has kept what was computed.
            return None
        except BaseException as error:  # An interrupt is no ``Exception``.
            if self._error is None:
                self._error = error
            return None
        finally:
            self._running[me] = False
            if (following := self._next(me)) is not None:
                self._batons[following].release()

    def _next(self, me: int) -> int | None:
        """The number of the call that the baton goes to; None if no other is left."""
        count = len(self._running)
        others = ((me + place) % count for place in range(1, count))
        return next((other for other in others if self._running[other]), None)

    def begin_again(self, me: int) -> None:
        """Wait until all other calls have begun again, since this one does, in its middle.

        Raises:
            HeldUpError: they cannot: another has ended, or has failed. Or this has come to pass too often.
            BegunAgainError: another has begun again meanwhile.
        """
        if self._begun[me] == self._begin:
            if self._begin == MOST_BEGINS * len(self._running):
                raise HeldUpError("devices have begun the step again too often")
            self._begin += 1
        self._reach(me)

    def _come_to_begin(self, me: int) -> None:
        """As :meth:`begin_again`, for a call that another has ended; it waits here, however often others begin."""
        while True:
            try:
                return self._reach(me)
            except BegunAgainError:
                continue

    def _reach(self, me: int) -> None:
        self._begun[me] = self._begin
        if all(begun == self._begin for begun in self._begun):
            self.on_again()
            self._common_begin = self._begin
        self.until(me, self._have_all_begun)

    def _have_all_begun(self) -> bool:
        if self._common_begin != self._begin and not all(self._running):
            raise HeldUpError("a device has begun the step again when another had ended")
        return self._common_begin == self._begin

    def until(self, me: int, there: Callable[[], bool]) -> None:
        """Let the others run until what they bring is ``there``.

        Raises:
            HeldUpError: another call has failed, or no other brings it.
            BegunAgainError: another call has begun again. What is raised in its place ends the run.
        """
        for _ in range(len(self._running)):
            if self._error is not None:
                raise HeldUpError("another device has failed")
            if self._begun[me] != self._begin:
                raise BegunAgainError
            if there():
                return
            following = self._next(me)
            if following is None:
                break
            self._batons[following].release()
            self._batons[me].acquire()
        if self._error is not None:
            raise HeldUpError("another device has failed")
        if not there():
            raise HeldUpError("the devices do not run the same blocks, so one waits for tokens that no other computes")
