"""A worker's connection to the broker of its host.

Everything that a worker holds hangs on it: the kernel closes it with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import weakref
from collections import deque

from ..errors import SharingError
from .ledger import Answer
from .messages import Ask, Request, check_folder, check_peer, parse_address, receive, send, unpack_answer

# A broker answers in microseconds. One that was stopped must not keep workers from running.
ANSWER_SECONDS = 5.0


class Link:
    """A connection, for any thread.

    Args:
        address: of the broker.

    Raises:
        SharingError: nobody of this user listens there.
    """

    def __init__(self, address: str) -> None:
        path = parse_address(address)
        if not path.startswith("\0"):
            check_folder(path)
        self._asking = threading.Lock()
        self._unsent: deque[bytes] = deque()
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.settimeout(ANSWER_SECONDS)
        try:
            self._connection.connect(path)
            check_peer(self._connection)
            # For what is told without an answer, by threads that must not wait (``tell``).
            self._telling = socket.socket(fileno=os.dup(self._connection.fileno()))
        except OSError as error:
            self._connection.close()
            raise SharingError(f"no broker answers at {address} ({error.strerror or error})") from None
        except SharingError:
            self._connection.close()
            raise
        self._telling.setblocking(False)
        self._connection.settimeout(ANSWER_SECONDS)  # Both are one connection, which may wait or may not.
        self._close = weakref.finalize(self, _close_both, self._connection, self._telling)
        self._close.atexit = False
        _links.add(self)

    def ask(self, request: Request, descriptor: int | None = None) -> Answer:
        """Send a request, with a descriptor that stays the caller's, and return the answer.

        Raises:
            SharingError: there is no answer; nothing more is asked then, and nothing is held.
        """
        try:
            with self._asking:
                while self._unsent:
                    send(self._connection, self._unsent.popleft())
                send(self._connection, request.packed(), descriptor)
                data, came = receive(self._connection)
        except OSError as error:
            self.close()
            raise SharingError(f"the broker does not answer ({error.strerror or error})") from None
        if not data:
            self.close()
            raise SharingError("the broker has ended")
        return unpack_answer(data, came)

    def tell(self, ask: Ask, key: bytes) -> None:
        """Send what has no answer. It waits for nobody: the garbage collector may call this on any thread, also on one
        that is asking."""
        data = Request(ask, key).packed()
        try:
            self._telling.send(data)
        except BlockingIOError:
            self._unsent.append(data)  # The next request takes it along.
        except OSError:
            """The broker is gone, and with it whatever was held."""

    def close(self) -> None:
        """End everything that is held over it. What is mapped stays."""
        self._close()


def _close_both(*connections: socket.socket) -> None:
    for each in connections:
        with contextlib.suppress(OSError):
            each.close()


_links: weakref.WeakSet[Link] = weakref.WeakSet()


def _close_all() -> None:
    """A process that was forked off must not keep alive what its parent holds."""
    for link in list(_links):
        link.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)
