from __future__ import annotations

import itertools

import pytest
from weightstream.streaming import BudgetError, make_plan, minimum_bytes

SIZES = [(10,), (10, 10), (10, 30, 20), (5,) * 8, (40,) * 3 + (15,) * 6, (7, 1, 9, 3, 3, 8, 2)]


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_plan_fits_its_budget_whatever_that_is(sizes: tuple[int, ...], slots: int) -> None:
    for rest, budget in itertools.product((0, 4), range(sum(sizes) + 10)):
        if budget < minimum_bytes(sizes, rest):
            with pytest.raises(BudgetError) as caught:
                make_plan(sizes, rest, budget, slots)
            assert caught.value.minimum == minimum_bytes(sizes, rest)
            continue
        plan = make_plan(sizes, rest, budget, slots)
        assert plan.device_bytes <= budget
        assert sorted(plan.streamed + plan.resident) == list(range(len(sizes)))
        assert plan.slots <= slots


@pytest.mark.parametrize("sizes", SIZES)
def test_what_fits_is_not_streamed(sizes: tuple[int, ...]) -> None:
    plan = make_plan(sizes, 4, 4 + sum(sizes), 2)
    assert plan.streamed == ()
    assert plan.staging_bytes == 0
    assert plan.device_bytes == 4 + sum(sizes)


@pytest.mark.parametrize("residents", range(1, 56))
def test_like_blocks_are_spread_evenly(residents: int) -> None:
    blocks, slots = 57, 2
    plan = make_plan([10] * blocks, 0, 10 * (residents + slots), slots)
    if not plan.streamed:
        return
    assert len(plan.resident) == residents
    # A step follows the one before it, so the blocks lie in a circle.
    gaps = [after - before - 1 for before, after in itertools.pairwise((*plan.resident, plan.resident[0] + blocks))]
    assert max(gaps) - min(gaps) <= 1


def test_more_slots_than_fit_are_not_used() -> None:
    plan = make_plan([10] * 4, 0, 19, 5)
    assert plan.slots == 1


def test_the_plan_explains_itself() -> None:
    text = make_plan([10_000_000] * 4, 1_000_000, 31_000_000, 2).explain()
    assert text == (
        "3 of 4 blocks streamed (30.0 MB a step), 1 resident; 31.0 MB on the device: 10.0 MB resident blocks, "
        "1.0 MB outside of blocks, 20.0 MB staging"
    )


@pytest.mark.parametrize("kept", range(1, 38, 3))
def test_bytes_are_spread_over_the_blocks_that_compute_not_over_the_bytes(kept: int) -> None:
    """FLUX's shape: a few large blocks, then many small ones. The bus has the same time for each of them."""
    sizes = (680,) * 19 + (283,) * 38
    plan = make_plan(sizes, 0, 283 * kept + 2 * 680, 2)
    due = plan.streamed_bytes / len(sizes)
    crossed = [sum(size for index, size in enumerate(sizes[: end + 1]) if index in plan.streamed) for end in range(57)]
    ahead = [bytes_so_far - due * (end + 1) for end, bytes_so_far in enumerate(crossed)]
    # Up to the bytes that the large blocks cannot avoid: with few residents all of them are streamed.
    unavoidable = max(0, plan.streamed_bytes - 283 * 38 - due * 19)
    assert max(ahead) - min(ahead) <= unavoidable + 2.5 * 680
