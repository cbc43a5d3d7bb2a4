"""Which block of a model runs on which of several devices. Pure.

[Note: runs or turns]
Where each device can hold what it is given, nothing streams, and blocks are given out in runs: the fewest boundaries.
Where one cannot, blocks take turns, so that while one device computes the others fill their slots, and all links work
all the time. What each is given then follows from the step: a device streams what it cannot hold over its own link, so
shares are such that all links need the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .config import format_bytes
from .errors import ConfigError


@dataclass(frozen=True)
class DeviceRoom:
    """What a device has for a model's blocks.

    Attributes:
        nbytes: for weights of blocks.
        bandwidth: bytes per second from host memory.
    """

    nbytes: float
    bandwidth: float = 1.0


@dataclass(frozen=True)
class Assignment:
    """Devices of blocks.

    Attributes:
        devices: for each block the number of its device.
        runs: whether blocks of one device follow each other (Note: runs or turns).
    """

    devices: tuple[int, ...]
    runs: bool

    def blocks_of(self, device: int) -> list[int]:
        return [block for block, where in enumerate(self.devices) if where == device]


def assign(
    block_bytes: Sequence[int], rooms: Sequence[DeviceRoom], shares: Sequence[float] | None = None
) -> Assignment:
    """Give out blocks.

    Args:
        block_bytes: sizes of the blocks, in their order.
        rooms: of the devices.
        shares: of each device in the bytes of all blocks, in any unit; None has them follow from ``rooms``.

    Raises:
        ConfigError: shares are not one positive number for each device.
    """
    total = sum(block_bytes)
    fits = sum(room.nbytes for room in rooms) >= total
    wanted = _bytes_by_room(total, rooms, fits) if shares is None else _bytes_by_share(total, rooms, shares)
    if runs := _in_runs(block_bytes, wanted):
        given = [0] * len(rooms)
        for size, device in zip(block_bytes, runs, strict=True):
            given[device] += size
        if all(nbytes <= room.nbytes for nbytes, room in zip(given, rooms, strict=True)):
            return Assignment(runs, True)
    return Assignment(_in_turn(block_bytes, wanted), len(rooms) == 1)


@dataclass(frozen=True)
class Distribution:
    """Blocks on those devices that can take some.

    Attributes:
        devices: numbers of the devices that take part, the home first.
        assignment: of blocks to positions in ``devices``.
        left_out: why the others do not take part, by their numbers.
    """

    devices: tuple[int, ...]
    assignment: Assignment
    left_out: dict[int, str]


def distribute(
    block_bytes: Sequence[int],
    rest_bytes: int,
    rooms: Sequence[DeviceRoom],
    shares: Sequence[float] | None = None,
) -> Distribution:
    """Give out blocks to the devices that have room for the largest, and leave those out that get none.

    Args:
        block_bytes: sizes of the blocks, in their order; at least one.
        rest_bytes: what is in no block, for the first device.
        rooms: of the devices, in the order of preference.
        shares: as for :func:`assign`.

    Raises:
        ConfigError: shares are not one positive number for each device.
    """
    if shares is not None:
        _bytes_by_share(1, rooms, shares)
    devices, left_out = list(range(len(rooms))), dict[int, str]()
    while len(devices) > 1:
        used = {device: rest_bytes if device == devices[0] else 0 for device in devices}
        full = [device for device in devices if rooms[device].nbytes < max(block_bytes) + used[device]]
        if len(full) == len(devices):
            devices = devices[:1]
            break
        if full:
            room = format_bytes(max(0, rooms[full[0]].nbytes))
            least = format_bytes(max(block_bytes) + used[full[0]])
            left_out[full[0]] = f"it has room for {room} of weights, and needs {least} at least"
            devices.remove(full[0])
            continue
        here = [replace(rooms[device], nbytes=rooms[device].nbytes - used[device]) for device in devices]
        assignment = assign(block_bytes, here, shares and [shares[device] for device in devices])
        idle = [device for place, device in enumerate(devices) if not assignment.blocks_of(place)]
        if not idle:
            return Distribution(tuple(devices), assignment, left_out)
        left_out[idle[0]] = "no block is left for it"
        devices.remove(idle[0])
    return Distribution(tuple(devices), Assignment((0,) * len(block_bytes), True), left_out)


def _bytes_by_room(total: int, rooms: Sequence[DeviceRoom], fits: bool) -> list[float]:
    """In proportion to what each can hold, or, where that is not enough, so that all links need the same time."""
    held = sum(room.nbytes for room in rooms)
    if fits:
        return [total * room.nbytes / held for room in rooms]
    seconds = (total - held) / sum(room.bandwidth for room in rooms)
    return [room.nbytes + seconds * room.bandwidth for room in rooms]


def _bytes_by_share(total: int, rooms: Sequence[DeviceRoom], shares: Sequence[float]) -> list[float]:
    if len(shares) != len(rooms) or min(shares, default=0) <= 0:
        said = ", ".join(f"{share:g}" for share in shares)
        raise ConfigError(f"a share larger than 0 is needed for each of {len(rooms)} devices, and these are: {said}")
    return [total * share / sum(shares) for share in shares]


def _in_runs(block_bytes: Sequence[int], wanted: Sequence[float]) -> tuple[int, ...]:
    """Runs that come nearest to what is wanted: a block belongs where its middle falls."""
    ends = [sum(wanted[: number + 1]) for number in range(len(wanted))]
    devices, before = [], 0
    for size in block_bytes:
        middle = before + size / 2
        devices.append(next((number for number, end in enumerate(ends) if middle <= end), len(wanted) - 1))
        before += size
    return tuple(devices)


def _in_turn(block_bytes: Sequence[int], wanted: Sequence[float]) -> tuple[int, ...]:
    """Each block to the device that lags most behind its share so far; of equals to the first."""
    given = [0.0] * len(wanted)
    total, before, devices = sum(wanted), 0, []
    for size in block_bytes:
        before += size
        lag = [before * share / total - nbytes for share, nbytes in zip(wanted, given, strict=True)]
        device = lag.index(max(lag))
        given[device] += size
        devices.append(device)
    return tuple(devices)


def describe(assignment: Assignment, names: Sequence[str], block_bytes: Sequence[int]) -> str:
    """The assignment in words, for people."""
    parts = []
    for device, name in enumerate(names):
        blocks = assignment.blocks_of(device)
        held = format_bytes(sum(block_bytes[block] for block in blocks))
        where = f" ({blocks[0]} to {blocks[-1]})" if assignment.runs and len(blocks) > 1 else ""
        parts.append(f"{len(blocks)} blocks{where} of {held} on {name}")
    return ("in runs: " if assignment.runs else "in turn: ") + ", ".join(parts)
