"""Which units the next plan packs, as patches and shapes of steps come and go."""

from __future__ import annotations

import pytest
import torch
from models import Doubled
from packed_models import BUDGET, PACKED_IN_BLOCK, X, learned, make, make_model, spread
from weightstream.streaming.run.recorder import Recorder


class Spread(Doubled):
    """Makes weights that do not get smaller when they are packed."""

    def signature(self, name: str) -> object | None:
        return "spread" if name in self.names else None

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        return spread(original.shape).to(original.dtype)


@pytest.mark.parametrize("asked_before", [True, False], ids=["a plan of its own", "the plan in effect"])
def test_what_is_too_large_with_one_patch_is_packed_with_another(packed_units: list[int], asked_before: bool) -> None:
    model, large, fits = make_model(), "blocks.1.qkv.weight", "blocks.2.out.weight"
    streamer = make(model)
    learned(streamer, model)
    prompts: list[tuple[Doubled, int, int]] = [
        (Spread({large}), PACKED_IN_BLOCK * 4 - 1, 1),
        (Spread({large}), PACKED_IN_BLOCK * 4 - 1, 0),
        (Doubled({large}), PACKED_IN_BLOCK * 4, 1),
        (Spread({large}), PACKED_IN_BLOCK * 4 - 1, 1),
        (Spread({large, fits}), PACKED_IN_BLOCK * 4 - 2, 1),
        (Doubled({fits}), PACKED_IN_BLOCK * 4, 2),
    ]
    for patches, packed, tried in prompts:
        del packed_units[:]
        streamer.begin_run()
        streamer.load(streamer.next_plan(BUDGET) if asked_before else streamer.plan, patches)
        assert len(streamer.plan.packed) == packed
        assert len(packed_units) == tried, "only what has other patches is tried"
        reference = make_model()
        with torch.no_grad():
            for name in patches.names:
                weight = reference.get_parameter(name)
                weight.copy_(patches.compute(name, weight))
        assert torch.equal(model(X), reference(X))


@pytest.mark.parametrize("budget", [0, 700_000], ids=["too little to pack", "enough to keep some"])
def test_a_plan_that_was_only_asked_for_changes_nothing(packed_units: list[int], budget: int) -> None:
    """While nothing is known of a shape, those units stay packed that are so in the plan in effect."""
    model = make_model()
    streamer = make(model, stream_all=False)
    packed = learned(streamer, model).packed
    assert packed > streamer.plan_for(max(budget, streamer.minimum_bytes)).packed
    for _ in range(2):
        streamer.run(lambda: model(X), shape="another", reload=streamer.load)
    assert not streamer.profile.measured
    del packed_units[:]
    streamer.load(streamer.plan_for(BUDGET))
    assert streamer.plan.packed == packed
    assert packed_units == []


def test_in_a_new_shape_what_gets_too_large_is_not_packed() -> None:
    model, patches = make_model(), Spread({"blocks.1.qkv.weight"})
    streamer = make(model)
    plan = learned(streamer, model)
    streamer.run(lambda: model(X), shape="another", reload=streamer.load)
    assert not streamer.profile.measured
    streamer.load(plan, patches)
    assert len(streamer.plan.packed) == len(plan.packed) - 1


def test_in_a_new_shape_nothing_is_packed_whose_copy_is_gone(
    packed_units: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once there are times to plan with, it is packed."""
    monkeypatch.setattr(Recorder, "_bandwidth", lambda self: 1e15)
    model = make_model()
    streamer = make(model, stream_all=False)
    packed = learned(streamer, model).packed
    streamer.load(streamer.plan_for(10**9))
    streamer.run(lambda: model(X), shape="another", reload=streamer.load)
    del packed_units[:]
    streamer.load(streamer.plan_for(BUDGET))
    assert streamer.next_plan(700_000) == streamer.plan, "nothing is gained by another plan that packs nothing"
    for expected in (frozenset(), packed):
        assert torch.equal(streamer.run(lambda: model(X), shape="another", reload=streamer.load), make_model()(X))
        assert streamer.plan.packed == expected
        assert len(packed_units) == len(expected)
