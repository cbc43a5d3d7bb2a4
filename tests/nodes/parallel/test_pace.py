"""Steps run on several GPUs where that is faster than on one; it costs one step to find out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from parallel import apart, close_all, parallel
from steps_run import counted
from weightstream.nodes.parallel import preparing, step, verified
from weightstream.nodes.parallel.pace import Pace, StepClock, pace_of
from weightstream.nodes.parallel.verified import verdicts
from weightstream.nodes.tell.notices import describe_notices

# Of a run: the first step is compared with one GPU's.
COMPARED = ["alone", "together"]
TOGETHER_SECONDS = 0.2


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    verdicts.clear()
    pace_of.cache_clear()
    yield
    close_all()
    pace_of.cache_clear()


class Clock:
    """A GPU, whose time passes as steps say."""

    is_virtual = False

    def __init__(self, monkeypatch: pytest.MonkeyPatch, alone: float) -> None:
        self.now = 0.0
        self.takes = {"alone": alone, "together": TOGETHER_SECONDS}
        # Seconds by which the GPU is behind the host.
        self.behind = 0.0
        clock = StepClock(self)
        for module in (step, preparing):
            monkeypatch.setattr(module, "clock_of", lambda *_: clock)
        for name in self.takes:
            method = getattr(verified._Step, name)

            def run(one: Any, *way: Any, method: Any = method, name: str = name) -> Any:
                self.now += self.takes[name]
                return method(one, *way)

            monkeypatch.setattr(verified._Step, name, run)

    def moment(self) -> float:
        return self.now

    def seconds(self, begin: float, end: float) -> float | None:
        return end - begin if self.now - self.behind >= end else None


def run(model: Any, steps: int = 9) -> torch.Tensor:
    return apart(model, steps=steps)


def test_several_gpus_work_where_they_are_faster(
    loaded: Any, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, runs = run(native), counted(monkeypatch)
    Clock(monkeypatch, alone=0.3)
    model = parallel(loaded)
    assert torch.equal(run(model), expected)
    assert runs == [*COMPARED, "together", "together", "alone", *["together"] * 5], "one step on one GPU tells enough"
    assert torch.equal(run(model), expected)
    assert runs[10:] == ["together"] * 9, "it is known"
    assert model.streamed.alone == ""


@pytest.mark.parametrize("bits", ["exact", "close"])
def test_one_gpu_works_where_it_is_faster(
    loaded: Any, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch, bits: str
) -> None:
    expected, runs = run(native), counted(monkeypatch)
    Clock(monkeypatch, alone=0.1)
    model = parallel(loaded, parallel_bits=bits)
    first = run(model)
    assert bits == "close" or torch.equal(first, expected)
    # By prompts, and in later steps the same by tokens.
    begin = COMPARED if bits == "exact" else ["together"]
    assert runs[: len(begin) + 4] == [*begin, "together", "together", "alone", "alone"]
    for _ in range(2):
        last = run(model)
    assert torch.equal(last, expected)
    assert runs[-9:] == ["alone"] * 9
    assert model.streamed.alone == "several GPUs are no faster (0.2 s a step, 0.1 s on one of them)"
    (notice,) = describe_notices()
    assert notice["text"].endswith(model.streamed.alone)


def test_a_gpu_that_is_behind_the_host_is_not_waited_for(
    loaded: Any, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more steps run on one GPU for that."""
    runs = counted(monkeypatch)
    Clock(monkeypatch, alone=0.3).behind = 0.5
    run(parallel(loaded), steps=12)
    assert runs.count("alone") == 2, "to compare, and to time"


def test_short_runs_tell_too(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four steps, as distilled models have them. How long a run's last step takes is not known."""
    runs = counted(monkeypatch)
    Clock(monkeypatch, alone=0.3)
    model = parallel(loaded)
    for _ in range(3):
        run(model, steps=4)
    assert runs == [*COMPARED, "together", "together", "alone", "together", "alone", *["together"] * 6]


def test_the_time_between_runs_is_nobodys(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, alone=0.3)
    told: list[float] = []
    monkeypatch.setattr(Pace, "add", lambda pace, together, seconds: told.append(round(seconds, 3)))
    model = parallel(loaded)
    for _ in range(3):
        run(model, steps=4)
        clock.now += 100.0
    assert told == [TOGETHER_SECONDS] * 6


def test_a_step_of_another_kind_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace, told = Clock(monkeypatch, alone=0.3), Pace(), []
    monkeypatch.setattr(Pace, "add", lambda pace, together, seconds: told.append(seconds))
    steps = StepClock(clock)
    for number, seconds in enumerate((1.0, 5.0, 2.0, 7.0)):
        steps.begin_step()
        if number % 2 == 0:
            steps.times(pace, together=True)
        clock.now += seconds
    steps.begin_step()
    assert told == [1.0, 2.0]


def test_virtual_devices_are_not_timed(loaded: Any) -> None:
    model = parallel(loaded)
    run(model)
    pace = pace_of("kind")
    clock = StepClock(model.streamer.backend)
    for _ in range(3):
        clock.begin_step()
        clock.times(pace, together=True)
    assert not pace.wants_alone


@pytest.mark.parametrize(
    ("alone", "is_known", "why_alone"),
    [
        ([], False, ""),
        ([0.3], True, ""),
        ([0.2], True, ""),
        ([0.1], False, ""),
        ([0.1, 0.3], True, "several GPUs are no faster (0.2 s a step, 0.1 s on one of them)"),
    ],
)
def test_what_is_known(alone: list[float], is_known: bool, why_alone: str) -> None:
    pace = Pace()
    for together, seconds in [(True, 0.25), (True, 0.2), *((False, each) for each in alone)]:
        assert not pace.wants_alone or together is False
        pace.add(together, seconds)
    assert (pace.is_known, pace.wants_alone, pace.why_alone) == (is_known, not is_known, why_alone)
