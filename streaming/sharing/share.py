"""What a process shares with others of its host, or why it does not.

[Note: nobody waits]
Whoever lacks a copy asks for it once. If it is whole it is taken; if nobody has it, it is built and given; if another
builds it, the weights come from the file meanwhile, and it is asked for again when the broker has news. If the broker
is gone, or never was there, nothing more is asked: what is mapped stays, and all else is each process's own.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from ..errors import SharingError
from .ledger import Answer, Kind
from .link import Link
from .messages import Ask, Request
from .pages import why_not_here

logger = logging.getLogger(__name__)

# The address of the broker; without it nothing is shared.
SHARE_VARIABLE = "WEIGHTSTREAM_SHARE"


class NoShare:
    """Every copy is this process's own.

    Attributes:
        address: of the broker; empty where none was named.
        reason: why nothing is shared, or not all of it; empty where all is.
        built, taken: copies that this process has given to others, and taken from others, so far.
        is_local: whether all others are in this process (local.py): what is there takes nothing of its limits.
    """

    is_local = False

    def __init__(self) -> None:
        self.address = ""
        self.reason = ""
        self.built = 0
        self.taken = 0

    @property
    def is_on(self) -> bool:
        """Whether copies may be shared."""
        return False

    def try_out(self, attempt: Callable[[], str | None]) -> None:
        """Before the first copy: give sharing up if ``attempt`` returns a reason."""

    def want(self, key: bytes, nbytes: int, within: bool = False) -> Answer:
        """Ask for a copy: it is there (the descriptor is the caller's), or to be built, or others build it.

        Args:
            within: it may have less than ``nbytes``; the answer has how many there are.
        """
        return Answer(Kind.REFUSED)

    def give(self, key: bytes, nbytes: int, descriptor: int) -> bool:
        """Give a whole copy, which this process holds from now on; returns whether others can have it."""
        return False

    def drop(self, key: bytes) -> None:
        """End a hold. Waits for nobody."""

    def stop_building(self, key: bytes) -> None:
        """What was to be built is not. Waits for nobody."""

    def is_whole(self, key: bytes) -> bool:
        """Whether a copy is there."""
        return False

    def moves(self) -> int:
        """Return a number that changes when other copies are there, or may be built."""
        return 0

    def complain(self, reason: str) -> None:
        """Keep why something is not shared, and log it once."""

    def give_up(self, reason: str) -> None:
        """Share nothing from now on."""


NO_SHARE = NoShare()


class Share(NoShare):
    """Copies that are shared through the broker at ``address``. It is called when the first copy is wanted."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address
        self._link: Link | None = None
        self._over = False
        self._tried = False
        self._opening = threading.RLock()

    @property
    def is_on(self) -> bool:
        return self._open() is not None

    def _open(self) -> Link | None:
        with self._opening:
            if self._link is None and not self._over:
                try:
                    if (reason := why_not_here()) is not None:
                        raise SharingError(reason)
                    self._link = Link(self.address)
                except SharingError as error:
                    self.give_up(str(error))
            return self._link

    def try_out(self, attempt: Callable[[], str | None]) -> None:
        with self._opening:
            if not self._tried and self._open() is not None:
                self._tried = True
                if (reason := attempt()) is not None:
                    self.give_up(reason)

    def want(self, key: bytes, nbytes: int, within: bool = False) -> Answer:
        answer = self._ask(Request(Ask.WANT_WITHIN if within else Ask.WANT, key, nbytes))
        if answer.kind is Kind.REFUSED:
            self.complain(answer.reason)
        return answer

    def give(self, key: bytes, nbytes: int, descriptor: int) -> bool:
        answer = self._ask(Request(Ask.GIVE, key, nbytes), descriptor)
        if answer.kind is not Kind.DONE:
            self.complain(answer.reason)
        return answer.kind is Kind.DONE

    def drop(self, key: bytes) -> None:
        self._tell(Ask.DROP, key)

    def stop_building(self, key: bytes) -> None:
        self._tell(Ask.STOP_BUILDING, key)

    def is_whole(self, key: bytes) -> bool:
        return self._ask(Request(Ask.IS_WHOLE, key)).value == 1

    def moves(self) -> int:
        return self._ask(Request(Ask.MOVES)).value

    def give_up(self, reason: str) -> None:
        with self._opening:
            if self._over:
                return  # A thread that was asking meanwhile only sees that the connection is gone.
            link, self._link, self._over = self._link, None, True
            self.complain(reason)
        if link is not None:
            link.close()

    def _ask(self, request: Request, descriptor: int | None = None) -> Answer:
        link = self._open()
        if link is None:
            return Answer(Kind.REFUSED, reason=self.reason)
        try:
            return link.ask(request, descriptor)
        except SharingError as error:
            self.give_up(str(error))
            return Answer(Kind.REFUSED, reason=self.reason)

    def _tell(self, ask: Ask, key: bytes) -> None:
        link = self._link  # No lock: the garbage collector may call this.
        if link is not None:
            link.tell(ask, key)

    def complain(self, reason: str) -> None:
        if reason and reason != self.reason:
            self.reason = reason
            logger.warning("page-locked copies are this process's own, and not shared with others: %s", reason)


def share_of_environment() -> NoShare:
    """What the variable ``WEIGHTSTREAM_SHARE`` asks for."""
    address = os.environ.get(SHARE_VARIABLE, "")
    return Share(address) if address else NO_SHARE


def ask_status(address: str) -> dict[str, Any]:
    """Ask a broker what it holds: ``copies``, their ``bytes`` (each once), how many are ``building``, and ``workers``.

    Raises:
        SharingError: no broker answers.
    """
    if (reason := why_not_here()) is not None:
        raise SharingError(reason)
    link = Link(address)
    try:
        return json.loads(link.ask(Request(Ask.STATUS)).reason)
    finally:
        link.close()
