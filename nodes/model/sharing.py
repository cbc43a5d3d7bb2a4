"""Moves blocks of a MODEL to other devices, if that is necessary or faster.

[Note: when shares change]
Another assignment costs a load: no device keeps what it has. So the gain must be large, and the assignment must have
seemed better when a sampler began, twice in a row: memory that is in use now may be free soon. Measured times and
bandwidths count as soon as there are some. A device without room for the least that streams there loses its blocks at
once, also in the middle of a prompt, and the step runs again, as long as there is another device. If it is the home, it
keeps what is in no block. Such a device gets blocks again as any other would.

All blocks of a model are at home for as long as they must run where other nodes' tensors are
(``Boundary.out_of_reach``), or some of them have come to share tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import TypeVar

import comfy.model_management as mm
import torch

from ...streaming import BlockSet, Streamer
from ...streaming.split.assignment import Assignment, DeviceRoom, step_seconds
from ..tell import messages
from ..tell.notices import keep_notice, withdraw_notice
from .shares import links_of, room_on
from .streamed_patcher import StreamedPatcher

logger = logging.getLogger(__name__)

# Another assignment must make a step shorter by this fraction, this many times in a row.
GAIN = 0.15
TIMES = 2
# Devices whose times differ by a smaller fraction count as equally fast.
LIKE = 0.1

T = TypeVar("T")


class PartFullError(Exception):
    """A device has no room for the least that its part of a model needs.

    Attributes:
        part: the patcher of that part.
    """

    def __init__(self, part: StreamedPatcher) -> None:
        super().__init__(f"{part.streamer.backend.name} has no room for its part of {part.streamed.name}")
        self.part = part


def take_up(patcher: StreamedPatcher, blocks: BlockSet) -> None:
    """Take over ``blocks``, into which the model was cut anew. If there are as many as before, they stay on their
    devices, unless some share tensors now."""
    shares = patcher.streamed.shares
    shares.cut(blocks)
    if shares.tied:
        home = patcher.streamer.backend.name
        text = (
            f"all blocks run on {home}: {shares.tied[0]} shares weights with another block, since somebody has "
            "changed the model"
        )
        shares.assignment = shares.best(_rooms_at_home(patcher, text))
    elif len(blocks.blocks) != len(shares.assignment.devices):
        shares.assignment = shares.best(_rooms(patcher))


def run(patcher: StreamedPatcher, step: Callable[[], T]) -> T:
    """Run a step of the MODEL that is loaded. Before it, and after a failure for want of room, blocks may move."""
    shares = patcher.streamed.shares
    boundary = patcher.streamed.boundary
    due, shares.due = shares.due, False
    if blocks := boundary.out_of_reach():
        _have_at_home(patcher, blocks[0])
    elif due and not shares.tied:
        _reconsider(patcher)
    full: list[StreamedPatcher] = []
    while True:
        try:
            return step()
        except PartFullError as error:
            full.append(error.part)
        except Exception as error:
            found = (one for one in (patcher, *patcher.parts) if one not in full and one.streamer.blocks.blocks)
            broken = [one for one in found if one.streamer.backend.is_named(error, boundary.broke_on)]
            full += broken[:1]
            if not broken or len(full) > len(patcher.parts) or shares.tied:
                raise
        finally:
            boundary.settle()  # An interrupt is no Exception, so torch runs no hooks for it.
        # Not inside of "except": the error's frames would keep the activations of the failed step alive.
        _leave_out(patcher, full)


def _reconsider(patcher: StreamedPatcher) -> None:
    """In the first step after a load by the host, see if another assignment is better (Note: when shares change)."""
    shares = patcher.streamed.shares
    rooms = _rooms(patcher)
    better = shares.best(rooms)
    # If the user has set the shares, or all blocks had to be at home, what counts is that more devices take part.
    wished = shares.wanted is not None or shares.had_at_home
    wished = wished and len(set(better.devices)) > len(set(shares.assignment.devices))
    home = replace(rooms[0], nbytes=max(0.0, rooms[0].nbytes - shares.blocks.rest.nbytes))
    now, then = (
        step_seconds(assignment.bytes_of(shares.sizes, len(rooms)), [home, *rooms[1:]])
        for assignment in (shares.assignment, better)
    )
    shares.advised = shares.advised + 1 if wished or now - then > GAIN * now else 0
    if shares.advised >= TIMES:
        if shares.had_at_home:
            shares.had_at_home = False
            withdraw_notice(patcher.streamed.title, patcher.node_id)
            text = "nothing keeps its blocks on one device any more"
        else:
            text = "memory or speed of its devices has changed"
        messages.announce(patcher.streamed.name, text, patcher.node_id)
        _carry_out(patcher, better, rooms)


def _have_at_home(patcher: StreamedPatcher, stranger: torch.nn.Module) -> None:
    """Move all blocks to the MODEL's own device, because of what is in ``stranger``, one of them."""
    shares = patcher.streamed.shares
    if not any(shares.assignment.devices):
        return
    name = next(block.name for block in shares.blocks.blocks if block.module is stranger)
    home = patcher.streamer.backend.name
    text = (
        f"all blocks run on {home}: the model is compiled, and {name} holds functions of another node, whose "
        f"tensors are there. Without compiling, or without that node, they run on all devices"
    )
    rooms = _rooms_at_home(patcher, text)
    _carry_out(patcher, shares.best(rooms), rooms)


