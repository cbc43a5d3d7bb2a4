"""Steps run on several GPUs where that is faster than on one; it costs one step to find out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from failing import failing
from parallel import apart, close_all, copies_of, parallel
from prompts import conditioning, guided, latent
from steps_run import counted
from weightstream.nodes.parallel import pace as paces
from weightstream.nodes.parallel import preparing, step, verified
from weightstream.nodes.parallel.pace import MOST_DISTURBED, Pace, StepClock, pace_of
from weightstream.nodes.parallel.verified import verdicts
from weightstream.nodes.tell.notices import describe_notices
from weightstream.streaming import runner
from weightstream.streaming.parallel.tokens import UndividedError

# Of a model's first run, with an A for a step on one GPU alone and a T for one together: the first step is compared
# with one GPU's; in two more GPUs are measured and get plans; two are timed.
BEGIN = "AT TT TT"
# On one GPU prompts are computed in another shape, so that it learns in two steps more.
LEARNING_ALONE = "AA"
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


def letters(runs: list[str]) -> str:
    return "".join(each[0].upper() for each in runs)


def in_order(*parts: str) -> str:
    return "".join(parts).replace(" ", "")


def run(model: Any, steps: int = 9) -> torch.Tensor:
    return apart(model, steps=steps)


def test_several_gpus_work_where_they_are_faster(
    loaded: Any, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, runs = run(native), counted(monkeypatch)
    Clock(monkeypatch, alone=0.3)
    model = parallel(loaded)
    assert torch.equal(run(model), expected)
    assert letters(runs) == in_order(BEGIN, LEARNING_ALONE, "A", "T"), "one step on one GPU tells enough"
    assert torch.equal(run(model), expected)
    assert runs[10:] == ["together"] * 9, "it is known"
    assert model.streamed.alone == ""


@pytest.mark.parametrize("bits", ["exact", "close"])
def test_one_gpu_works_where_it_is_faster(
    loaded: Any, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch, bits: str
) -> None:
    expected, expected_first, runs = run(native), run(native, steps=14), counted(monkeypatch)
    Clock(monkeypatch, alone=0.1)
    model = parallel(loaded, parallel_bits=bits)
    first = run(model, steps=14)
    assert bits == "close" or torch.equal(first, expected_first)
    # By prompts, and in later steps the same by tokens.
    begin = BEGIN if bits == "exact" else BEGIN[1:]
    assert letters(runs).startswith(in_order(begin, LEARNING_ALONE, "AA"))
    for _ in range(3):
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
    run(parallel(loaded), steps=14)
    assert runs.count("alone") == 4, "to compare, to learn, and to time"


def test_short_runs_tell_too(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four steps, as distilled models have them. How long a run's last step takes is not known."""
    runs = counted(monkeypatch)
    Clock(monkeypatch, alone=0.3)
    model = parallel(loaded)
    for _ in range(4):
        run(model, steps=4)
    assert letters(runs) == in_order("ATTTT", "TTTA", "TAAT", "TTTT")


def test_the_time_between_runs_is_nobodys(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, alone=0.3)
    told: list[float] = []
    monkeypatch.setattr(Pace, "add", lambda pace, together, seconds: told.append(round(seconds, 3)))
    model = parallel(loaded)
    for _ in range(3):
        run(model, steps=4)
        clock.now += 100.0
    assert told == [TOGETHER_SECONDS] * 4, "two of each run, but in the first"


def one_prompt(model: Any, steps: int) -> torch.Tensor:
    return guided(model, positive=conditioning(1, 16), image=latent(16), cfg=1.0, steps=steps)


