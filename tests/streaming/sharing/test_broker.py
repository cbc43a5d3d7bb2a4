"""The broker trusts nobody: what it is told is checked, what is too much is refused, and who is gone holds nothing."""

from __future__ import annotations

import os
import random
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from share_workers import LINUX, ROOT, an_address, brokered, memory_files, status_of, until
from weightstream.streaming import SharingError
from weightstream.streaming.sharing import broker as broker_file
from weightstream.streaming.sharing import link as link_file
from weightstream.streaming.sharing.broker import Broker
from weightstream.streaming.sharing.ledger import Kind
from weightstream.streaming.sharing.link import Link
from weightstream.streaming.sharing.messages import Ask, Request, parse_address
from weightstream.streaming.sharing.pages import PAGE_BYTES, Draft
from weightstream.streaming.sharing.share import Share, ask_status

pytestmark = LINUX

KEY = b"k" * 32


@pytest.fixture
def broker() -> Iterator[Broker]:
    with brokered() as broker:
        yield broker


@pytest.fixture
def links(broker: Broker) -> Iterator[list[Link]]:
    """Three workers' connections."""
    found = [Link(broker.address) for _ in range(3)]
    yield found
    for link in found:
        link.close()


def build(link: Link, key: bytes = KEY, nbytes: int = PAGE_BYTES) -> None:
    """Ask for a copy that nobody has, build it and give it."""
    assert link.ask(Request(Ask.WANT, key, nbytes)).kind is Kind.BUILD
    descriptor = sealed(key, nbytes)
    assert link.ask(Request(Ask.GIVE, key, nbytes), descriptor).kind is Kind.DONE
    os.close(descriptor)


def sealed(key: bytes, nbytes: int = PAGE_BYTES) -> int:
    draft = Draft(nbytes)
    draft.write(memoryview(key[:1] * nbytes), 0)
    return draft.seal()


def take(link: Link, key: bytes = KEY, nbytes: int = PAGE_BYTES) -> bytes:
    """Take a copy that is there; returns what is in it."""
    answer = link.ask(Request(Ask.WANT, key, nbytes))
    assert answer.kind is Kind.HAVE
    content = os.pread(answer.descriptor, nbytes + 1, 0)
    os.close(answer.descriptor)
    return content


def test_a_copy_goes_from_one_to_all_and_is_gone_with_the_last(broker: Broker, links: list[Link]) -> None:
    build(links[0])
    for link in links:
        assert take(link) == b"k" * PAGE_BYTES
    links[0].close()
    links[1].tell(Ask.DROP, KEY)
    until(lambda: [each["copies"] for each in status_of(broker)["workers"]] == [0, 1])
    assert memory_files() == 1
    links[2].close()
    until(lambda: status_of(broker)["copies"] == 0)
    assert memory_files() == 0


NOT_COPIES = ["unsealed", "half_sealed", "larger", "smaller", "file", "pipe"]


@pytest.mark.parametrize("kind", NOT_COPIES)
def test_what_is_no_whole_copy_is_refused(broker: Broker, links: list[Link], tmp_path: Path, kind: str) -> None:
    import fcntl

    opened = []
    if kind in ("larger", "smaller"):
        opened = [sealed(KEY, 2 * PAGE_BYTES if kind == "larger" else 100)]
    elif kind == "file":
        path = tmp_path / "a-file"
        path.write_bytes(bytes(PAGE_BYTES))
        opened = [os.open(path, os.O_RDONLY)]
    elif kind == "pipe":
        opened = list(os.pipe())
    else:
        opened = [os.memfd_create("weightstream", os.MFD_ALLOW_SEALING)]
        os.ftruncate(opened[0], PAGE_BYTES)
        if kind == "half_sealed":
            fcntl.fcntl(opened[0], 1033, 0x1 | 0x2 | 0x4)
    assert links[0].ask(Request(Ask.WANT, KEY, PAGE_BYTES)).kind is Kind.BUILD
    answer = links[0].ask(Request(Ask.GIVE, KEY, PAGE_BYTES), opened[0])
    assert answer.kind is Kind.REFUSED
    assert answer.reason.startswith("the copy is not taken: ")
    for descriptor in opened:
        os.close(descriptor)
    until(lambda: memory_files() == 0)
    build(links[1])
    assert take(links[2]) == b"k" * PAGE_BYTES