def _rooms_at_home(patcher: StreamedPatcher, text: str) -> list[DeviceRoom]:
    """Announce, by ``text``, that all blocks are on the MODEL's own device from now on. Returns the rooms for that: 0
    bytes on other devices."""
    shares = patcher.streamed.shares
    messages.announce(patcher.streamed.name, text, patcher.node_id)
    keep_notice("fallback", patcher.streamed.title, text, patcher.node_id, patcher.streamed)
    shares.had_at_home = True
    pairs = zip([patcher, *patcher.parts], _rooms(patcher), strict=True)
    return [room if one is patcher else DeviceRoom(0.0) for one, room in pairs]


def _leave_out(patcher: StreamedPatcher, full: Sequence[StreamedPatcher]) -> None:
    shares = patcher.streamed.shares
    patcher.streamer.counters.reruns += 1
    everybody = [patcher, *patcher.parts]
    pairs = zip(everybody, _rooms(patcher), strict=True)
    rooms = [DeviceRoom(0.0) if one in full else room for one, room in pairs]
    text = f"{full[-1].streamer.backend.name} is full, so its blocks go to the other devices"
    messages.announce(patcher.streamed.name, text, patcher.node_id)
    _carry_out(patcher, shares.best(rooms), rooms)


def _carry_out(patcher: StreamedPatcher, assignment: Assignment, rooms: Sequence[DeviceRoom]) -> None:
    """Move the blocks to where ``assignment`` has them, and load them with the patches of ``patcher``."""
    shares = patcher.streamed.shares
    patcher.unpatch_hooks()
    patcher.follow()  # Takes along what blocks have written to their buffers.
    shares.assignment, shares.advised = assignment, 0
    everybody = [patcher, *patcher.parts]
    for number, one in enumerate(everybody):
        one.streamer.take_blocks(shares.part(number))
        one.size = one.model_size()
    patcher.streamed.place_blocks([one.load_device for one in everybody])
    for one, room in zip(everybody, rooms, strict=True):
        one.load(one.load_device, _made_room(one, room.nbytes))
    shares.due = False
    text = shares.describe([one.streamer.backend for one in everybody])
    messages.announce(patcher.streamed.name, text, patcher.node_id)


def _rooms(patcher: StreamedPatcher) -> list[DeviceRoom]:
    """The room that the devices have now, with the speeds of them and of their links once all were measured."""
    streamers = patcher.streamers
    backends = [streamer.backend for streamer in streamers]
    measured = [streamer.profile.measured for streamer in streamers if streamer.blocks.blocks]
    # What a CPU takes says nothing about a GPU.
    if all(measured) and not any(backend.is_virtual for backend in backends):
        times, links = _times(streamers), [streamer.profile.bandwidth for streamer in streamers]
    else:
        times, links = [0.0] * len(streamers), links_of(backends)
    return [
        DeviceRoom(room_on(backend, patcher.settings), link, time)
        for backend, link, time in zip(backends, links, times, strict=True)
    ]


def _made_room(patcher: StreamedPatcher, nbytes: float) -> float:
    """Have the host free other models that this prompt does not need. Returns how many of ``nbytes`` there are then."""
    if patcher.streamer.backend.is_virtual or not patcher.streamer.blocks.blocks:
        return nbytes
    needed = [loaded for loaded in mm.current_loaded_models if loaded.currently_used]
    reserve = mm.minimum_inference_memory()
    mm.free_memory(nbytes + reserve, patcher.load_device, keep_loaded=needed)
    return min(nbytes, max(0.0, mm.get_free_memory(patcher.load_device) - reserve))


def _times(streamers: Sequence[Streamer]) -> list[float]:
    """Seconds of compute for a byte of blocks on each device, by the kinds of blocks that it shares with the first.

    A device that shares none counts as equally fast.
    """
    kinds = [_seconds_by_kind(streamer) for streamer in streamers]
    ratios = []
    for found in kinds:
        common = [found[kind] / kinds[0][kind] for kind in found.keys() & kinds[0].keys()]
        ratio = median(common) if common else 1.0
        ratios.append(1.0 if abs(ratio - 1) < LIKE else ratio)
    seconds = sum(sum(streamer.profile.block_seconds) for streamer in streamers)
    weighted = sum(ratio * sum(streamer.outline.unit_bytes) for ratio, streamer in zip(ratios, streamers, strict=True))
    return [ratio * seconds / weighted for ratio in ratios]


def _seconds_by_kind(streamer: Streamer) -> dict[object, float]:
    """Seconds of compute of a block, by its class and size: blocks that agree in these take equally long."""
    blocks = zip(streamer.blocks.blocks, streamer.profile.block_seconds, strict=True)
    return {
        (type(block.module), tuple(unit.nbytes for unit in block.units)): seconds
        for block, seconds in blocks
        if seconds > 0
    }