@pytest.mark.parametrize("alone", [0.1, 0.3])
@pytest.mark.parametrize("sample", [apart, one_prompt])
def test_steps_in_which_a_gpu_is_measured_or_gets_a_plan_are_not_timed(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, alone: float, sample: Callable[..., torch.Tensor]
) -> None:
    """Of the first run on all GPUs these are the first ones, which would then seem slower than one GPU."""
    clock = Clock(monkeypatch, alone=alone)
    adapt = runner._adapt

    def slow(model: Any, *arguments: Any) -> None:
        plan = model.plan
        adapt(model, *arguments)
        clock.now += model.measuring.recorder is not None or model.plan is not plan

    monkeypatch.setattr(runner, "_adapt", slow)
    told: list[tuple[bool, float]] = []
    add = Pace.add
    monkeypatch.setattr(Pace, "add", lambda pace, *what: (told.append(what), add(pace, *what)))
    model = parallel(loaded)
    for _ in range(2):
        sample(model, steps=14)
    assert {together for together, _ in told} == {False, True}
    for together, seconds in told:
        assert seconds == pytest.approx(TOGETHER_SECONDS if together else alone)
    assert (model.streamed.alone == "") is (alone > TOGETHER_SECONDS)


@pytest.mark.parametrize("on", [0, 1])
def test_a_step_that_a_gpu_has_run_again_is_not_timed(loaded: Any, monkeypatch: pytest.MonkeyPatch, on: int) -> None:
    Clock(monkeypatch, alone=0.3)
    told: list[float] = []
    monkeypatch.setattr(Pace, "add", lambda pace, together, seconds: told.append(seconds))
    model = parallel(loaded)
    one_prompt(model, 8)
    before = len(told)
    block = (model, *copies_of(model))[on].model.diffusion_model.single_blocks[1]
    with failing(block, 3):
        one_prompt(model, 8)
    assert len(told) - before == 8 - 2 - 1, "but the first and the last, and the one that failed"


@pytest.mark.parametrize("why", ["its tokens", "some node keeps state"])
def test_a_step_that_one_gpu_has_run_in_the_end_is_not_timed(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    Clock(monkeypatch, alone=0.3)
    told: list[float] = []
    monkeypatch.setattr(Pace, "add", lambda pace, together, seconds: told.append(seconds))
    model, seen, keeps = parallel(loaded).clone(), [0], [False]

    def wrapper(apply: Callable[..., Any], args: dict[str, Any]) -> torch.Tensor:
        seen[0] += keeps[0] and float(args["timestep"].max()) < 0.5
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    for _ in range(2):
        apart(model, steps=8)
    assert len(told) == 6, "all of the second run but the first and the last"
    keeps[0] = why == "some node keeps state"
    block = model.model.diffusion_model.double_blocks[0]
    with failing(block, *[] if keeps[0] else [4], error=UndividedError("something else")):
        apart(model, steps=8)
    assert model.streamed.alone.startswith(why)
    together = model.streamed.together
    assert 2 < together < 8
    # The last of them is the one before the step that was taken back, which was begun together, or has failed.
    assert len(told) - 6 == together - (2 if keeps[0] else 1)


def test_a_gpu_that_never_settles_is_asked_no_more() -> None:
    pace = Pace()
    for seconds in (0.2, 0.2):
        pace.add(True, seconds)
    for _ in range(MOST_DISTURBED):
        assert pace.wants_alone
        pace.disturbed()
    assert not pace.wants_alone
    assert pace.why_alone == ""
    pace = Pace()
    for together, seconds in [(True, 0.2), (True, 0.2), (False, 0.1)]:
        pace.add(together, seconds)
    for _ in range(MOST_DISTURBED):
        pace.disturbed()
    assert pace.why_alone == "", "one step is not enough to say so"


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


@pytest.mark.parametrize("alone", [0.1, 0.3])
def test_what_was_found_out_long_ago_is_found_out_again(
    loaded: Any, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch, alone: float
) -> None:
    expected, runs = run(native), counted(monkeypatch)
    clock = Clock(monkeypatch, alone=alone)
    passed = [0.0]
    monkeypatch.setattr(paces, "time", SimpleNamespace(monotonic=lambda: passed[0]))
    model = parallel(loaded)
    for _ in range(2):
        run(model)
    runs.clear()
    passed[0] += 500.0
    assert torch.equal(run(model), expected)
    assert set(runs) == {"alone" if alone < TOGETHER_SECONDS else "together"}
    runs.clear()
    passed[0] += 200.0
    clock.takes["alone"] = 0.4 - alone
    for _ in range(2):
        assert torch.equal(run(model), expected)
    assert set(runs) == {"alone", "together"}
    assert runs[-9:] == ["together" if alone < TOGETHER_SECONDS else "alone"] * 9


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
