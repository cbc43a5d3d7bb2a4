"""Tensors of which each device has the rows of its own tokens, put together on every device.

[Note: whose copy waits for what]
A device posts its rows and, once the others have posted theirs, copies these into a tensor of its own:
 1. a copy out of another device's rows waits for the event that was recorded there when they were posted, and for
    nothing that was queued there later (``passing_on``): the other device may be a block ahead by then;
 2. it waits for what its own device has queued so far, because the memory of the new tensor may have been something
    else's, whose kernels may still be under way;
 3. compute waits for the copy before it reads the tensor;
 4. where rows go through the host, all copies between two devices use the same page-locked memory, one after another;
 5. posted rows stay alive until every other device has queued its copy of them, and their own device's compute then
    waits for these copies before the memory can be something else's: at its next post, or at the end.
Each wait has a test that fails without it (tests/streaming/parallel/test_exchange.py). Where the devices begin the
step again (relay.py, Note: all begin again), all of them are waited for, and all posts are dropped.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from ..devices.backend import Backend
from ..devices.copies import Event, Pair, aligned
from ..split.links import Links
from .relay import HeldUpError, Relay


@dataclass
class _Post:
    """Rows that one device has made.

    Attributes:
        label: which block they are of.
        tensors: with the rows of its own tokens.
        made: happens when they are whole.
        taken: for each other device that has queued its copy, the event after which it reads them no more.
    """

    label: Hashable
    tensors: tuple[torch.Tensor, ...]
    made: Event
    taken: dict[int, Event] = field(default_factory=dict)


class Wires:
    """What copies between these devices need, kept from step to step: torch has few streams.

    Args:
        backends: of the devices.
        links: copies between devices.
    """

    def __init__(self, backends: Sequence[Backend], links: Links) -> None:
        self.backends = backends
        self._links = links
        self._into = [backend.create_stream() for backend in backends]
        self._out = [backend.create_stream() for backend in backends]
        self._stages: dict[tuple[int, int], _Stage] = {}

    def copy(self, target: int, source: int, pairs: Sequence[Pair], made: Event, free: Event) -> tuple[Event, Event]:
        """Queue copies from one device to another.

        Args:
            target, source: numbers of the devices.
            pairs: memory there, and here.
            made: happens on the source when what is copied is whole.
            free: happens on the target when the memory there may be written to.

        Returns:
            When the source is read no more, and when all is there.
        """
        there, here = self.backends[target], self.backends[source]
        if not self._is_direct(target, source):
            return self._copy_by_host(target, source, pairs, made, free)
        with here.passing_on():
            done = there.copy_on(self._into[target], pairs, [made, free], timed=False)
        return done, done

    def _is_direct(self, target: int, source: int) -> bool:
        there, here = self.backends[target].device, self.backends[source].device
        return there.type != "cuda" or self._links.is_sound(here, there)

    def _copy_by_host(
        self, target: int, source: int, pairs: Sequence[Pair], made: Event, free: Event
    ) -> tuple[Event, Event]:
        """Through page-locked memory, the same for all copies between two devices: a host is many blocks ahead of its
        devices, and would otherwise page-lock memory for each of them."""
        there, here = self.backends[target], self.backends[source]
        rows = [each for _, each in pairs]
        stage = self._stages.setdefault((target, source), _Stage())
        staged = stage.like(rows)
        # Race: copies of the block before may still be on their way out of this memory.
        waits = [made] if stage.read is None else [made, stage.read]
        down = here.copy_on(self._out[source], list(zip(staged, rows, strict=True)), waits, timed=False)
        up = [(memory, each) for (memory, _), each in zip(pairs, staged, strict=True)]
        stage.read = there.copy_on(self._into[target], up, [down, free], timed=False)
        return down, stage.read


class _Stage:
    """Page-locked memory through which rows go from one device to another.

    Attributes:
        read: the event after which it may be written to again.
    """

    def __init__(self) -> None:
        self.read: Event | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)

    def like(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Memory for each of ``tensors``, with its strides as far as it has no gaps: else copies need room beside."""
        ends = list(accumulate(aligned(tensor.nbytes) for tensor in tensors))
        if self._memory.nbytes < ends[-1]:
            # torch keeps memory that is dropped until all copies out of it are done.
            with torch.inference_mode(False):
                self._memory = torch.empty(
                    ends[-1], dtype=torch.uint8, device="cpu", pin_memory=torch.cuda.is_available()
                )
            self.read = None
        found = []
        for tensor, begin in zip(tensors, [0, *ends], strict=False):
            strides = torch.empty_like(tensor, device="meta").stride()
            memory = self._memory[begin : begin + tensor.nbytes].view(tensor.dtype)
            found.append(memory.as_strided(tensor.shape, strides))
        return found


