from __future__ import annotations

import itertools

import pytest
from weightstream.streaming import ConfigError
from weightstream.streaming.split.assignment import (
    HOP_SECONDS,
    RUN_LINK_USE,
    RUN_RING,
    Assignment,
    DeviceRoom,
    _bytes_by_room,
    assign,
    describe,
    distribute,
    step_seconds,
)

GB = 10**9
FLUX = [680_000_000] * 19 + [283_000_000] * 38


def rooms(*gigabytes: float, bandwidths: tuple[float, ...] = ()) -> list[DeviceRoom]:
    return [
        DeviceRoom(size * GB, rate) for size, rate in zip(gigabytes, bandwidths or [1.0] * len(gigabytes), strict=True)
    ]


def given(found: Assignment, sizes: list[int], devices: int) -> list[float]:
    """Shares of the devices in all bytes."""
    return [sum(sizes[block] for block in found.blocks_of(device)) / sum(sizes) for device in range(devices)]


def changes(found: Assignment) -> int:
    return sum(one != other for one, other in zip(found.devices, found.devices[1:], strict=False))


@pytest.mark.parametrize("sizes", [(24, 24), (14, 14), (20, 10), (10, 20), (13, 7, 7), (7, 7, 7, 7)])
def test_what_fits_is_given_out_in_runs_by_room(sizes: tuple[float, ...]) -> None:
    found = assign(FLUX, rooms(*sizes))
    assert found.runs
    assert changes(found) == len(sizes) - 1
    assert list(found.devices) == sorted(found.devices)
    for share, size in zip(given(found, FLUX, len(sizes)), sizes, strict=True):
        assert share == pytest.approx(size / sum(sizes), abs=0.03)
        assert share * sum(FLUX) <= size * GB


@pytest.mark.parametrize("sizes", [(8, 8), (0, 0), (6, 2), (4, 4, 4), (0, 20)])
def test_what_does_not_fit_takes_turns_and_all_links_need_the_same_time(sizes: tuple[float, ...]) -> None:
    found = assign(FLUX, rooms(*sizes))
    assert not found.runs
    streamed = [
        share * sum(FLUX) - size * GB for share, size in zip(given(found, FLUX, len(sizes)), sizes, strict=True)
    ]
    assert max(streamed) - min(streamed) <= 680_000_000
    if min(sizes) == max(sizes):
        assert changes(found) >= 0.8 * (len(FLUX) - 1)


def test_little_is_streamed_in_runs_before_anything_is_measured() -> None:
    assert assign(FLUX, rooms(11, 11)).runs
    assert not assign(FLUX, rooms(8, 8)).runs
    assert not assign(FLUX, rooms(2, 20)).runs, "the first would stream most of what it has"


def test_by_measured_times_the_shorter_step_is_taken() -> None:
    total = sum(FLUX)
    for room in range(1, 12):
        for compute in (0.001, 0.007, 0.04):
            found = assign(FLUX, speeds((room, 50, compute), (room, 50, compute)))
            bus = (total / 2 - room * GB) / 50 / GB
            own = compute * total / 2 / GB
            ring = RUN_RING * total / 2 / 50 / GB
            in_runs = 2 * max(own, (bus + ring) / RUN_LINK_USE if bus > 0 else 0.0)
            in_turns = max(2 * own, bus)
            if abs(in_runs - in_turns) > 60 * HOP_SECONDS:
                assert found.runs is (in_runs < in_turns)
            elif in_runs <= in_turns:
                assert found.runs


@pytest.mark.parametrize(
    ("gpus", "gigabytes", "bandwidth", "runs"),
    [(2, 11, 55, True), (2, 8, 55, False), (3, 6, 53, False), (3, 11, 53, True), (4, 6, 41, True), (4, 4, 41, False)],
)
def test_flux_is_given_out_as_a_simulated_step_takes_less(
    gpus: int, gigabytes: float, bandwidth: float, runs: bool
) -> None:
    """docs/design.md, Several devices: FLUX at 1024^2 on H200."""
    assert assign(FLUX, speeds(*[(gigabytes, bandwidth, 0.177 * GB / sum(FLUX))] * gpus)).runs is runs


def test_activations_go_home_at_last() -> None:
    assert Assignment((0, 0, 1, 0, 1), False).hops == 4
    assert Assignment((1, 1), True).hops == 2
    assert Assignment((0, 0), True).hops == 0


