"""What the first steps teach, out of memory, and giving way."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from models import Transformer, X, make_streamer, make_transformer
from torch import nn
from weightstream.streaming import DeviceMemoryError, State, Streamer, StreamingError, VirtualMemory
from weightstream.streaming.planning import planner
from weightstream.streaming.run.recorder import Recorder

BLOCK = 35_840


def step(streamer: Streamer, model: Transformer, x: torch.Tensor = X) -> torch.Tensor:
    return streamer.run(lambda: model(x), shape=tuple(x.shape), reload=streamer.load)


class Activations:
    """Makes every block of a model take device memory while it runs, as activations do."""

    def __init__(self, model: Transformer, memory: VirtualMemory, nbytes: int) -> None:
        self.nbytes = nbytes
        self.memory = memory
        self.failures = 0
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_: self.take())
            block.register_forward_hook(lambda *_: self.memory.give(self.nbytes))

    def take(self) -> None:
        try:
            self.memory.take(self.nbytes)
        except DeviceMemoryError:
            self.failures += 1
            raise


def test_the_first_step_teaches_which_parts_run_and_in_which_order() -> None:
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model, adaptive=False)
    streamer.load(streamer.plan_for(streamer.minimum_bytes + BLOCK))
    whole = streamer.minimum_bytes
    for _ in range(4):
        assert torch.equal(step(streamer, model), expected)
    assert streamer.plan is not None
    assert all(segment.runs > 0 for segment in streamer.plan.segments)
    assert streamer.minimum_bytes < whole
    names = [streamer.blocks.units[unit].name for unit, _ in streamer.profile.unit_runs[0]]
    assert names == [f"blocks.0.{part}" for part in ("norm", "qkv", "out", "mlp.0", "mlp.2")]


def test_times_and_the_bus_are_measured() -> None:
    model = make_transformer()
    streamer = make_streamer(model, adaptive=False)
    streamer.load(streamer.plan_for(streamer.minimum_bytes + BLOCK))
    assert streamer.snapshot().compute_seconds is None
    for _ in range(4):
        step(streamer, model)
        streamer.finish_building()
    snapshot = streamer.snapshot()
    assert 0 < snapshot.compute_seconds < 10
    assert 1e5 < snapshot.bandwidth_bytes_per_second < 1e13
    assert snapshot.predicted_step_seconds > 0
    assert snapshot.step_seconds > 0
    assert snapshot.limited_by in ("bus", "compute")


@pytest.mark.parametrize(("late", "measured"), [("", "12"), ("2", "123"), ("23", "1234"), ("1234567", "1234")])
def test_a_step_for_which_the_host_was_late_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, late: str, measured: str
) -> None:
    """At most twice: a host may always be late. Only shorter times replace those that were measured before."""
    model = make_transformer()
    streamer = make_streamer(model, adaptive=False)
    streamer.load(streamer.plan_for(streamer.minimum_bytes + BLOCK))
    number, seconds, found, ahead = 0, [], "", ""
    monkeypatch.setattr(Recorder, "host_was_late", property(lambda _: str(number) in late))

    def hold_back(seconds: float) -> None:
        nonlocal ahead
        assert 0 < seconds <= 0.5
        ahead += str(number)

    monkeypatch.setattr(streamer.backend, "hold_back", hold_back)
    for number in range(1, 8):
        step(streamer, model)
        found += str(number) if streamer.measuring.recorder is not None else ""
        streamer.learn()
        seconds.append(streamer.profile.compute_seconds)
    assert found == measured
    assert ahead == measured[2:], "where the host is late it has a head start in the next one"
    assert seconds[1:] == sorted(seconds[1:], reverse=True)


def test_one_shape_has_one_plan_from_the_third_step_on() -> None:
    model = make_transformer()
    streamer = make_streamer(model, budget=6 * BLOCK)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    plans = []
    for _ in range(8):
        step(streamer, model)
        plans.append(streamer.plan)
    assert all(plan == plans[2] for plan in plans[2:])
    assert plans[2].device_bytes > plans[0].device_bytes, "memory that nobody needed was not used"
    assert len(streamer._steps._entries._handles) == 2 + 2 * len({s.block for s in plans[2].segments}) + 2 * len(
        plans[2].streamed
    )


def test_an_order_of_residency_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a tenth of a second where there are many parts, at the begin of a prompt."""
    model = make_transformer()
    streamer = make_streamer(model, adaptive=False, headroom_bytes=1000)
    budget = streamer.minimum_bytes + BLOCK
    streamer.load(streamer.plan_for(budget))
    for _ in range(3):
        step(streamer, model)
    looked: list[object] = []
    monkeypatch.setattr(planner, "best_order", lambda outline, profile: looked.append(profile) or ())
    for nbytes, times in ((0, 1), (0, 1), (1000, 1), (1001, 2)):
        streamer.next_plan(budget + nbytes)
        assert len(looked) == times