class Exchange:
    """What the devices give each other in one step.

    Args:
        wires: between them.
        relay: of the calls that run on them, by the same numbers.
    """

    def __init__(self, wires: Wires, relay: Relay) -> None:
        self._wires = wires
        self._relay = relay
        self._posts: list[list[_Post]] = [[] for _ in wires.backends]
        self._retired = [0] * len(wires.backends)
        relay.on_again = self._forget

    def begin_again(self, me: int) -> None:
        """A device begins the step again, and so do all others, before this returns.

        Raises:
            HeldUpError, BegunAgainError: as :meth:`Relay.begin_again` does.
        """
        self._relay.begin_again(me)

    def _forget(self) -> None:
        for backend in self._wires.backends:
            backend.synchronize()  # Race: copies of rows may be under way.
        for posts in self._posts:
            posts.clear()
        self._retired = [0] * len(self._posts)

    def gather(
        self,
        me: int,
        label: Hashable,
        tensors: Sequence[torch.Tensor],
        dim: int,
        lengths: Sequence[Sequence[int]],
    ) -> list[torch.Tensor]:
        """Put rows of all devices together. Every device calls this as often as the others, with the same labels.

        Args:
            me: the number of the device whose rows these are.
            label: which block this is for.
            tensors: along ``dim`` the rows of its own tokens, of one part of the sequence behind another.
            dim: the axis of tokens.
            lengths: for each part of the sequence the number of tokens of each device.

        Returns:
            For each tensor one with all tokens of the first part, then all of the second, and so on.

        Raises:
            HeldUpError: another device has failed, or does not exchange the same.
        """
        backend = self._wires.backends[me]
        self._retire(me)
        number = len(self._posts[me])
        self._posts[me].append(_Post(label, tuple(tensors), backend.mark()))
        self._relay.until(me, lambda: all(len(posts) > number for posts in self._posts))
        posts = [posts[number] for posts in self._posts]
        self._check(posts[me], posts, dim, lengths)
        whole = [_of_length(tensor, dim, sum(map(sum, lengths))) for tensor in tensors]
        free = backend.mark()  # Race: the new memory may still be in use as something else's.
        places = [_places(target, dim, lengths) for target in whole]
        for other, post in enumerate(posts):
            pairs = [
                pair
                for place, rows in zip(places, post.tensors, strict=True)
                for pair in zip(place[other], _parts(rows, dim, lengths, other), strict=True)
            ]
            if other == me:
                for target, source in pairs:
                    target.copy_(source)
                continue
            post.taken[me], done = self._wires.copy(me, other, pairs, post.made, free)
            backend.wait(done)  # Race: attention must not read rows that are not there yet.
        return whole

    def _check(self, mine: _Post, posts: Sequence[_Post], dim: int, lengths: Sequence[Sequence[int]]) -> None:
        """Raise :class:`HeldUpError` unless all devices have posted the rows of their own tokens of one block."""
        for number, post in enumerate(posts):
            expected = sum(part[number] for part in lengths)
            fits = [tensor.shape[dim] == expected for tensor in post.tensors]
            if post.label != mine.label or len(fits) != len(mine.tensors) or not all(fits):
                raise HeldUpError("the devices do not exchange tokens of the same block")

    def _retire(self, me: int) -> None:
        """Let go of posted rows that all others have queued copies of."""
        posts, others = self._posts[me], len(self._posts) - 1
        while self._retired[me] < len(posts) and len(posts[self._retired[me]].taken) == others:
            post = posts[self._retired[me]]
            for event in post.taken.values():
                self._wires.backends[me].wait(event)  # Race: the memory goes to something else.
            post.tensors = ()
            self._retired[me] += 1

    def finish(self, me: int) -> None:
        """The call of this device ends: wait until the others have queued their copies, and let go of all rows.

        Raises:
            HeldUpError: another device has failed, or goes on to exchange.
        """
        posts, others = self._posts[me], len(self._posts) - 1
        self._relay.until(me, lambda: all(len(post.taken) == others for post in posts))
        self._retire(me)


def _of_length(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """A tensor like this one with another number of rows."""
    shape = list(tensor.shape)
    shape[dim] = length
    with torch.inference_mode(False):  # A virtual device's threads fill it, in no mode.
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


def _places(whole: torch.Tensor, dim: int, lengths: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, ...]]:
    """For each device the places of its rows, one in each part of the sequence."""
    places = whole.split([count for part in lengths for count in part], dim)
    devices = len(lengths[0])
    return [places[device::devices] for device in range(devices)]


def _parts(rows: torch.Tensor, dim: int, lengths: Sequence[Sequence[int]], device: int) -> Sequence[torch.Tensor]:
    """The rows of one device, those of each part of the sequence by themselves."""
    return (rows,) if len(lengths) == 1 else rows.split([part[device] for part in lengths], dim)
