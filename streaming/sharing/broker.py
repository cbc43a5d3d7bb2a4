"""The holder: keeps the descriptors of shared copies for the workers of one host. It never maps a byte of them.

It trusts nothing that it is told. Who asks is the kernel's word (``SO_PEERCRED``), a copy's size and that it is whole
are the kernel's too (pages.py), and everything has a limit. Packets are answered one after another, on one thread. A
worker that says something wrong, or does not take its answers, loses its connection and with it all that it holds; what
it has mapped stays.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
from dataclasses import dataclass

from ..errors import SharingError
from .descriptors import raise_descriptors
from .ledger import Answer, Kind, Ledger, Limits
from .messages import Ask, Request, check_folder, check_peer, pack_answer, parse_address, receive_request, send
from .messages import unpack_request as read_request
from .pages import find_fault, why_not_here

logger = logging.getLogger(__name__)

MOST_WORKERS = 256
# Descriptors of this process that are no copies: connections, and what it has open itself.
OTHER_DESCRIPTORS = MOST_WORKERS + 64


@dataclass(frozen=True)
class _Worker:
    number: int
    process: int
    connection: socket.socket


class Broker:
    """Answers the workers of one host, from :meth:`run` to :meth:`stop`.

    Args:
        address: ``@name`` is an abstract socket of Linux; else a path, in a folder that only this user can enter.
        nbytes: of all copies together, at most; None takes the machine's RAM.

    Raises:
        SharingError: this system has no such memory, or the address cannot be used.
    """

    def __init__(self, address: str, nbytes: int | None = None) -> None:
        if (reason := why_not_here()) is not None:
            raise SharingError(reason)
        self.address = address
        self._path = parse_address(address)
        self._listener = _listen(self._path)
        copies = raise_descriptors(Limits.copies + OTHER_DESCRIPTORS) - OTHER_DESCRIPTORS
        ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limits = Limits(ram if nbytes is None else nbytes, max(1, min(Limits.copies, copies)))
        self._ledger = Ledger(limits, os.close)
        self._workers: dict[int, _Worker] = {}
        self._joined = 0
        self._stopping, self._stopper = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._stopping, selectors.EVENT_READ)

    def run(self) -> None:
        """Answer until :meth:`stop` is called, on another thread or in a signal's handler."""
        try:
            while not self._answer_all():
                pass
        finally:
            self._end()

    def stop(self) -> None:
        """Have :meth:`run` return. What workers have mapped stays theirs."""
        with contextlib.suppress(OSError):  # It has ended.
            self._stopper.send(b"\0")

    def _answer_all(self) -> bool:
        """Answer who has asked by now; returns whether to stop."""
        for key, _ in self._selector.select():
            if key.fileobj is self._stopping:
                return True
            if key.fileobj is self._listener:
                self._accept()
            elif key.fd in self._workers:
                self._answer(self._workers[key.fd])
        return False

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # It has gone again, or no descriptor is left.
            logger.warning("a worker could not be let in: %s", error)
            return
        try:
            process = check_peer(connection)
            if len(self._workers) >= MOST_WORKERS:
                raise SharingError(f"there are {MOST_WORKERS} workers already")
        except (SharingError, OSError) as error:
            logger.warning("a worker was turned away: %s", error)
            connection.close()
            return
        connection.setblocking(False)
        self._joined += 1
        self._workers[connection.fileno()] = _Worker(self._joined, process, connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _answer(self, worker: _Worker) -> None:
        """Answer one packet of ``worker``, or let it go."""
        try:
            data, descriptor = receive_request(worker.connection)
            answer = self._answer_to(worker, data, descriptor)
            if answer is not None:
                send(worker.connection, pack_answer(answer), answer.descriptor)
        except BlockingIOError:
            """There was nothing after all; a worker that does not take its answers is let go below."""
            if not _has_room(worker.connection):
                self._let_go(worker)
        except (SharingError, OSError) as error:
            if not isinstance(error, _EndedError):
                logger.warning("worker %d is let go: %s", worker.process, error)
            self._let_go(worker)

    def _answer_to(self, worker: _Worker, data: bytes, descriptor: int | None) -> Answer | None:
        if not data:
            raise _EndedError("it has ended")
        try:
            request = read_request(data)
            if request.ask is Ask.GIVE:
                given, descriptor = descriptor, None
                return self._take(worker, request, given)
            return self._carry_out(worker, request)
        finally:
            if descriptor is not None:
                os.close(descriptor)  # Nobody has asked for one.

    def _take(self, worker: _Worker, request: Request, descriptor: int | None) -> Answer:
        if descriptor is None:
            raise SharingError("it gives a copy without a descriptor")
        if (fault := find_fault(descriptor, request.nbytes)) is not None:
            os.close(descriptor)
            self._ledger.stop_building(worker.number, request.key)
            return Answer(Kind.REFUSED, reason=f"the copy is not taken: {fault}")
        return self._ledger.give(worker.number, request.key, request.nbytes, descriptor)

    def _carry_out(self, worker: _Worker, request: Request) -> Answer | None:
        ledger = self._ledger
        match request.ask:
            case Ask.WANT:
                return ledger.want(worker.number, request.key, request.nbytes)
            case Ask.WANT_WITHIN:
                return ledger.want(worker.number, request.key, request.nbytes, within=True)
            case Ask.IS_WHOLE:
                return Answer(Kind.DONE, int(request.key in ledger.copies))
            case Ask.MOVES:
                return Answer(Kind.DONE, ledger.moves)
            case Ask.STATUS:
                return self._status(worker)
            case Ask.DROP:
                ledger.drop(worker.number, request.key)
            case Ask.STOP_BUILDING:
                ledger.stop_building(worker.number, request.key)
        return None

    def _status(self, worker: _Worker) -> Answer:
        workers = [
            {"process": each.process, "copies": copies, "bytes": nbytes}
            for each in self._workers.values()
            if each is not worker
            for copies, nbytes in [self._ledger.held_by(each.number)]
        ]
        copies, building = len(self._ledger.copies), len(self._ledger.building)
        found = {"copies": copies, "bytes": self._ledger.nbytes, "building": building, "workers": workers}
        return Answer(Kind.DONE, reason=json.dumps(found))

    def _let_go(self, worker: _Worker) -> None:
        self._selector.unregister(worker.connection)
        del self._workers[worker.connection.fileno()]
        worker.connection.close()
        self._ledger.leave(worker.number)

    def _end(self) -> None:
        for worker in list(self._workers.values()):
            self._let_go(worker)
        self._ledger.clear()
        self._selector.close()
        for each in (self._listener, self._stopping, self._stopper):
            each.close()
        if not self._path.startswith("\0"):
            with contextlib.suppress(OSError):
                os.unlink(self._path)


class _EndedError(SharingError):
    """A worker has closed its connection, or died."""


def _has_room(connection: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_WRITE)
        return bool(selector.select(0))


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        if not path.startswith("\0"):
            check_folder(path)
            _remove_dead(path)
        listener.bind(path)
        listener.listen(MOST_WORKERS)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        shown = path.replace("\0", "@")
        raise SharingError(f"{shown} cannot be listened at: {error.strerror}") from None
    except SharingError:
        listener.close()
        raise
    return listener


def _remove_dead(path: str) -> None:
    """Remove the socket of a broker that is gone; one that lives makes binding fail."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as trial:
        try:
            trial.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            return


def serve(address: str) -> None:
    """Run a broker until this process is told to end (SIGTERM or SIGINT); for a process of its own.

    Raises:
        SharingError: it cannot listen there.
    """
    import signal

    broker = Broker(address)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: broker.stop())
    broker.run()
