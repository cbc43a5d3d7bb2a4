"""Which block of a model runs on which of several devices. Pure.

[Note: runs or turns]
In runs, the blocks of a device follow each other: activations change devices as seldom as possible, but what a device
streams must arrive while it computes itself. In turns, activations change devices with nearly every block, and a link
can use the time in which other devices compute too. So runs suit little streaming, and turns much. The faster by
measured times is taken; before there are any, runs if each device streams no more than a quarter of its blocks.

[Note: how much each gets]
Devices compute one after another, but stream all at the same time, each over its own link what it cannot hold. So a
step takes as long as the compute of all, or as the slowest link. Where everything fits, the fastest devices hold what
they can, and devices of one speed the same part of their room. Where it does not, the shortest time is searched in
which the links can bring what is missing and the compute is done, with bytes given out in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..config import count_of, format_bytes
from ..errors import ConfigError

# A move of activations from one GPU to another. Those of FLUX at 1024^2, 28 MB, take 0.1 to 0.3 ms between two H200
# whose links copy weights, and 0.09 ms where the links are idle.
HOP_SECONDS = 0.0002

# The part of a device's blocks that arrives while it computes them all: FLUX's and Qwen-Image's blocks compute for 0.4
# of the time in which they are copied (an H200 at 55 GB/s), and GPUs with slower links mostly compute more slowly too.
SELDOM_LATE = 0.25

# In runs a link is idle for a part of a step, since a device streams into a small ring while others compute, and blocks
# of one kind, which follow each other, stream longer than they compute and those of another kind shorter. These are the
# part of a link's time that is used, and the part of a device's bytes that its ring takes (FLUX on 2 to 8 GPUs,
# simulated from a measured step: docs/design.md).
RUN_LINK_USE = 0.7
RUN_RING = 0.06

# Halvings of an interval of times: to less than a part in 2^40 of it.
BISECTIONS = 40


@dataclass(frozen=True)
class DeviceRoom:
    """What a device has for a model's blocks.

    Attributes:
        nbytes: bytes for weights of blocks.
        bandwidth: bytes per second from host memory.
        seconds_per_byte: compute of blocks. Equal for devices that are about as fast; 0 where it is not known.
    """

    nbytes: float
    bandwidth: float = 1.0
    seconds_per_byte: float = 0.0


@dataclass(frozen=True)
class Assignment:
    """Which device runs each block.

    Attributes:
        devices: for each block the number of its device.
        runs: whether blocks of one device follow each other (Note: runs or turns).
    """

    devices: tuple[int, ...]
    runs: bool

    def blocks_of(self, device: int) -> list[int]:
        return [block for block, where in enumerate(self.devices) if where == device]

    @property
    def hops(self) -> int:
        """How often activations go from one device to another in a step; they begin and end at the first."""
        stations = (0, *self.devices, 0)
        return sum(one != other for one, other in pairwise(stations))

    def bytes_of(self, block_bytes: Sequence[int], devices: int) -> list[int]:
        """Return the bytes of blocks on each of so many devices."""
        given = [0] * devices
        for size, device in zip(block_bytes, self.devices, strict=True):
            given[device] += size
        return given


def step_seconds(given: Sequence[float], rooms: Sequence[DeviceRoom]) -> float:
    """Return the least seconds of a step if devices are ``given`` so many bytes (Note: how much each gets)."""
    pairs = list(zip(given, rooms, strict=True))
    compute = sum(nbytes * room.seconds_per_byte for nbytes, room in pairs)
    return max(compute, *(max(0.0, nbytes - room.nbytes) / room.bandwidth for nbytes, room in pairs))


def assign(
    block_bytes: Sequence[int], rooms: Sequence[DeviceRoom], shares: Sequence[float] | None = None
) -> Assignment:
    """Assign blocks to devices.

    Args:
        block_bytes: sizes of the blocks, in their order.
        rooms: of the devices.
        shares: the share of each device in the bytes of all blocks, in any unit; None derives it from ``rooms``.

    Raises:
        ConfigError: shares are not one positive number for each device.
    """
    total = sum(block_bytes)
    wanted = _bytes_by_room(total, rooms) if shares is None else _bytes_by_share(total, rooms, shares)
    runs = Assignment(_in_runs(block_bytes, wanted), True)
    turns = Assignment(_in_turn(block_bytes, wanted), len(rooms) == 1)
    return runs if _are_runs_better(runs, turns, block_bytes, rooms) else turns


def _are_runs_better(
    runs: Assignment, turns: Assignment, block_bytes: Sequence[int], rooms: Sequence[DeviceRoom]
) -> bool:
    """Whether a step in runs takes no longer than one in turns (Note: runs or turns)."""
    given = runs.bytes_of(block_bytes, len(rooms))
    if not all(room.seconds_per_byte for room in rooms):
        missing = [(nbytes - room.nbytes, nbytes) for nbytes, room in zip(given, rooms, strict=True)]
        return all(streamed <= SELDOM_LATE * nbytes for streamed, nbytes in missing)
    alone = sum(_seconds_of_run(nbytes, room) for nbytes, room in zip(given, rooms, strict=True))
    together = step_seconds(turns.bytes_of(block_bytes, len(rooms)), rooms)
    return alone + runs.hops * HOP_SECONDS <= together + turns.hops * HOP_SECONDS


def _seconds_of_run(nbytes: float, room: DeviceRoom) -> float:
    """Return the seconds that a device takes for blocks that follow each other."""
    streamed = nbytes * (1 + RUN_RING) - room.nbytes if nbytes > room.nbytes else 0.0
    return max(nbytes * room.seconds_per_byte, streamed / (room.bandwidth * RUN_LINK_USE))


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
    home_is_first: bool = False,
) -> Distribution:
    """Assign blocks to the devices that have room for the largest one, and leave out the devices that get none.

    If no device has such room, the first one gets all blocks.

    Args:
        block_bytes: sizes of the blocks, in their order; at least one.
        rest_bytes: bytes outside of blocks, which the home holds.
        rooms: of the devices, in the order of preference.
        shares: as for :func:`assign`.
        home_is_first: the first device is the home even if it gets no block; else the first that gets some is.

    Raises:
        ConfigError: shares are not one positive number for each device.
    """
    if shares is not None:
        _bytes_by_share(1, rooms, shares)
    devices, left_out = list(range(len(rooms))), dict[int, str]()
    while devices:
        home = 0 if home_is_first else devices[0]
        left = {device: rooms[device].nbytes - (rest_bytes if device == home else 0) for device in devices}
        full = next((device for device in devices if left[device] < max(block_bytes)), None)
        if full is None:
            here = [replace(rooms[device], nbytes=left[device]) for device in devices]
            assignment = assign(block_bytes, here, shares and [shares[device] for device in devices])
            idle = [device for place, device in enumerate(devices) if not assignment.blocks_of(place)]
            if not idle:
                return Distribution(tuple(devices), assignment, left_out)
            left_out[idle[0]] = "no block is left for it"
            devices.remove(idle[0])
            continue
        room, least = (format_bytes(max(0, n)) for n in (left[full], max(block_bytes)))
        left_out[full] = f"it has room for {room} of blocks, and the largest takes {least}"
        devices.remove(full)
    left_out.pop(0)
    return Distribution((0,), Assignment((0,) * len(block_bytes), True), left_out)


def _bytes_by_room(total: int, rooms: Sequence[DeviceRoom]) -> list[float]:
    """Return the bytes for each device that make a step shortest (Note: how much each gets)."""
    held = [room.nbytes for room in rooms]
    if sum(held) >= total:
        return _fill(total, held, rooms)
    low, high = 0.0, max(total * max(1 / room.bandwidth, room.seconds_per_byte) for room in rooms)
    given = held
    for _ in range(BISECTIONS):
        seconds = (low + high) / 2
        most = [room.nbytes + seconds * room.bandwidth for room in rooms]
        if sum(most) >= total and step_seconds(found := _fill(total, most, rooms), rooms) <= seconds * (1 + 1e-9):
            high, given = seconds, found
        else:
            low = seconds
    return given


def _fill(total: float, most: Sequence[float], rooms: Sequence[DeviceRoom]) -> list[float]:
    """Divide ``total`` bytes: the fastest devices first, those of one speed in proportion to ``most`` of each."""
    given, left = [0.0] * len(rooms), float(total)
    for speed in sorted({room.seconds_per_byte for room in rooms}):
        group = [number for number, room in enumerate(rooms) if room.seconds_per_byte == speed]
        room = sum(most[number] for number in group)
        part = min(1.0, left / room) if room > 0 else 0.0
        for number in group:
            given[number] = most[number] * part
        left -= room * part
    return given


def _bytes_by_share(total: int, rooms: Sequence[DeviceRoom], shares: Sequence[float]) -> list[float]:
    if len(shares) != len(rooms) or min(shares, default=0) <= 0:
        said = ", ".join(f"{share:g}" for share in shares)
        raise ConfigError(f"a share larger than 0 is needed for each of {len(rooms)} devices, and these are: {said}")
    return [total * share / sum(shares) for share in shares]


def _in_runs(block_bytes: Sequence[int], wanted: Sequence[float]) -> tuple[int, ...]:
    """Return the runs nearest to the ``wanted`` bytes: a block goes to the device in whose part its middle falls."""
    ends = [sum(wanted[: number + 1]) for number in range(len(wanted))]
    devices, before = [], 0
    for size in block_bytes:
        middle = before + size / 2
        devices.append(next((number for number, end in enumerate(ends) if middle <= end), len(wanted) - 1))
        before += size
    return tuple(devices)


def _in_turn(block_bytes: Sequence[int], wanted: Sequence[float]) -> tuple[int, ...]:
    """Give each block to the device that lags most behind its share so far, the first of equals."""
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
    """Return the assignment in words, for people."""
    parts = []
    for device, name in enumerate(names):
        blocks = assignment.blocks_of(device)
        held = format_bytes(sum(block_bytes[block] for block in blocks))
        where = f" ({blocks[0]} to {blocks[-1]})" if assignment.runs and len(blocks) > 1 else ""
        parts.append(f"{count_of(len(blocks), 'block')}{where} of {held} on {name}")
    return ("in runs: " if assignment.runs else "in turn: ") + ", ".join(parts)
