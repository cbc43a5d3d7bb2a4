"""What loading does around packing: where units cannot be packed after all, and on another device."""

from __future__ import annotations

import pytest
import torch
from packed_models import BUDGET, PACKED_IN_BLOCK, X, learned, make, make_model, step
from weightstream.streaming import CpuBackend, State, VirtualMemory
from weightstream.streaming import packing_choice as choice_file
from weightstream.streaming.memory import packing as packing_file
from weightstream.streaming.planning.planner import Planner


def test_an_error_behind_units_that_cannot_be_packed_leaves_nothing_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plan that is to come in place of theirs cannot be made."""
    model = make_model()
    streamer = make(model)
    learned(streamer, model)
    streamer.unload()
    streamer.site.weight_copies.clear_host()
    plan = streamer.plan_for(BUDGET)
    assert plan.packed

    def fail(*args: object) -> None:
        assert streamer.device_bytes > 0
        raise MemoryError("no memory is left")

    with monkeypatch.context() as patch:
        patch.setattr(packing_file, "measure_unit", lambda *args: None)  # Each takes more than was planned.
        patch.setattr(Planner, "plan_within", fail)
        with pytest.raises(MemoryError):
            streamer.load(plan)
    assert streamer.state is State.UNLOADED
    assert streamer.device_bytes == 0
    assert torch.equal(model(X), make_model()(X))


@pytest.mark.parametrize("works", [True, False], ids=["it unpacks", "it cannot unpack"])
def test_on_another_device_unpacking_is_tried_anew(monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    """Neither the speed of the first device nor its failure says anything of the second."""
    first, second = (CpuBackend(VirtualMemory(10**9)) for _ in range(2))

    def speed_of(backend: CpuBackend, dtype: torch.dtype) -> float:
        if backend is first and not works:
            raise RuntimeError("this device cannot unpack")
        return 1e9 if backend is first else 2e9

    monkeypatch.setattr(choice_file, "unpacked_bytes_per_second", speed_of)
    model = make_model()
    streamer = make(model, first)
    assert len(learned(streamer, model).packed) == (4 * PACKED_IN_BLOCK if works else 0)
    streamer.move_to(second)
    assert len(learned(streamer, model).packed) == 4 * PACKED_IN_BLOCK
    assert streamer.planner.packing.bytes_per_second == 2e9
    assert torch.equal(step(streamer, model), make_model()(X))