def test_who_has_not_been_asked_to_build_gives_nothing(broker: Broker, links: list[Link]) -> None:
    descriptor = sealed(KEY)
    assert links[0].ask(Request(Ask.GIVE, KEY, PAGE_BYTES), descriptor).kind is Kind.REFUSED
    assert links[0].ask(Request(Ask.WANT, KEY, PAGE_BYTES)).kind is Kind.BUILD
    assert links[1].ask(Request(Ask.WANT, KEY, PAGE_BYTES)).kind is Kind.LATER
    assert links[1].ask(Request(Ask.GIVE, KEY, PAGE_BYTES), descriptor).kind is Kind.REFUSED
    os.close(descriptor)
    assert status_of(broker)["copies"] == 0
    links[0].close()
    until(lambda: links[1].ask(Request(Ask.WANT, KEY, PAGE_BYTES)).kind is Kind.BUILD)


GARBAGE = [b"x", b"W" + KEY, b"?" * 41, b"W" + KEY + bytes(9), b"G" + KEY + struct.pack("!Q", PAGE_BYTES), b"z" * 9000]


@pytest.mark.parametrize("packet", GARBAGE, ids=range(len(GARBAGE)))
def test_a_worker_that_says_something_wrong_is_let_go_and_others_stay(
    broker: Broker, links: list[Link], packet: bytes
) -> None:
    build(links[1])
    take(links[0])
    links[0]._connection.send(packet)
    assert links[0]._connection.recv(100) == b""
    until(lambda: len(status_of(broker)["workers"]) == 2)
    assert take(links[2]) == b"k" * PAGE_BYTES


def test_descriptors_that_nobody_asked_for_are_closed(broker: Broker, links: list[Link]) -> None:
    descriptors = [sealed(KEY) for _ in range(3)]
    for count in (1, 3):
        packet = Request(Ask.WANT, KEY, PAGE_BYTES).packed()
        socket.send_fds(links[0]._connection, [packet], descriptors[:count])
        links[0]._connection.recv(100)
    for descriptor in descriptors:
        os.close(descriptor)
    until(lambda: memory_files() == 0)


def test_sizes_that_are_told_are_limited() -> None:
    with brokered(nbytes=2 * PAGE_BYTES) as broker:
        link = Link(broker.address)
        for nbytes in (0, 3 * PAGE_BYTES, 1 << 63):
            assert link.ask(Request(Ask.WANT, KEY, nbytes)).kind is Kind.REFUSED
        build(link, KEY, 2 * PAGE_BYTES)
        assert (
            link.ask(Request(Ask.WANT, b"o" * 32, 1)).reason == f"shared copies may have {2 * PAGE_BYTES} bytes in all"
        )
        link.close()


def test_there_are_so_many_workers_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_file, "MOST_WORKERS", 2)
    with brokered() as broker:
        first, second, third = (Link(broker.address) for _ in range(3))
        build(first)
        assert take(second)
        with pytest.raises(SharingError, match="the broker"):
            third.ask(Request(Ask.STATUS))
        first.close()
        until(lambda: _may_ask(broker))
        second.close()


def _may_ask(broker: Broker) -> bool:
    try:
        return bool(ask_status(broker.address))
    except SharingError:
        return False


