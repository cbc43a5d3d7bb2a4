"""Why a step is not faster: each cause by itself, and their order."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from placing import FIRST, SECOND, place
from sampling import MB, sample, settle
from weightstream.nodes.model import measured, objections
from weightstream.nodes.model.parts import links
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.model.streamed_model import streamed_models
from weightstream.nodes.page import together
from weightstream.nodes.page.causes import Cause, Facts, find_causes
from weightstream.nodes.page.description import describe_causes, facts_of
from weightstream.nodes.page.status import full_status
from weightstream.nodes.page.together import Gpu, Together, seconds_together, together_of
from weightstream.nodes.page.usage import DeviceUsage, sampler
from weightstream.nodes.parallel import copies
from weightstream.nodes.twins.split import split_over
from weightstream.streaming import Link, VramReader
from weightstream.streaming.machine.gpus import Nvml

Load = Callable[..., StreamedModelPatcher]
GB = 10**9
READER = VramReader(Nvml(None))
# A card of 12 GB behind PCIe 4.0 x16 with all that it can have: it waits only since the model is too large.
FINE = Facts(
    streamed=14 * GB,
    bandwidth=24e9,
    step=0.66,
    waited=0.3,
    compute=0.36,
    link=Link(4, 16),
    card=Link(4, 16),
    total=12 * GB,
    free=300_000_000,
    others=700_000_000,
    headroom=200_000_000,
)


def kinds(**changes: Any) -> list[str]:
    return [cause.kind for cause in find_causes(replace(FINE, **changes))]


def cause(kind: str, **changes: Any) -> Cause:
    found = [cause for cause in find_causes(replace(FINE, **changes)) if cause.kind == kind]
    assert len(found) == 1, f"{kind} is not among the causes"
    return found[0]


def test_a_model_that_is_too_large_for_a_good_machine_lacks_room_alone() -> None:
    (room,) = find_causes(FINE)
    assert room == Cause("room", 0.3, {"streamed": 14 * GB, "total": 12 * GB})


@pytest.mark.parametrize(
    "changes",
    [{"streamed": 0}, {"step": None}, {"waited": None}, {"streamed": 0, "loading": True}],
)
def test_nothing_is_said_of_what_did_not_run_or_does_not_stream(changes: dict[str, Any]) -> None:
    assert find_causes(replace(FINE, **changes)) == []


def test_a_model_that_loads_says_that_alone() -> None:
    assert find_causes(replace(FINE, loading=True, staged=3 * GB, step=None)) == [
        Cause("loading", None, {"staged": 3 * GB})
    ]


def test_a_step_that_does_not_wait_is_limited_by_compute() -> None:
    assert find_causes(replace(FINE, waited=0.0165)) == [Cause("compute", None, {"waiting": 0.025})]
    assert "compute" not in kinds(waited=0.03)


@pytest.mark.parametrize(
    ("link", "narrow"), [(Link(3, 16), False), (Link(4, 8), True), (Link(4, 4), True), (Link(1, 16), False)]
)
def test_a_link_below_what_the_card_can(link: Link, narrow: bool) -> None:
    found = cause("link", link=link, bandwidth=0.8 * (link.bytes_per_second or 0))
    assert found.numbers == {"link": str(link), "card": "gen 4 x16", "narrow": narrow}
    assert found.seconds is not None
    assert 0 < found.seconds <= 0.3
    assert find_causes(replace(FINE, link=link, bandwidth=0.8 * (link.bytes_per_second or 0)))[0] == found


@pytest.mark.parametrize(("link", "card"), [(Link(5, 16), Link(5, 16)), (Link(), Link(5, 16)), (Link(5, 16), Link())])
def test_a_link_as_good_as_the_card_or_unknown_is_no_cause(link: Link, card: Link) -> None:
    assert "link" not in kinds(link=link, card=card, bandwidth=50e9)


def test_a_good_link_that_brings_little() -> None:
    found = cause("slow_bus", bandwidth=10e9)
    assert found.numbers["rate"] == 10e9
    assert found.numbers["usual"] == pytest.approx(0.55 * 16 * 1.969e9)
    assert "slow_bus" not in kinds(bandwidth=18e9)
    assert "slow_bus" not in kinds(bandwidth=10e9, staged=GB), "what is read comes more slowly"
    assert "slow_bus" not in kinds(bandwidth=10e9, link=Link(), card=Link())


def test_memory_that_is_not_page_locked_and_why() -> None:
    found = cause("unpinned", staged=6 * GB, why_staged="the limit of 8.0 GB page-locked memory is reached")
    assert found.numbers == {"staged": 6 * GB, "why": "the limit of 8.0 GB page-locked memory is reached"}
    assert found.seconds == pytest.approx(3 * GB / 24e9)


def test_weights_that_come_from_a_disk() -> None:
    changes = {"staged": 6 * GB, "bandwidth": 2e9, "waited": 5.0, "step": 6.0}
    found = cause("disk", **changes)
    assert found.numbers == {"rate": 2e9, "staged": 6 * GB}
    assert found.seconds == pytest.approx(3.0)
    assert kinds(**changes) == ["disk", "unpinned", "room"]
    assert "disk" not in kinds(staged=6 * GB)


def test_a_link_that_brings_less_than_a_disk_is_no_disk() -> None:
    narrow = {"link": Link(3, 4), "card": Link(3, 4), "streamed": 8 * GB, "staged": 2 * GB, "step": 3.0, "waited": 2.5}
    assert kinds(**narrow, bandwidth=3.1e9) == ["unpinned", "room"]
    assert cause("unpinned", **narrow, bandwidth=3.1e9).seconds == pytest.approx(GB / 3.1e9)
    assert cause("disk", **narrow, bandwidth=2e9).seconds == pytest.approx(1.0)
    unknown = {**narrow, "link": Link(), "card": Link()}
    assert "disk" in kinds(**unknown, bandwidth=3.1e9)


def test_copies_that_compute_waits_for() -> None:
    found = cause("synchronous", synchronous=True, why_synchronous="its settings ask for it", waited=0.0)
    assert found.numbers == {"why": "its settings ask for it"}
    assert found.seconds == pytest.approx(0.36)
    short = cause("synchronous", synchronous=True, waited=0.0, streamed=3 * GB)
    assert short.seconds == pytest.approx(3 * GB / 24e9), "no more can be hidden than there is to copy"


def test_other_programs() -> None:
    found = cause("others", others=4 * GB)
    assert found.numbers == {"others": 4 * GB, "gain": 3 * GB}
    assert found.seconds == pytest.approx(3 * GB / 24e9)
    assert "others" not in kinds(others=1_200_000_000)
    assert "others" not in kinds(others=None)


def test_a_limit_that_leaves_room() -> None:
    limited = {"limit": 6 * GB, "kept": 5_900_000_000, "free": 5_200_000_000}
    assert cause("limit", **limited).numbers == {"limit": 6 * GB, "gain": 5 * GB}
    assert cause("limit", **limited, streamed=2 * GB).numbers["gain"] == 2 * GB, "no more than all can stay"
    assert "limit" not in kinds(**{**limited, "free": 300_000_000})
    assert "limit" not in kinds(**{**limited, "limit": None}), "nobody has set one"


def test_a_limit_that_the_model_does_not_come_to_is_no_cause() -> None:
    there = {"free": 5_200_000_000, "kept": 5_000_000_000}
    assert "limit" not in kinds(limit=80 * GB, **there)
    assert "limit" not in kinds(limit=6 * GB, **there)
    assert "limit" in kinds(limit=5_250_000_000, **there), "the next part does not fit"
    assert "limit" not in kinds(limit=6 * GB, free=5_200_000_000), "what the model has is not known"


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -1.0, 0.0])
def test_what_is_no_measurement_is_not_taken_for_one(odd: float) -> None:
    assert find_causes(replace(FINE, step=odd)) == []
    assert kinds(bandwidth=odd, staged=GB) == ["unpinned", "room"]
    assert "slow_bus" not in kinds(bandwidth=odd)
    assert cause("synchronous", synchronous=True, compute=odd).seconds is None
    if odd:
        assert find_causes(replace(FINE, waited=odd)) == []


def test_weights_that_could_be_packed() -> None:
    found = cause("unpacked", why_unpacked="weights do not stream packed: there is no kernel here")
    assert found.numbers == {"why": "weights do not stream packed: there is no kernel here"}
    assert found.seconds == pytest.approx(14 * GB / 3 / 24e9)


def test_the_dearest_comes_first_and_room_last() -> None:
    changes = {"link": Link(3, 16), "bandwidth": 12e9, "others": 2 * GB, "waited": 1.0, "step": 1.36}
    found = find_causes(replace(FINE, **changes))
    assert [each.kind for each in found] == ["link", "others", "room"]
    assert found[0].seconds > found[1].seconds
    assert kinds(**{**changes, "others": 11 * GB})[:2] == ["others", "link"]


def test_gpus_that_compute_one_after_the_other() -> None:
    at_once = Together(0.4, needs_guidance=False)
    assert cause("turns", together=at_once).seconds == pytest.approx(0.26)
    assert cause("turns", together=at_once).numbers == {"together": 0.4, "guidance": False}
    assert cause("turns", together=replace(at_once, needs_guidance=True)).numbers["guidance"]
    assert kinds(together=at_once) == ["turns", "room"]
    assert kinds(together=at_once, waited=0.01) == ["turns"], "that it computes is no answer then"
    assert kinds(together=at_once, waited=0.0, streamed=0) == ["turns"], "all of it may stay"
    slow = replace(at_once, seconds=0.57)
    assert kinds(together=slow) == ["room"], "what is predicted has to be clearly less"
    assert kinds(together=slow, waited=0.01) == ["compute"]
    assert kinds(together=slow, streamed=0) == []


def test_nothing_is_said_of_gpus_while_all_that_stays_is_loading() -> None:
    assert kinds(together=Together(0.1, False), streamed=0, loading=True) == []


def test_at_the_same_time_each_gpu_brings_what_it_lacks_of_the_whole() -> None:
    fits, small = Gpu(24 * GB, None), Gpu(8 * GB, 25e9)

    def seconds(compute: float | None, gpus: list[Gpu], at_once: int = 2, shrunk: float = 1.0) -> float | None:
        return seconds_together(20 * GB, shrunk, 60, compute, gpus, at_once)

    assert seconds(1.0, [fits, fits]) == pytest.approx(0.553)
    assert seconds(2.0, [fits, fits, fits, fits], at_once=4) == pytest.approx(0.606)
    assert seconds(2.0, [fits, fits, fits, fits]) == pytest.approx(1.106), "two prompts are for two"
    assert seconds(0.175, [fits, fits]) == pytest.approx(0.216), "one program launches for both"
    assert seconds(0.5, [fits, small]) == pytest.approx(12 / 25)
    assert seconds(0.5, [small, small], shrunk=0.7) == pytest.approx(0.7 * 12 / 25)
    assert seconds(0.5, [replace(small, rate=5e9), replace(small, rate=None)]) == pytest.approx(12 / 5)
    assert seconds(0.5, [replace(small, rate=None), fits]) is None, "nothing has streamed"
    assert seconds(None, [fits, fits]) is None
    assert seconds(1.0, [fits]) is None


Told = Callable[..., "Together | None"]


@pytest.fixture
def told(loaded: StreamedModelPatcher, monkeypatch: pytest.MonkeyPatch) -> Told:
    """Splits the tiny FLUX over two GPUs, on which all of it stays, and tells of them what is asked."""
    monkeypatch.setattr(measured, "_bandwidth", {"gpu:1": 1e12})
    monkeypatch.setattr(objections, "_known", {})
    ours = split_over(loaded, [FIRST, SECOND], "equal", None, None).patcher
    sample(ours)
    parts = [model for model in streamed_models() if model.number == ours.streamed.number]
    devices_now = sampler.sample(READER).devices

    def tell(
        place: int = 0, compute: float | None = 2.0, names: tuple[str, str] = ("", ""), more: int = 0, **now: Any
    ) -> Any:
        usage = {each.device: replace(each, name=name) for each, name in zip(devices_now, names, strict=True)}
        home = replace(parts[0].streamer.snapshot(), compute_seconds=compute, **now)
        others = [(parts[1], parts[1].streamer.snapshot())] * (1 + more)
        return together_of(parts[place], [(parts[0], home), *others], usage)

    tell.patcher, tell.parts = ours, parts
    return tell


def test_a_split_model_says_what_its_gpus_would_do_at_the_same_time(told: Told) -> None:
    assert told() == Together(pytest.approx(2 * 0.553), needs_guidance=False)
    assert told(place=1) is told(mode="off") is None
    run = replace(told.parts[0].streamer.snapshot().run, step_seconds=4.0, waiting=0.25)
    assert told(compute=None, run=run) == Together(pytest.approx(3 * 0.553), needs_guidance=False)
    assert told(compute=None, run=replace(run, step_seconds=None)) is None


@pytest.mark.parametrize(("more", "part"), [(0, 0.553), (1, 0.553), (2, 0.303)])
def test_three_gpus_may_have_two_prompts_and_four_are_two_teams(told: Told, more: int, part: float) -> None:
    assert told(compute=20.0, more=more).seconds == pytest.approx(20 * part)


def test_what_may_not_stay_streams_in_parallel_too(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(part.streamer.model_bytes for part in told.parts)
    measured._bandwidth["gpu:1"] = 1.0
    for part in told.parts:
        monkeypatch.setattr(part.streamer, "config", replace(part.streamer.config, stream_all=True))
    assert told().seconds == pytest.approx(weights - min(part.streamer.device_bytes for part in told.parts))
    monkeypatch.setattr(told.parts[1].streamer, "config", replace(told.parts[1].streamer.config, copy_streams=0))
    assert told() is None


def test_what_it_lacks_comes_over_its_link(told: Told) -> None:
    measured._bandwidth["gpu:1"] = 1.0
    weights = sum(part.streamer.model_bytes for part in told.parts)
    assert told().seconds == pytest.approx(weights - 24 * MB, rel=0.05)
    measured._bandwidth.clear()
    assert told() is None, "how fast the links are is not known"


def test_nothing_is_advised_that_is_known_not_to_work(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(names=("RTX 4090", "RTX 3060")) is None, "each would get as much to compute"
    assert told(names=("RTX 4090", "RTX 4090")) is not None
    told.parts[0].tell_of_parallel("several GPUs are no faster", told.patcher.model)
    assert told() is None
    for part in told.parts:
        part.alone = ""  # As a node leaves it that has placed the model anew.
    told.parts[0].tell_of_parallel("", told.patcher.model)
    assert told() is not None
    monkeypatch.setattr(together, "why_not_parallel", lambda: "this ComfyUI cannot")
    assert told() is None


def test_what_keeps_tokens_whole_takes_two_prompts(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    options = told.patcher.model_options["transformer_options"]
    monkeypatch.setitem(options, "patches", {"attn1_patch": [print]})
    told.parts[0].loaded = lambda: told.patcher
    assert told().needs_guidance
    monkeypatch.delitem(options, "patches")
    assert not told().needs_guidance
    monkeypatch.setattr(links, "_sound", {(FIRST, SECOND): False})
    assert told().needs_guidance


def test_placement_that_could_not_keeps_its_reason(
    loaded: StreamedModelPatcher, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objections, "_known", {})
    monkeypatch.setattr(copies, "why_not_parallel", lambda: "this ComfyUI cannot")
    placed, *_ = place(loaded, devices="gpu:0,gpu:1", split="parallel")
    assert len(placed.streamers) == 2
    assert objections.objection(placed.streamed.title) == "this ComfyUI cannot"


def test_a_split_model_of_which_all_stays_has_the_cause(
    loaded: StreamedModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objections, "_known", {})
    monkeypatch.setattr(measured, "_bandwidth", {"gpu:0": 1e12})
    monkeypatch.setattr(together, "LAUNCH_SECONDS", 0.0)
    ours = split_over(loaded, [FIRST, SECOND], "equal", None, None).patcher
    settle(ours)
    found = [each for each in full_status()["causes"] if each["model"] == str(ours.streamed.number)]
    assert [(each["kind"], each["device"], each["guidance"]) for each in found] == [("turns", "gpu:0", False)]


def test_no_cause_of_the_bus_costs_more_than_the_wait() -> None:
    limited = {"limit": GB, "kept": GB, "free": 9 * GB}
    facts = replace(FINE, link=Link(1, 1), others=11 * GB, why_unpacked="x", waited=0.05, **limited)
    assert {"link", "others", "limit", "unpacked"} < {each.kind for each in find_causes(facts)}
    assert all(each.seconds is None or each.seconds <= 0.05 for each in find_causes(facts))


def test_the_status_has_them(streamed: Load) -> None:
    model = streamed(24 * MB)
    sample(model)
    settle(model)
    causes = full_status()["causes"]
    assert json.loads(json.dumps(causes)) == causes
    ours = [each for each in causes if each["model"] == str(model.streamed.number)]  # Others may not be collected yet.
    assert {each["device"] for each in ours} == {"gpu:0"}
    assert ours[-1]["kind"] in ("room", "compute")


def test_facts_are_of_the_run_that_is_on_once_it_has_settled(streamed: Load) -> None:
    model = streamed(24 * MB)
    sample(model, steps=6)
    device = DeviceUsage("gpu:0", "", True, 24 * MB, 1 * MB, 0, 0, 0, 0, 3 * MB, link=Link(4, 8), card=Link(4, 16))
    now = model.streamer.snapshot()
    facts = facts_of(model.streamed, now, device)
    assert (facts.streamed, facts.free, facts.others) == (now.streamed_block_bytes, 1 * MB, 3 * MB)
    assert (facts.link, facts.card) == (Link(4, 8), Link(4, 16))
    assert facts.step == now.run.step_seconds
    assert facts.kept == now.device_bytes > 0
    sample(model, steps=2)
    now = model.streamer.snapshot()
    assert now.last_run is not None
    assert facts_of(model.streamed, now, device).step == now.last_run.step_seconds, "two steps say little"
    ended = replace(now, busy=False, idle_seconds=9.0)
    assert facts_of(model.streamed, ended, device).step == now.run.step_seconds, "as the card of the model tells"
    assert describe_causes([model.streamed], []) == []
