"""What workers and the broker send each other: one packet for each request, and one for its answer.

A request has a letter, a key and a number of bytes; an answer a letter, a number and, in words, why something is
refused. A descriptor comes beside them where one is needed. Both sides ask the kernel who the other one is, and talk to
processes of their own user only.
"""

from __future__ import annotations

import os
import socket
import struct
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from ..errors import SharingError
from .ledger import Answer, Kind

KEY_BYTES = 32
_REQUEST = struct.Struct(f"!c{KEY_BYTES}sQ")
_ANSWER = struct.Struct("!cQ")
_MOST_ANSWER_BYTES = 64 * 1024
# sockaddr_un has 108 bytes, the last of which ends a path.
MOST_ADDRESS_BYTES = 107


class Ask(bytes, Enum):
    """A request. DROP and STOP_BUILDING are not answered.

    WANT is for a copy of exactly so many bytes, WANT_WITHIN for one of at most so many.
    """

    WANT = b"W"
    WANT_WITHIN = b"M"
    GIVE = b"G"
    DROP = b"D"
    STOP_BUILDING = b"U"
    IS_WHOLE = b"A"
    MOVES = b"N"
    STATUS = b"S"


class Request(NamedTuple):
    """What a worker asks, about the copy with this key, of this size."""

    ask: Ask
    key: bytes = bytes(KEY_BYTES)
    nbytes: int = 0

    def packed(self) -> bytes:
        return _REQUEST.pack(self.ask.value, self.key, self.nbytes)


def unpack_request(data: bytes) -> Request:
    """Read a request.

    Raises:
        SharingError: it is none.
    """
    try:
        letter, key, nbytes = _REQUEST.unpack(data)
        return Request(Ask(letter), key, nbytes)
    except (struct.error, ValueError):
        raise SharingError("a request is not understood") from None


def pack_answer(answer: Answer) -> bytes:
    return _ANSWER.pack(answer.kind.value, answer.value) + answer.reason.encode()[: _MOST_ANSWER_BYTES // 2]


def receive(connection: socket.socket, nbytes: int = _MOST_ANSWER_BYTES) -> tuple[bytes, int | None]:
    """Receive a packet, empty at the connection's end, and the descriptor beside it, if there is one."""
    data, descriptors, *_ = socket.recv_fds(connection, nbytes, 1, socket.MSG_CMSG_CLOEXEC)
    return data, descriptors[0] if descriptors else None


def receive_request(connection: socket.socket) -> tuple[bytes, int | None]:
    return receive(connection, _REQUEST.size + 1)


def unpack_answer(data: bytes, descriptor: int | None) -> Answer:
    """Read an answer.

    Raises:
        SharingError: it is none.
    """
    try:
        letter, value = _ANSWER.unpack(data[: _ANSWER.size])
        return Answer(Kind(letter), value, descriptor, data[_ANSWER.size :].decode())
    except (struct.error, ValueError):
        raise SharingError("the broker's answer is not understood") from None


def send(connection: socket.socket, data: bytes, descriptor: int | None = None) -> None:
    if descriptor is None:
        connection.send(data)
    else:
        socket.send_fds(connection, [data], [descriptor])


def parse_address(text: str) -> str:
    """Return the socket's address as the system has it: ``@name`` is an abstract one of Linux, all else a path.

    Raises:
        SharingError: it is too long, or nothing.
    """
    address = "\0" + text[1:] if text.startswith("@") else text
    if not address.strip("\0"):
        raise SharingError("the address of the broker is empty")
    if len(os.fsencode(address)) > MOST_ADDRESS_BYTES:
        raise SharingError(f"the address {text} is longer than the {MOST_ADDRESS_BYTES} bytes of a socket's")
    return address


def check_folder(path: str) -> None:
    """Raise a :class:`SharingError` unless only this user can put anything into the folder of a socket."""
    folder = Path(path).absolute().parent
    try:
        found = folder.stat()
    except OSError as error:
        raise SharingError(f"{folder} cannot be used: {error.strerror}") from None
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise SharingError(f"{folder} must belong to this user, and to nobody else (mode 0700)")


def check_peer(connection: socket.socket) -> int:
    """Return the number of the process on the other side, which must be of this user.

    Raises:
        SharingError: it is another user's.
    """
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process, user, _ = struct.unpack("3i", credentials)
    if user != os.geteuid():
        raise SharingError(f"the process on the other side is of user {user}")
    return process