def test_another_user_is_turned_away_on_both_sides(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """An abstract address has no owner, so anybody may listen there or ask."""
    link = Link(broker.address)
    assert link.ask(Request(Ask.MOVES)).kind is Kind.DONE
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(SharingError, match=f"the process on the other side is of user {mine}"):
        Link(broker.address)
    other = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    other.connect(parse_address(broker.address))
    assert other.recv(100) == b"", "the broker has closed it"
    other.close()
    monkeypatch.undo()
    assert link.ask(Request(Ask.MOVES)).kind is Kind.DONE
    link.close()


def test_a_path_is_used_only_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "share"
    folder.mkdir(mode=0o700)
    address = str(folder / "socket")
    for mode in (0o755, 0o770, 0o701):
        folder.chmod(mode)
        for use in (Broker, Link):
            with pytest.raises(SharingError, match="mode 0700"):
                use(address)
    folder.chmod(0o700)
    with pytest.raises(SharingError, match="no broker answers at"):
        Link(address)
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    dead.bind(address)
    dead.close()
    broker = Broker(address)
    with pytest.raises(SharingError, match="cannot be listened at"):
        Broker(address)
    thread = threading.Thread(target=broker.run)
    thread.start()
    link = Link(address)
    build(link)
    link.close()
    broker.stop()
    thread.join()
    assert not os.path.exists(address)
    broker.stop()


@pytest.mark.parametrize("address", ["", "@", "/" + "x" * 120, "@" + "x" * 120])
def test_an_address_that_cannot_be_is_refused(address: str) -> None:
    for use in (Broker, Link):
        with pytest.raises(SharingError, match="address"):
            use(address)


def test_a_broker_that_was_stopped_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_file, "ANSWER_SECONDS", 0.05)
    broker = Broker(an_address())  # It listens, and never answers.
    share = Share(broker.address)
    assert share.want(KEY, PAGE_BYTES).kind is Kind.REFUSED
    assert "does not answer" in share.reason
    assert not share.is_on
    broker.stop()
    broker.run()


def test_what_is_told_by_the_collector_waits_for_nobody(broker: Broker) -> None:
    link = Link(broker.address)
    build(link)
    with link._asking:  # A thread is in the middle of a question.
        for _ in range(20_000):
            link.tell(Ask.STOP_BUILDING, KEY)
        link.tell(Ask.DROP, KEY)
    link.ask(Request(Ask.MOVES))
    until(lambda: status_of(broker)["copies"] == 0)
    link.close()


def test_a_child_keeps_nothing_alive(broker: Broker) -> None:
    """A process that was forked off has the parent's descriptors."""
    link = Link(broker.address)
    build(link)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    link.close()
    until(lambda: status_of(broker)["copies"] == 0)
    os.close(writing)
    os.waitpid(child, 0)
    os.close(reading)


@pytest.mark.slow
def test_takes_gives_and_deaths_in_random_orders(broker: Broker) -> None:
    """200 sequences, with a model of what must hold after each step."""
    for seed in range(200):
        rng = random.Random(seed)
        links: list[Link] = []
        builders: dict[bytes, Link] = {}
        holds: dict[bytes, Counter[Link]] = {}
        for _ in range(rng.randrange(5, 25)):
            step = rng.choice(["join", "want", "want", "give", "drop", "stop", "die"])
            key = rng.choice([b"a", b"b", b"c"]) * 32
            if step == "join" or not links:
                links.append(Link(broker.address))
                continue
            link = rng.choice(links)
            if step == "want":
                answer = link.ask(Request(Ask.WANT, key, PAGE_BYTES))
                expected = Kind.HAVE if holds.get(key) else Kind.LATER if key in builders else Kind.BUILD
                assert answer.kind is expected, f"seed {seed}"
                if answer.kind is Kind.HAVE:
                    assert os.pread(answer.descriptor, PAGE_BYTES + 1, 0) == key[:1] * PAGE_BYTES
                    os.close(answer.descriptor)
                    holds[key][link] += 1
                elif answer.kind is Kind.BUILD:
                    builders[key] = link
            elif step == "give":
                descriptor = sealed(key)
                answer = link.ask(Request(Ask.GIVE, key, PAGE_BYTES), descriptor)
                os.close(descriptor)
                assert (answer.kind is Kind.DONE) == (builders.get(key) is link), f"seed {seed}"
                if answer.kind is Kind.DONE:
                    holds[key] = Counter({builders.pop(key): 1})
            elif step == "drop":
                link.tell(Ask.DROP, key)
                if holds.get(key, Counter())[link]:
                    holds[key] -= Counter({link: 1})
            elif step == "stop":
                link.tell(Ask.STOP_BUILDING, key)
                builders = {one: by for one, by in builders.items() if (one, by) != (key, link)}
            else:
                links.remove(link)
                link.close()
                builders = {one: by for one, by in builders.items() if by is not link}
                holds = {one: Counter({by: n for by, n in of.items() if by is not link}) for one, of in holds.items()}
            # What was told, and what has ended, is seen before the next step.
            whole, building = sum(map(bool, holds.values())), len(builders)
            until(partial(_counts, broker, whole, building))
            assert memory_files() == whole, f"seed {seed}"
        for link in links:
            link.close()
        until(lambda: memory_files() == 0)