def test_a_prompt_begins_with_one_piece_for_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_transformer()
    streamer = make_streamer(model, budget=7 * BLOCK)
    Activations(model, streamer.backend.store, BLOCK)
    streamer.load(streamer.plan_for(streamer.minimum_bytes + BLOCK))
    done: list[tuple[str, int]] = []
    monkeypatch.setattr(streamer.backend, "trim", lambda: done.append(("trim", streamer.counters.steps)) or 0)
    monkeypatch.setattr(streamer.backend, "keep", lambda nbytes: done.append(("keep", nbytes)))
    for _ in range(3):
        step(streamer, model)
    assert ("keep", BLOCK * 9 // 8) in done, "as much as they took, and an eighth"
    for begins in (3, 6):
        streamer.begin_prompt()
        done.clear()
        for _ in range(3):
            step(streamer, model)
        assert done == [("trim", begins), ("keep", BLOCK * 9 // 8)]


def test_a_step_that_a_cache_answers_says_nothing_of_activations() -> None:
    model = make_transformer()
    streamer = make_streamer(model, budget=7 * BLOCK)
    taking = Activations(model, streamer.backend.store, 2 * BLOCK)
    streamer.load(streamer.plan_for(streamer.minimum_bytes + BLOCK))
    step(streamer, model)
    streamer.run(lambda: X, shape=tuple(X.shape), reload=streamer.load)
    for _ in range(3):
        step(streamer, model)
    assert (taking.failures, streamer.counters.reruns) == (0, 0)


def test_each_of_several_devices_has_its_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives back what it keeps on all of them, whichever was meant."""
    kept: dict[int, int] = {}
    placed: list[tuple[Streamer, Transformer]] = []
    for number in range(2):
        model = make_transformer()
        streamer = make_streamer(model, budget=60 * BLOCK, headroom_bytes=0)
        Activations(model, streamer.backend.store, BLOCK)
        monkeypatch.setattr(streamer.backend, "trim", lambda: kept.clear() or 0)
        monkeypatch.setattr(streamer.backend, "keep", partial(kept.__setitem__, number))
        streamer.load(streamer.plan_for(streamer.minimum_bytes + BLOCK))
        placed.append((streamer, model))
    (first, one), (second, other) = placed
    for _ in range(4):
        first.run(lambda: second.run(lambda: (one(X), other(X)), 1, second.load), 1, first.load)
    for streamer, _ in placed:
        streamer.begin_prompt()
    first.run(lambda: second.run(lambda: (one(X), other(X)), 1, second.load), 1, first.load)
    assert kept == {0: BLOCK * 9 // 8, 1: BLOCK * 9 // 8}


def test_activations_are_counted_with_what_copies_take_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only steps that teach something are counted: torch's own statistics are set back for that."""
    model = make_transformer()
    streamer = make_streamer(model, budget=7 * BLOCK)
    streamer.load(streamer.plan_for(streamer.minimum_bytes + BLOCK))
    watched: list[int] = []
    monkeypatch.setattr(streamer.backend, "watch_peak", lambda: watched.append(streamer.counters.steps))
    for _ in range(6):
        step(streamer, model)
    assert watched == [0, 1]


def test_the_order_learned_survives_unloading() -> None:
    model = make_transformer()
    streamer = make_streamer(model, adaptive=False, learned=True)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    assert streamer.plan.learned
    assert torch.equal(step(streamer, model), make_transformer()(X))


def test_a_model_that_is_unloaded_after_every_step_learns_too() -> None:
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model)
    for _ in range(3):
        streamer.load(streamer.plan_for(streamer.minimum_bytes))
        streamer.finish_building()
        assert torch.equal(step(streamer, model), expected)
        streamer.unload()
    assert streamer.profile.learned
    assert streamer.profile.measured


def test_a_block_that_did_not_run_is_taken_to_be_like_its_kind() -> None:
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model, adaptive=False)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    for _ in range(2):
        streamer.run(lambda: model(X, [0, 1, 5]))
    assert [len(runs) for runs in streamer.profile.unit_runs] == [5] * 6
    for _ in range(2):
        assert torch.equal(step(streamer, model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("activations", [BLOCK, 2 * BLOCK, 3 * BLOCK])
@pytest.mark.parametrize("failing_step", [0, 1, 4])
def test_out_of_memory_in_a_step_shrinks_the_plan_and_runs_it_again(
    activations: int, failing_step: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model, budget=7 * BLOCK)
    memory = streamer.backend.store
    streamer.load(streamer.plan_for(7 * BLOCK))
    for _ in range(failing_step):
        assert torch.equal(step(streamer, model), expected)
    taking = Activations(model, memory, activations)
    with caplog.at_level(logging.WARNING):
        for _ in range(6):
            assert torch.equal(step(streamer, model), expected)
            assert memory.allocated == streamer.device_bytes
    assert 0 < taking.failures <= 4
    assert streamer.counters.reruns == taking.failures
    assert streamer.counters.steps == failing_step + 6
    assert "out of memory in a step on gpu:0" in caplog.text
    assert "less for weights" in caplog.text
    # It does not grow back into the next failure.
    settled = taking.failures
    for _ in range(5):
        step(streamer, model)
    assert taking.failures == settled


def test_a_step_that_no_plan_can_run_fails_as_it_would_without_us() -> None:
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model, budget=7 * BLOCK)
    streamer.load(streamer.plan_for(7 * BLOCK))
    step(streamer, model)
    taking = Activations(model, streamer.backend.store, 7 * BLOCK)
    with pytest.raises(DeviceMemoryError):
        step(streamer, model)
    taking.nbytes = 0
    assert torch.equal(step(streamer, model), expected)


def test_out_of_memory_after_weights_were_given_up_brings_them_back_first() -> None:
    """The first remedy makes no plan, and what is missing would end the second run."""
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model, budget=7 * BLOCK)
    streamer.load(streamer.plan_for(7 * BLOCK))
    step(streamer, model)
    failed = []

    def forward() -> torch.Tensor:
        if not failed:
            failed.append(streamer.give_way(BLOCK))
            raise torch.OutOfMemoryError("no room")
        return model(X)

    assert torch.equal(streamer.run(forward), expected)
    assert failed[0] >= BLOCK


def test_other_errors_are_not_run_again() -> None:
    model = make_transformer()
    streamer = make_streamer(model)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    calls = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        streamer.run(fail)
    assert calls == [1]
    assert streamer.counters.reruns == 0


def test_giving_way_is_immediate_and_the_next_step_makes_up_for_it() -> None:
    model = make_transformer()
    expected = model(X)
    streamer = make_streamer(model, adaptive=False)
    streamer.load(streamer.plan_for(10**9))
    assert torch.equal(step(streamer, model), expected)
    before = streamer.device_bytes
    freed = streamer.give_way(2 * BLOCK)
    assert 2 * BLOCK <= freed < 3 * BLOCK
    assert streamer.backend.allocated == before - freed
    assert streamer.state is State.REDUCED
    assert streamer.snapshot().pinned_bytes == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, make_transformer().state_dict()[name])
    with pytest.raises(StreamingError, match="given up weights"):
        model(X)
    for _ in range(3):
        assert torch.equal(step(streamer, model), expected)
        assert streamer.device_bytes <= before - freed