def test_a_slow_link_gets_less() -> None:
    found = assign([100] * 60, rooms(0, 0, bandwidths=(2.0, 1.0)))
    assert given(found, [100] * 60, 2) == pytest.approx([2 / 3, 1 / 3], abs=0.01)
    longest = max(len(run) for run in "".join(map(str, found.devices)).split("1"))
    assert longest == 2, "turns are spread evenly"


@pytest.mark.parametrize(("shares", "room", "runs"), [((60, 40), 24, True), ((1, 1), 24, True), ((90, 10), 15, False)])
def test_shares_that_were_asked_for(shares: tuple[float, float], room: float, runs: bool) -> None:
    found = assign(FLUX, rooms(room, room), shares)
    assert found.runs is runs
    assert given(found, FLUX, 2) == pytest.approx([share / sum(shares) for share in shares], abs=0.03)


@pytest.mark.parametrize("shares", [(1,), (1, 2, 3), (0, 1), (1, -1), ()])
def test_shares_that_cannot_be(shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="each of 2 devices"):
        assign(FLUX, rooms(24, 24), shares)


def speeds(*of_each: tuple[float, float, float]) -> list[DeviceRoom]:
    """Room in GB, GB/s and seconds of compute for a GB."""
    return [DeviceRoom(room * GB, rate * GB, compute / GB) for room, rate, compute in of_each]


def test_a_fast_device_holds_what_it_can() -> None:
    found = assign(FLUX, speeds((20, 50, 1), (20, 50, 2)))
    assert found.runs
    assert given(found, FLUX, 2) == pytest.approx([20 / 23.67, 3.67 / 23.67], abs=0.03)


@pytest.mark.parametrize(
    "of_each",
    [
        [(4, 50, 0.1), (4, 50, 0.1)],
        [(4, 50, 0.001), (4, 25, 0.001)],
        [(4, 50, 0.01), (8, 25, 0.02)],
        [(2, 50, 0.02), (2, 50, 0.01), (6, 12, 0.01)],
    ],
)
def test_no_other_shares_make_the_step_shorter(of_each: list[tuple[float, float, float]]) -> None:
    rooms = speeds(*of_each)
    total = sum(FLUX)
    found = step_seconds(_bytes_by_room(total, rooms), rooms)
    parts = [part / 50 for part in range(51)]
    others = [shares for shares in itertools.product(parts, repeat=len(rooms)) if sum(shares) == pytest.approx(1)]
    best = min(step_seconds([share * total for share in shares], rooms) for shares in others)
    assert found <= best * (1 + 1e-6)


def test_a_device_without_room_is_left_out() -> None:
    found = distribute(FLUX, GB, rooms(1, 30, 0.5, 12))
    assert found.devices == (1, 3)
    assert found.left_out == {
        0: "it has room for 0 B of blocks, and the largest takes 648 MiB",
        2: "it has room for 477 MiB of blocks, and the largest takes 648 MiB",
    }
    kept = distribute(FLUX, GB, rooms(0, 1.5, 30, 0.5), home_is_first=True)
    assert kept.devices == (1, 2), "what is in no block is not theirs to hold"
    assert kept.left_out.keys() == {0, 3}
    nobody = distribute(FLUX, GB, rooms(0.1, 0.2))
    assert (nobody.devices, nobody.assignment.devices) == ((0,), (0,) * len(FLUX))
    few = distribute([GB, GB], 0, rooms(1, 1, 1))
    assert len(few.devices) == 2
    assert list(few.left_out.values()) == ["no block is left for it"]


def test_every_block_has_a_device_and_one_device_has_all() -> None:
    assert assign(FLUX, rooms(1)).devices == (0,) * len(FLUX)
    assert assign([5], rooms(1, 1)).devices in ((0,), (1,))
    assert assign([], rooms(1, 1)).devices == ()
    assert len(assign(FLUX, rooms(1, 1, 1)).devices) == len(FLUX)


def test_in_words() -> None:
    names, sizes = ["gpu:0", "gpu:1"], [1 << 20] * 4
    assert describe(Assignment((0, 0, 0, 1), True), names, sizes) == (
        "in runs: 3 blocks (0 to 2) of 3.0 MiB on gpu:0, 1 block of 1.0 MiB on gpu:1"
    )
    assert describe(Assignment((0, 1, 0, 1), False), names, sizes) == (
        "in turn: 2 blocks of 2.0 MiB on gpu:0, 2 blocks of 2.0 MiB on gpu:1"
    )
