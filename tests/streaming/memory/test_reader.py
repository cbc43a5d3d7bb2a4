"""The reader keeps the order of copies, whatever fails in between, and a piece's bytes, however late its copy comes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from weightstream.streaming import CpuBackend, VirtualMemory
from weightstream.streaming.devices.copies import ALIGNMENT, Event, Pair
from weightstream.streaming.memory.arena import Arena
from weightstream.streaming.memory.reader import Reader
from weightstream.streaming.memory.transfer import Load, Move, Transfer, TransferAbandonedError
from weightstream.streaming.model.contents import ranges, read_range
from weightstream.streaming.model.layout import NamedTensor, make_layout

pytestmark = pytest.mark.usefixtures("watched")

CHUNK = ALIGNMENT


class Stored:
    """A source whose bytes are in memory: each read takes its time, and one from the byte ``bad`` on fails.

    Attributes:
        forgotten: begin and end of what was forgotten.
    """

    def __init__(self, content: bytes, seconds: float = 0.0, bad: int | None = None) -> None:
        self.content, self.seconds, self.bad = content, seconds, bad
        self.forgotten: list[tuple[int, int]] = []

    def read_into(self, target: memoryview, start: int = 0) -> None:
        time.sleep(self.seconds)
        if start == self.bad:
            raise OSError("the disk is gone")
        target[:] = self.content[start : start + len(target)]

    def forget(self, start: int, nbytes: int) -> None:
        self.forgotten.append((start, start + nbytes))


class OrderBackend(CpuBackend):
    """Knows the copies that it was given, and refuses one of them.

    Attributes:
        copies: address and bytes of each copy's target.
        bad: the address of a target that no copy is made to.
    """

    def __init__(self) -> None:
        super().__init__(VirtualMemory(10**9))
        self.copies: list[tuple[int, int]] = []
        self.bad: int | None = None

    def copy(self, pairs: Sequence[Pair], after: Event | None, fine: bool = False) -> Event:
        if self.bad in [target.data_ptr() for target, _ in pairs]:
            raise RuntimeError("the device is gone")
        self.copies += [(target.data_ptr(), target.nbytes) for target, _ in pairs]
        return super().copy(pairs, after, fine)

    def sent_to(self, target: torch.Tensor, nbytes: int) -> int:
        """Bytes of copies to the first ``nbytes`` of ``target``."""
        begin = target.data_ptr()
        return sum(size for start, size in list(self.copies) if begin <= start < begin + nbytes)


class LateBackend(OrderBackend):
    """Copies begin long after they were queued."""

    def _copy_now(self, stream, pairs: Sequence[Pair], waits: Sequence[Event]) -> Event:
        stream.submit(time.sleep, 0.001)
        return super()._copy_now(stream, pairs, waits)


class Asked:
    """A transfer, and what shall be where behind it.

    Attributes:
        sent: bytes of its copies when it was said to be queued.
    """

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target
        self.parts: list[Load | Move] = []
        self.expected: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.transfer: Transfer | None = None
        self.nbytes = 0
        self.sent: Future[int] = Future()

    def move(self, content: bytes, pinned: bool) -> None:
        source = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        place = self._place(len(content))
        self.parts.append(Move(source, place, pinned))
        self.expected.append((place, source))

    def load(self, contents: Sequence[bytes], seconds: float = 0.0, bad: int | None = None) -> None:
        """Tensors whose bytes are nowhere but in their sources."""
        sources = [Stored(content, seconds, bad) for content in contents]
        sizes = [len(content) for content in contents]
        layout = make_layout(
            NamedTensor(
                (f"{size}",), torch.zeros(size, dtype=torch.uint8), torch.uint8, (), lambda _, source=source: source
            )
            for size, source in zip(sizes, sources, strict=True)
        )
        place = self._place(layout.nbytes)
        self.parts.append(Load(layout, place))
        values = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
        self.expected += zip(layout.views(place), values, strict=True)

    def _place(self, nbytes: int) -> torch.Tensor:
        self.nbytes += nbytes
        return self.target[self.nbytes - nbytes : self.nbytes]

    def ask(self, reader: Reader, backend: OrderBackend, **options: bool) -> Asked:
        self.transfer = reader.transfer(self.parts, [backend.mark()], **options)
        # On the thread that says so, at that moment.
        self.transfer.queued.add_done_callback(
            lambda _: self.sent.set_result(backend.sent_to(self.target, self.nbytes))
        )
        return self

    def check(self, reader: Reader, backend: OrderBackend) -> None:
        """All of it arrives, and nothing was missing when it was said to be queued."""
        backend.wait(reader.wait(self.transfer, lambda: None))
        assert self.sent.result(10) == self.nbytes
        for place, value in self.expected:
            assert torch.equal(place, value)


@contextmanager
def opened(backend: OrderBackend, threads: int, chunks: int, copy_streams: int = 2) -> Iterator[Reader]:
    """A reader that is used once more after it was closed, and leaves nothing."""
    arena = Arena(backend)
    reader = Reader(backend, arena, threads, CHUNK, chunks)
    backend.open(copy_streams)
    assert reader.ring_bytes == 0
    try:
        yield reader
        for _ in range(2):
            assert reader.idle
            assert reader.sent_bytes == sum(nbytes for _, nbytes in backend.copies)
            assert 0 <= reader.step_seconds < 60
            reader.close()
            assert (reader.ring_bytes, arena.pinned_bytes, arena.pageable_bytes, arena.budget.used) == (0, 0, 0, 0)
            again = Asked(backend.allocate(2 * CHUNK))
            again.load([b"\7" * 2 * CHUNK])
            again.ask(reader, backend).check(reader, backend)
            assert reader.ring_bytes == arena.pinned_bytes == CHUNK * chunks
    finally:
        reader.close()
        backend.synchronize()
        backend.close()


def random_transfer(chance: random.Random, target: torch.Tensor) -> Asked:
    """Up to three pieces, or none."""
    asked = Asked(target)
    for left in range(chance.randrange(4), 0, -1):
        nbytes = chance.randrange((left - 1) * CHUNK, left * CHUNK) + 1
        content = chance.randbytes(nbytes)
        kind = chance.choice(["load", "tensors", "pinned", "pageable"])
        if kind == "load":
            asked.load([content], chance.choice([0, 0, 0.0003]))
        elif kind == "tensors":
            asked.load([chance.randbytes(chance.randrange(1, CHUNK)) for _ in range(left)], chance.choice([0, 0.0001]))
        else:
            asked.move(content, kind == "pinned")
        if chance.random() < 0.7:
            break
    if not asked.parts and chance.random() < 0.5:
        asked.load([])
    return asked


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_copies_are_queued_in_the_order_in_which_they_were_asked_for(threads: int, chunks: int) -> None:
    for seed in range(30):
        chance = random.Random(1000 * seed + 10 * threads + chunks)
        backend = OrderBackend()
        with opened(backend, threads, chunks, chance.randrange(3)) as reader:
            rooms = {background: backend.allocate(100 * CHUNK) for background in (False, True)}
            used = dict.fromkeys(rooms, 0)
            all_asked = []
            for _ in range(chance.randrange(1, 5)):
                background = chance.random() < 0.4
                asked = random_transfer(chance, rooms[background][used[background] :])
                used[background] += asked.nbytes
                all_asked.append(asked.ask(reader, backend, background=background, fine=chance.random() < 0.5))
            for asked in chance.sample(all_asked, len(all_asked)):
                asked.check(reader, backend)
            reader.flush()
            for background, room in rooms.items():
                begin, end = room.data_ptr(), room.data_ptr() + used[background]
                for start, nbytes in [copy for copy in backend.copies if begin <= copy[0] < end]:
                    assert start == begin, "a copy is out of turn"
                    begin += nbytes
                assert begin == end


# -- failures --------------------------------------------------------------------------------------------------------


def three_transfers(backend: OrderBackend, broken: int | None = None, bad: int | None = None) -> list[Asked]:
    """Of three pieces each; the read from byte ``bad`` on of one of them fails."""
    room = backend.allocate(9 * CHUNK)
    all_asked = [Asked(part) for part in room.split(3 * CHUNK)]
    for number, asked in enumerate(all_asked):
        asked.load([bytes([number + 1]) * 3 * CHUNK], 0.0002, bad if number == broken else None)
    return all_asked


@pytest.mark.parametrize("broken", ["read", "copy"])
@pytest.mark.parametrize(("threads", "chunks"), [(1, 1), (2, 2), (3, 2), (2, 3)])
def test_a_failure_stays_with_its_transfer(threads: int, chunks: int, broken: str) -> None:
    message = "the disk is gone" if broken == "read" else "the device is gone"
    for failing in range(9):
        backend = OrderBackend()
        number, bad = failing // 3, failing % 3 * CHUNK
        with opened(backend, threads, chunks, failing % 3) as reader:
            all_asked = three_transfers(backend, number if broken == "read" else None, bad)
            if broken == "copy":
                backend.bad = all_asked[number].target.data_ptr() + bad
            for asked in all_asked:
                asked.ask(reader, backend, background=failing % 2 == 1)
            with pytest.raises((OSError, RuntimeError), match=message):
                reader.wait(all_asked[number].transfer, lambda: None)
            with pytest.raises(TransferAbandonedError, match="a transfer has failed"):
                reader.wait(all_asked[number].transfer, lambda: None)
            assert all_asked[number].sent.result(10) <= bad, "nothing behind the failure is copied"
            for asked in all_asked[:number] + all_asked[number + 1 :]:
                asked.check(reader, backend)
            assert reader.idle


@pytest.mark.parametrize(("threads", "chunks"), [(1, 1), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("end", [Reader.abandon, Reader.close, Reader.flush])
def test_what_is_given_up_at_any_moment_is_whole_or_abandoned(
    threads: int, chunks: int, end: Callable[[Reader], None]
) -> None:
    outcomes = set()
    for seed in range(8):
        chance, backend = random.Random(seed), LateBackend()
        with opened(backend, threads, chunks) as reader:
            all_asked = three_transfers(backend)
            for asked in all_asked:
                asked.ask(reader, backend, background=chance.random() < 0.5)
            copies = chance.randrange(9)
            while len(backend.copies) < copies and end is not Reader.flush:
                time.sleep(0)
            end(reader)
            assert reader.idle
            count = len(backend.copies)
            for asked in all_asked:
                try:
                    asked.check(reader, backend)
                    outcomes.add("whole")
                except TransferAbandonedError:
                    outcomes.add("abandoned")
            assert len(backend.copies) == count, "nothing is copied behind the end"
    assert outcomes == ({"whole"} if end is Reader.flush else {"whole", "abandoned"})


def test_a_piece_that_is_read_while_somebody_gives_up_is_not_forgotten() -> None:
    """Its reader cannot queue it then, and goes on; who gives up looks after it."""
    backend = OrderBackend()
    with opened(backend, 1, 1) as reader, ThreadPoolExecutor() as pool:
        asked = Asked(backend.allocate(CHUNK))
        asked.load([bytes(CHUNK)], 0.05)
        asked.ask(reader, backend)
        with reader._counting:  # It stops who gives up in the middle.
            given_up = pool.submit(reader.abandon)
            while reader._in_order._first_ready() is None:
                time.sleep(0.001)
            time.sleep(0.02)
        given_up.result(10)
        with pytest.raises(TransferAbandonedError):
            asked.check(reader, backend)


def test_a_wait_that_is_cut_short_leaves_the_transfer_alone() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    backend = OrderBackend()
    with opened(backend, 1, 1) as reader:
        asked = Asked(backend.allocate(CHUNK))
        asked.load([bytes(CHUNK)], 0.2)
        asked.ask(reader, backend)
        with pytest.raises(KeyboardInterrupt):
            reader.wait(asked.transfer, stop)
        asked.check(reader, backend)


# -- chunks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy_streams", [1, 2])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_a_chunk_is_not_written_before_the_copy_out_of_it_is_over(threads: int, chunks: int, copy_streams: int) -> None:
    backend = LateBackend()
    with opened(backend, threads, chunks, copy_streams) as reader:
        room = backend.allocate(40 * CHUNK)
        all_asked = [Asked(part) for part in room.split(4 * CHUNK)]
        for number, asked in enumerate(all_asked):
            content = b"".join(bytes([4 * number + piece + 1]) * CHUNK for piece in range(4))
            asked.load([content]) if number % 2 else asked.move(content, pinned=False)
            asked.ask(reader, backend)
        for asked in all_asked:
            asked.check(reader, backend)


# -- what is read ----------------------------------------------------------------------------------------------------

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


def random_tensor(chance: random.Random, name: str) -> tuple[NamedTensor, torch.Tensor]:
    """A tensor as a model may hold it, and its values in the dtype in which it is bound."""
    shape = [chance.choice([0, 1, 2, 3, 5, 8, 17]) for _ in range(chance.randrange(5))]
    original = torch.randn(shape).to(chance.choice(FLOATS))
    dtype = chance.choice([original.dtype, *FLOATS])
    form = chance.choice(["plain", "plain", "plain", "permuted", "gaps", "expanded", "meta"])
    if form == "meta":
        return NamedTensor((name,), original.to("meta"), dtype, ()), torch.zeros(shape, dtype=dtype)
    if form == "permuted":
        original = original.permute(chance.sample(range(len(shape)), len(shape)))
    elif form == "gaps" and shape:
        original = torch.stack([original, original], -1)[..., chance.randrange(2)]
    elif form == "expanded":
        original = original.expand(3, *shape)
    expected = original.to(dtype)
    source = None
    if form == "plain" and chance.random() < 0.7:
        source = Stored(bits(original))
        original = torch.zeros_like(original)  # Its mapping, which nobody may touch.
    return NamedTensor((name,), original, dtype, (), lambda _: source), expected


def bits(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


def test_a_unit_is_the_same_whatever_ranges_it_is_read_in() -> None:
    for seed in range(400):
        chance = random.Random(seed)
        tensors = [random_tensor(chance, str(number)) for number in range(chance.randrange(7))]
        layout = make_layout(tensor for tensor, _ in tensors)
        whole = torch.full((layout.nbytes,), 0xA5, dtype=torch.uint8)
        pieces = whole.clone()
        read_range(layout, 0, layout.nbytes, whole)
        largest = chance.choice([0, 1, ALIGNMENT, ALIGNMENT + 1, 3 * ALIGNMENT, 1 << 20])
        spans = list(ranges(layout, largest))
        assert [start for start, _ in spans] + [layout.nbytes] == [0] + [stop for _, stop in spans] or not spans
        for start, stop in chance.sample(spans, len(spans)):
            assert stop - start <= max(largest, ALIGNMENT)
            read_range(layout, start, stop, pieces[start:stop], forget=True)
        assert torch.equal(pieces, whole)
        for spec, (_, expected) in zip(layout.specs, tensors, strict=True):
            assert bits(spec.view(pieces)) == bits(expected)
            pieces[spec.offset : spec.offset + spec.nbytes] = 0xA5
            if spec.source is not None:
                assert_tiles(sorted(spec.source.forgotten), len(spec.source.content))
        assert (pieces == 0xA5).all(), "what lies between tensors stays as it was"


def assert_tiles(spans: list[tuple[int, int]], nbytes: int) -> None:
    """The spans cover everything, once."""
    assert [0, *(stop for _, stop in spans)] == [*(start for start, _ in spans), nbytes]


def test_what_comes_in_the_background_does_not_count_for_steps() -> None:
    backend = OrderBackend()
    with opened(backend, threads=1, chunks=2) as reader:
        resident = Asked(backend.allocate(2 * CHUNK))
        resident.load([b"\1" * 2 * CHUNK])
        resident.ask(reader, backend, background=True).check(reader, backend)
        assert (reader.sent_bytes, reader.step_bytes, reader.step_seconds) == (2 * CHUNK, 0, 0.0)
        streamed = Asked(backend.allocate(3 * CHUNK))
        streamed.load([b"\2" * 3 * CHUNK])
        streamed.ask(reader, backend).check(reader, backend)
        assert (reader.sent_bytes, reader.step_bytes) == (5 * CHUNK, 3 * CHUNK)
        assert reader.step_seconds > 0
