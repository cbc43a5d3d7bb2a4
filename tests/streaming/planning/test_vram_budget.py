from __future__ import annotations

import pytest
from weightstream.streaming import DeviceMemory, VramBudget

MB = 1_000_000
HEADROOM = 200 * MB


class Device:
    """A card of 10 GB: weights, activations of the shape that ran last, and what others take."""

    def __init__(self, vram: VramBudget, weights: int = 4000 * MB) -> None:
        self.vram = vram
        self.weights = weights
        self.cached = 0
        self.others = 0

    @property
    def memory(self) -> DeviceMemory:
        return DeviceMemory(10_000 * MB - self.weights - self.cached - self.others, self.cached)

    def step(self, shape: str, activations: int, estimate: int = 0) -> float | None:
        """A step as a streamer makes it; gives the budget that came before it."""
        self.vram.enter(shape)
        budget = self.vram.budget(self.memory, self.weights, lambda: estimate)
        if budget is not None:
            self.weights = int(budget)
        self.cached = max(self.cached, activations)
        self.vram.stepped()
        return budget

    def prompt(self, offered: int = 0) -> float:
        """The host empties torch's cache, and loads the model for a prompt."""
        self.cached = 0
        self.weights = int(self.vram.prompt_budget(self.memory, self.weights, offered))
        self.vram.begin_prompt()
        return self.weights


def test_after_the_first_step_the_budget_is_what_activations_leave() -> None:
    device = Device(VramBudget(HEADROOM))
    assert device.step("a", 1500 * MB, estimate=3000 * MB) is None
    assert device.step("a", 1500 * MB) == (10_000 - 1500 - 200) * MB


def test_one_shape_has_one_budget_from_the_third_step_on() -> None:
    device = Device(VramBudget(HEADROOM))
    device.step("a", 1500 * MB)
    device.step("a", 1500 * MB)
    settled = device.step("a", 1500 * MB)
    assert settled == device.weights
    assert [device.step("a", 1500 * MB) for _ in range(50)] == [None] * 50


@pytest.mark.parametrize("pattern", ["ab", "aab", "bba", "abb", "baaa"])
def test_shapes_in_turn_settle_and_do_not_move_weights(pattern: str) -> None:
    """Positive and negative prompts in steps of their own, areas, or a batch and its remainder."""
    need = {"a": 1500 * MB, "b": 500 * MB}
    device = Device(VramBudget(HEADROOM))
    for shape in pattern * 4:
        device.step(shape, need[shape])
    settled = device.weights
    assert settled == (10_000 - 1500 - 200) * MB
    for shape in pattern * 8:
        device.step(shape, need[shape])
        assert device.weights == settled


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_short_prompts_never_take_what_activations_need(steps: int) -> None:
    """Between prompts the host empties torch's cache: what torch keeps then is not what a step needs."""
    device = Device(VramBudget(HEADROOM))
    for _ in range(6):
        for _ in range(steps):
            device.step("a", 1500 * MB)
            assert device.weights + device.cached <= 10_000 * MB
        device.prompt(offered=4000 * MB)
    if steps > 1:
        assert device.weights == (10_000 - 1500 - 200) * MB


def test_a_larger_shape_makes_room_before_it_runs() -> None:
    device = Device(VramBudget(HEADROOM))
    for _ in range(3):
        device.step("small", 500 * MB)
    assert device.weights == 9300 * MB
    assert device.step("large", 4000 * MB, estimate=5000 * MB) == 4800 * MB
    # Measured, it turns out to need less than was estimated.
    assert device.step("large", 4000 * MB) == 5800 * MB


def test_a_known_smaller_shape_takes_the_memory_back_when_it_stays() -> None:
    device = Device(VramBudget(HEADROOM))
    for shape, activations in (("small", 500 * MB), ("large", 4000 * MB)):
        for _ in range(4):
            device.step(shape, activations)
    assert device.weights == 5800 * MB
    # Not while the larger one may come back in the same prompt.
    assert [device.step("small", 500 * MB) for _ in range(4)] == [None, 5800 * MB, None, None]
    device.prompt()
    assert device.step("small", 500 * MB) is None
    assert device.step("small", 500 * MB) == 9300 * MB