def test_more_than_residents_cannot_be_given() -> None:
    model = make_transformer()
    streamer = make_streamer(model)
    assert streamer.give_way(100) == 0
    streamer.load(streamer.plan_for(10**9))
    assert streamer.give_way(10**9) == sum(streamer.outline.unit_bytes)
    assert streamer.give_way(10**9) == 0


def test_patches_survive_every_change_of_the_plan() -> None:
    class Doubled:
        def signature(self, name: str) -> object | None:
            return "doubled" if name.endswith("qkv.weight") else None

        def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
            return original * 2

    model = make_transformer()
    reference = make_transformer()
    for block in reference.blocks:
        block.qkv.weight.mul_(2)
    expected = reference(X)
    streamer = make_streamer(model, budget=7 * BLOCK)
    reload = lambda plan: streamer.load(plan, Doubled())  # noqa: E731
    reload(streamer.plan_for(3 * BLOCK))
    for budget in (None, 5 * BLOCK, None, BLOCK):
        for _ in range(3):
            assert torch.equal(streamer.run(lambda: model(X), reload=reload), expected)
        if budget is not None:
            streamer.give_way(budget)


@pytest.mark.slow
def test_changing_shapes_give_the_same_results() -> None:
    model = make_transformer()
    inputs = [X, X.repeat(2, 1, 1), X[:1], X, X, X.repeat(2, 1, 1)]
    expected = [model(x) for x in inputs]
    streamer = make_streamer(model, budget=6 * BLOCK)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    for _ in range(4):
        for x, result in zip(inputs, expected, strict=True):
            assert torch.equal(step(streamer, model, x), result)


def test_a_weight_that_a_later_step_reads_directly_is_there() -> None:
    """The first step ran every layer as a module; then somebody reads a weight without that."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
            self.reads_directly = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.reads_directly:
                return self.second(self.first(x))
            # As a GPU would: its kernels refuse host memory.
            if self.first.weight.data_ptr() in masters:
                raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices")
            return self.second(nn.functional.linear(x, self.first.weight, self.first.bias))

    model = nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(4))})
    model.forward = lambda x: nn.Sequential(*model["blocks"])(x)
    model.requires_grad_(False)
    masters: set[int] = set()
    expected = model(X)
    streamer = make_streamer(model, adaptive=False)
    streamer.load(streamer.plan_for(streamer.minimum_bytes))
    for _ in range(3):
        assert torch.equal(step(streamer, model), expected)
    streamer.finish_building()
    assert torch.equal(step(streamer, model), expected)
    masters.update(block.first.weight.data_ptr() for block in model["blocks"])
    for block in model["blocks"]:
        block.reads_directly = True
    for _ in range(5):
        assert torch.equal(step(streamer, model), expected)
    assert all(segment.runs == 0 for segment in streamer.plan.segments)