def _counts(broker: Broker, whole: int, building: int) -> bool:
    found = status_of(broker)
    return (found["copies"], found["building"]) == (whole, building)


CLIENT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from streaming.sharing.link import Link
from streaming.sharing.messages import Ask, Request
from streaming.sharing.pages import Draft
link, key, kept = Link(sys.argv[2]), b"k" * 32, []
for line in sys.stdin:
    command = line.strip()
    if command == "want":
        answer = link.ask(Request(Ask.WANT, key, 1 << 26))
        kept.append(answer.descriptor)
        print(answer.kind.name, flush=True)
    elif command == "half":
        draft = Draft(1 << 26)
        draft.write(memoryview(bytes(1 << 25)), 0)
        print("half", flush=True)
    elif command == "give":
        draft.write(memoryview(bytes(1 << 25)), 1 << 25)
        kept.append(draft.seal())
        print(link.ask(Request(Ask.GIVE, key, 1 << 26), kept[-1]).kind.name, flush=True)
"""


class Client:
    """A light process that asks as workers do, for a copy of 64 MiB."""

    def __init__(self, address: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(ROOT), address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, command: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def shared_memory() -> int:
    """The kernel's count of shared memory, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Shmem:"))


@pytest.mark.slow
def test_a_process_of_its_own_keeps_copies_until_the_last_user_is_killed() -> None:
    """``python -m streaming share``, and kill -9 of a builder half-way, of a user, and of the last one."""
    address = an_address()
    broker = subprocess.Popen([sys.executable, "-m", "streaming", "share", address], cwd=ROOT)
    until(lambda: _answers(address))
    clients = [Client(address) for _ in range(3)]
    assert clients[0].ask("want") == "BUILD"
    assert clients[0].ask("half") == "half"
    assert clients[1].ask("want") == "LATER"
    clients[0].kill()
    until(lambda: ask_status(address)["building"] == 0)
    assert memory_files(broker.pid) == 0
    assert clients[1].ask("want") == "BUILD", "it is nobody's, and the next one builds anew"
    assert [clients[1].ask(command) for command in ("half", "give")] == ["half", "DONE"]
    assert clients[2].ask("want") == "HAVE"
    assert ask_status(address)["bytes"] == 1 << 26
    clients[1].kill()
    until(lambda: len(ask_status(address)["workers"]) == 1)
    assert memory_files(broker.pid) == 1
    before = shared_memory()
    clients[2].kill()
    until(lambda: ask_status(address)["copies"] == 0)
    assert memory_files(broker.pid) == 0
    until(lambda: shared_memory() <= before - (1 << 25))
    broker.send_signal(signal.SIGTERM)
    assert broker.wait(60) == 0


def _answers(address: str) -> bool:
    try:
        return bool(ask_status(address))
    except SharingError:
        return False


def test_the_command_says_why_it_cannot(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRWXU | stat.S_IRGRP)
    command = [sys.executable, "-m", "streaming", "share", str(tmp_path / "socket")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "mode 0700" in ended.stderr