def test_a_known_larger_shape_makes_room_at_once() -> None:
    device = Device(VramBudget(HEADROOM))
    for shape, activations in (("large", 4000 * MB), ("small", 500 * MB)):
        for _ in range(4):
            device.step(shape, activations)
        device.cached = 0  # The host empties torch's cache between prompts.
    device.weights = 9300 * MB
    assert device.step("large", 4000 * MB) == 5800 * MB


def test_what_others_take_is_given_after_two_looks() -> None:
    device = Device(VramBudget(HEADROOM))
    for _ in range(4):
        device.step("a", 1500 * MB)
    device.others = 180 * MB
    assert device.step("a", 1500 * MB) is None
    assert device.step("a", 1500 * MB) == (10_000 - 1500 - 180 - 200) * MB
    # And it is not taken back in the middle of a prompt when they let go.
    device.others = 0
    assert [device.step("a", 1500 * MB) for _ in range(10)] == [None] * 10


def test_a_short_dip_moves_nothing() -> None:
    device = Device(VramBudget(HEADROOM))
    for _ in range(4):
        device.step("a", 1500 * MB)
    for others in (180 * MB, 0, 180 * MB, 0):
        device.others = others
        assert device.step("a", 1500 * MB) is None


def test_a_prompt_uses_what_was_measured_instead_of_an_estimate() -> None:
    vram = VramBudget(HEADROOM)
    device = Device(vram)
    assert vram.prompt_budget(device.memory, device.weights, 2500 * MB) == 2500 * MB
    for _ in range(3):
        device.step("a", 1500 * MB)
    device.weights -= 3000 * MB  # Given to another model meanwhile, which has let go of it.
    assert vram.prompt_budget(device.memory, device.weights, 2500 * MB) == 8300 * MB


@pytest.mark.parametrize("ceiling", [3000 * MB, 6000 * MB])
def test_a_shape_that_ran_out_of_memory_keeps_the_budget_with_which_it_ran(ceiling: int) -> None:
    vram = VramBudget(HEADROOM)
    device = Device(vram)
    device.step("a", 1500 * MB)
    vram.out_of_memory(ceiling, device.memory, device.weights)
    device.weights = ceiling
    for _ in range(10):
        device.step("a", 1500 * MB)
        assert device.weights <= ceiling
    assert device.prompt(offered=9000 * MB) <= ceiling
    # Somebody else had the memory then, and has let go of it.
    device.others = -3000 * MB
    assert device.prompt(offered=9000 * MB) > ceiling


STUCK = 130 * MB


