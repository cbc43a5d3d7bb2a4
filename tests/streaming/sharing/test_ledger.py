"""Who holds and who builds, in all orders in which workers ask, and with deaths at every point. Memory is the kernel's.

Workers here are programs that are run one step at a time. After each step everything that must hold is looked at.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from share_workers import LINUX, memory_files
from weightstream.streaming.sharing.ledger import Answer, Kind, Ledger, Limits
from weightstream.streaming.sharing.pages import Draft, find_fault

pytestmark = LINUX

SIZE = 2 * mmap.PAGESIZE
ROOM = Limits(1 << 30)
KEY, OTHER = b"a" * 32, b"b" * 32


def content(key: bytes) -> bytes:
    return key[:1] * SIZE


class Host:
    """A ledger, and what must hold of it.

    Attributes:
        mapped: descriptors that workers have, as if mapped, and of which copy.
        seen: what requests were answered so far.
    """

    def __init__(self, limits: Limits = ROOM) -> None:
        self.ledger = Ledger(limits, os.close)
        self.mapped: dict[int, list[tuple[bytes, int]]] = {}
        self.drafts: dict[int, list[Draft]] = {}
        self.seen: set[Kind] = set()
        self.dead: set[int] = set()

    def die(self, worker: int) -> None:
        """As the kernel and the broker do it: descriptors are closed, the connection ends."""
        self.dead.add(worker)
        for draft in self.drafts.pop(worker, []):
            draft.close()
        for _, descriptor in self.mapped.pop(worker, []):
            os.close(descriptor)
        self.ledger.leave(worker)

    def ask(self, worker: int, key: bytes) -> Answer:
        answer = self.ledger.want(worker, key, SIZE)
        self.seen.add(answer.kind)
        if answer.kind is Kind.HAVE:
            self.mapped.setdefault(worker, []).append((key, os.dup(answer.descriptor)))
        return answer

    def use(self, worker: int, keys: list[bytes]) -> Iterator[None]:
        """The program of a worker: it takes or builds each of these copies, looks at them, and lets them go. For what
        others build it asks once more."""
        held = []
        wanted = list(keys)
        for key in wanted:
            answer = self.ask(worker, key)
            yield
            if answer.kind is Kind.LATER and len(wanted) < 2 * len(keys):
                wanted.append(key)
            if answer.kind is Kind.HAVE:
                held.append(key)
            elif answer.kind is Kind.BUILD:
                draft = Draft(SIZE)
                self.drafts.setdefault(worker, []).append(draft)
                draft.write(memoryview(content(key)[: SIZE // 2]), 0)
                yield
                draft.write(memoryview(content(key)[SIZE // 2 :]), SIZE // 2)
                yield
                descriptor = draft.seal()
                assert find_fault(descriptor, SIZE) is None
                self.drafts[worker].remove(draft)
                self.mapped.setdefault(worker, []).append((key, descriptor))
                assert self.ledger.give(worker, key, SIZE, os.dup(descriptor)).kind is Kind.DONE
                held.append(key)
                yield
        for key in held:
            _, descriptor = self.mapped[worker].pop(0)
            os.close(descriptor)
            self.ledger.drop(worker, key)
            yield

    def check(self) -> None:
        """What holds after every step, whoever has done what."""
        ledger = self.ledger
        assert not ledger.copies.keys() & ledger.building.keys(), "whole and being built at once"
        for key, copy in ledger.copies.items():
            assert copy.holds.total() > 0, "nobody holds it"
            assert not self.dead & (+copy.holds).keys(), "a dead worker holds it"
            assert os.pread(copy.descriptor, SIZE + 1, 0) == content(key), "it is not whole"
            held = Counter(worker for worker, mine in self.mapped.items() for one, _ in mine if one == key)
            assert held == +copy.holds
        assert all(build.worker not in self.dead for build in ledger.building.values()), "a dead worker builds it"
        for mine in self.mapped.values():
            for key, descriptor in mine:
                assert os.pread(descriptor, SIZE + 1, 0) == content(key), "a worker sees what is not whole"
        assert memory_files() == len(ledger.copies) + len(open_in(self)), "memory is kept for nobody"


Program = Callable[[Host], Iterator[None]]


def open_in(host: Host) -> list[object]:
    """Descriptors of workers."""
    return [*itertools.chain(*host.mapped.values()), *itertools.chain(*host.drafts.values())]


def run(programs: list[Program], prefix: list[int] | random.Random, deaths: int) -> tuple[list[int], list[int]]:
    """One run; a choice is the worker that goes on, or, from ``len(programs)`` on, the one that dies.

    Choices behind ``prefix`` are the first ones; instead of it they may be random. Returns the choices, and how many
    there were at each of them.
    """
    host, count = Host(), len(programs)
    going = {number: program(host) for number, program in enumerate(programs)}
    choices: list[int] = []
    options: list[int] = []
    while going:
        open_choices = [*going, *(count + number for number in going if len(host.dead) < deaths)]
        if isinstance(prefix, random.Random):
            chosen = prefix.randrange(len(open_choices))
        else:
            chosen = prefix[len(choices)] if len(choices) < len(prefix) else 0
        choices.append(chosen)
        options.append(len(open_choices))
        number = open_choices[chosen] % count
        if open_choices[chosen] >= count:
            host.die(number)
            del going[number]
        elif next(going[number], going) is going:
            del going[number]
        host.check()
    assert not host.ledger.copies
    assert not host.ledger.building
    assert memory_files() == 0
    SEEN.update(host.seen)
    return choices, options


SEEN: set[Kind] = set()


def all_orders(programs: list[Program], deaths: int) -> int:
    """Run them in all orders; returns how many these were."""
    prefix: list[int] | None = []
    runs = 0
    while prefix is not None:
        choices, options = run(programs, prefix, deaths)
        runs += 1
        while choices and choices[-1] == options[len(choices) - 1] - 1:
            choices.pop()
        prefix = [*choices[:-1], choices[-1] + 1] if choices else None
    return runs


def user(worker: int, *keys: bytes) -> Program:
    return lambda host: host.use(worker, list(keys))


@pytest.mark.slow
def test_two_workers_in_all_orders_with_a_death_at_every_point() -> None:
    SEEN.clear()
    assert all_orders([user(0, KEY), user(1, KEY)], deaths=2) > 1_000
    assert {Kind.HAVE, Kind.BUILD, Kind.LATER} == SEEN


def test_three_workers_and_two_copies_in_random_orders() -> None:
    """In all orders there would be millions."""
    SEEN.clear()
    programs = [user(0, KEY, OTHER), user(1, OTHER, KEY), user(2, KEY)]
    for seed in range(200):
        run(programs, random.Random(seed), deaths=seed % 3)
    assert {Kind.HAVE, Kind.BUILD, Kind.LATER} == SEEN


def test_what_is_sealed_cannot_be_written_by_any_way() -> None:
    draft = Draft(SIZE)
    draft.write(memoryview(content(KEY)), 0)
    with pytest.raises(AssertionError):
        assert find_fault(draft._descriptor, SIZE) is None, "it can still be written to"
    reading = draft.seal()
    ways: list[Callable[[int], object]] = [
        lambda descriptor: os.pwrite(descriptor, b"x", 0),
        lambda descriptor: os.ftruncate(descriptor, 1),
        lambda descriptor: os.posix_fallocate(descriptor, 0, 2 * SIZE),
        lambda descriptor: mmap.mmap(descriptor, SIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_WRITE),
    ]
    writing = os.open(f"/proc/self/fd/{reading}", os.O_RDWR)  # Whoever has a descriptor can open it again like this.
    for descriptor, way in itertools.product((reading, writing), ways):
        with pytest.raises(OSError, match=r"permitted|denied|Bad file|Invalid"):
            way(descriptor)
        assert os.pread(reading, SIZE + 1, 0) == content(KEY)
    private = mmap.mmap(writing, SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    private[:1] = b"x"
    assert os.pread(reading, SIZE, 0) == content(KEY), "a private page is its process's own"
    private.close()
    for descriptor in (reading, writing):
        os.close(descriptor)


def test_each_limit_refuses_with_its_reason() -> None:
    closed: list[int] = []
    ledger = Ledger(Limits(nbytes=100, copies=3, building=2), closed.append)
    keys = [bytes([number]) * 32 for number in range(5)]
    assert ledger.want(1, keys[0], 0).reason == "a copy has at least one byte"
    assert ledger.want(1, keys[0], 101).reason == "shared copies may have 100 bytes in all"
    assert ledger.want(1, keys[0], 40).kind is Kind.BUILD
    assert ledger.want(1, keys[1], 40).kind is Kind.BUILD
    assert ledger.want(1, keys[2], 1).reason == "a worker may build 2 copies at once"
    assert ledger.want(2, keys[2], 21).reason == "shared copies may have 100 bytes in all"
    assert ledger.want(2, keys[2], 20).kind is Kind.BUILD
    assert ledger.want(2, keys[3], 1).kind is Kind.REFUSED
    ledger.stop_building(2, keys[2])
    assert ledger.give(1, keys[0], 40, 7).kind is Kind.DONE
    assert ledger.want(2, keys[0], 41).reason == "the copy there has 40 bytes instead of 41"
    assert ledger.give(2, keys[1], 40, 8).kind is Kind.REFUSED, "another builds it"
    assert ledger.give(1, keys[1], 39, 9).kind is Kind.REFUSED, "it was to have another size"
    assert ledger.give(1, keys[4], 39, 10).kind is Kind.REFUSED, "nobody builds it"
    assert closed == [8, 9, 10]
    for key in keys[2:4]:
        assert ledger.want(2, key, 1).kind is (Kind.BUILD if key == keys[2] else Kind.REFUSED)
    assert ledger.want(3, keys[3], 1).reason == "there may be 3 shared copies"


def test_a_copy_of_which_only_the_most_is_known_has_the_size_with_which_it_is_given() -> None:
    closed: list[int] = []
    ledger = Ledger(Limits(nbytes=100), closed.append)
    assert ledger.want(1, KEY, 60, within=True).kind is Kind.BUILD
    assert ledger.want(2, KEY, 60, within=True).kind is Kind.LATER
    assert ledger.want(2, OTHER, 41, within=True).reason == "shared copies may have 100 bytes in all"
    for wrong in (61, 0):
        assert ledger.give(1, KEY, wrong, 7).kind is Kind.REFUSED
    assert ledger.give(1, KEY, 50, 8).kind is Kind.DONE
    assert ledger.nbytes == 50
    for nbytes in (50, 59):
        assert ledger.want(2, KEY, nbytes, within=True) == Answer(Kind.HAVE, 50, 8)
    assert ledger.want(2, KEY, 49, within=True) == Answer(Kind.REFUSED), "it finds out why when it builds its own"
    assert ledger.want(2, KEY, 51).reason == "the copy there has 50 bytes instead of 51"
    assert closed == [7, 7]


def test_what_is_said_twice_or_by_others_changes_nothing() -> None:
    closed: list[int] = []
    ledger = Ledger(ROOM, closed.append)
    ledger.want(1, KEY, 8)
    ledger.give(1, KEY, 8, 5)
    for worker in (2, 3):
        ledger.drop(worker, KEY)
        ledger.stop_building(worker, KEY)
        ledger.leave(worker)
    assert (closed, ledger.held_by(1), ledger.held_by(2)) == ([], (1, 8), (0, 0))
    ledger.want(1, KEY, 8)
    ledger.drop(1, KEY)
    assert closed == [], "it was held twice"
    ledger.drop(1, KEY)
    ledger.drop(1, KEY)
    ledger.leave(1)
    assert (closed, ledger.copies) == ([5], {})
    assert ledger.want(2, KEY, 8).kind is Kind.BUILD


@pytest.mark.parametrize("end", ["stop_building", "leave", "give", "drop"])
def test_what_makes_another_answer_possible_moves(end: str) -> None:
    """So that nobody asks in vain, and nobody forgets to ask."""
    ledger = Ledger(ROOM, lambda descriptor: None)
    ledger.want(1, KEY, 8)
    if end == "drop":
        ledger.give(1, KEY, 8, 5)
    before = ledger.moves
    ledger.want(2, OTHER, 8)
    assert ledger.moves == before
    arguments = {"leave": (1,), "give": (1, KEY, 8, 5)}.get(end, (1, KEY))
    getattr(ledger, end)(*arguments)
    assert ledger.moves == before + 1