class Pool(Device):
    """A card whose allocator is counted. It never gives back all, and what is cut out of one piece may need more."""

    def __init__(self, vram: VramBudget, more: int = 0) -> None:
        super().__init__(vram)
        self.more = more
        self.pieces: list[int] = []

    def trim(self) -> None:
        self.cached = STUCK
        self.vram.trimmed(STUCK)

    def prompt(self, offered: int = 0) -> float:
        self.weights = int(self.vram.prompt_budget(self.memory, self.weights, offered))
        self.vram.begin_prompt()
        return self.weights

    def step(self, shape: str, activations: int, estimate: int = 0) -> float | None:
        if begins := self.vram.begins:
            self.trim()
        self.vram.enter(shape)
        budget = self.vram.budget(self.memory, self.weights, lambda: estimate)
        moved = budget is not None and budget != self.weights
        if moved:
            self.weights = int(budget)
        if moved or (self.vram.lacks_piece and not begins):
            self.trim()
        if self.vram.lacks_piece:
            self.pieces.append(self.vram.piece())
            self.cached += self.pieces[-1]
        in_pieces = self.cached - STUCK < activations
        self.cached = max(self.cached, STUCK + (activations * 13 // 10 if in_pieces else activations + self.more))
        assert self.weights + self.cached <= 10_000 * MB, "out of memory"
        if self.vram.current.steps < 2:
            self.vram.observe(self.memory, activations)
        self.vram.stepped()
        return budget


def test_the_need_of_a_step_is_what_was_allocated_at_once() -> None:
    pool = Pool(VramBudget(HEADROOM))
    assert pool.step("a", 1600 * MB) is None
    assert pool.step("a", 1600 * MB) == (10_000 - 130 - 2560 - 200) * MB, "its gaps were not seen yet"
    assert pool.step("a", 1600 * MB) == (10_000 - 130 - 1800 - 200) * MB
    assert pool.pieces == [1800 * MB] * 2


@pytest.mark.parametrize("more", [0, 60, 199, 250, 700])
@pytest.mark.parametrize("steps", [2, 3, 8])
def test_a_plan_that_held_for_a_prompt_holds_for_all(more: int, steps: int) -> None:
    """The host empties torch's memory between them, and little of it all is never used."""
    pool = Pool(VramBudget(HEADROOM), more * MB)
    for _ in range(2):
        pool.prompt(offered=4000 * MB)
        for _ in range(steps):
            pool.step("a", 1600 * MB)
    settled = pool.weights
    for _ in range(20):
        pool.prompt(offered=4000 * MB)
        del pool.pieces[:]
        for _ in range(steps):
            pool.step("a", 1600 * MB)
            assert pool.weights == settled
        assert len(pool.pieces) == 1
    unused = 10_000 * MB - settled - STUCK - 1600 * MB
    assert unused == (200 + max(200, more)) * MB


def test_shapes_in_turn_share_the_largest_piece() -> None:
    pool = Pool(VramBudget(HEADROOM))
    for _ in range(6):
        pool.step("a", 1600 * MB)
        pool.step("b", 800 * MB)
    assert pool.weights == (10_000 - 130 - 1800 - 200) * MB
    assert pool.pieces == [1800 * MB] * 3, "before the first b, and when weights have moved"


def test_after_torch_gave_everything_back_the_piece_is_kept_anew() -> None:
    vram = VramBudget(HEADROOM)
    pool = Pool(vram)
    for _ in range(4):
        pool.step("a", 1600 * MB)
    assert not vram.lacks_piece
    vram.trimmed(STUCK)
    assert vram.lacks_piece
    assert vram.piece() == 1800 * MB
    assert vram.budget(pool.memory, pool.weights, None) is None


def test_a_second_look_at_the_need_replaces_the_first_and_later_ones_only_add() -> None:
    vram = VramBudget(HEADROOM)
    vram.enter("a")
    needs = []
    for peak in (3200, 1600, 800, 2400):
        vram.observe(DeviceMemory(0, 0), peak)
        needs.append(vram.current.activation_bytes)
    assert needs == [3600, 1800, 1800, 2700]


def test_what_was_taken_beyond_a_piece_stays_part_of_the_need() -> None:
    vram = VramBudget(HEADROOM)
    vram.enter("a")
    vram.trimmed(STUCK)
    vram.observe(DeviceMemory(0, STUCK), 1600)
    assert vram.piece() == 1800
    for kept, need in ((2100, 2100), (2100, 2100), (2200, 2200)):
        vram.observe(DeviceMemory(0, STUCK + kept), 1600)
        assert vram.current.activation_bytes == need


def test_without_adaptation_the_offer_stands() -> None:
    vram = VramBudget(HEADROOM, adaptive=False)
    device = Device(vram)
    assert [device.step("a", 9000 * MB) for _ in range(6)] == [None] * 6
    assert vram.prompt_budget(device.memory, device.weights, 123.0) == 123.0


def test_only_so_many_shapes_are_remembered() -> None:
    vram = VramBudget(HEADROOM)
    for number in range(100):
        vram.enter(number)
    assert len(vram._shapes) == 32
