"""An error in each function that packing calls: results are right afterwards, and no memory is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Doubled, PinningBackend
from packed_models import BUDGET, X, learned, make, make_model, step
from weightstream.streaming import State
from weightstream.streaming.memory import packing as packing_file
from weightstream.streaming.memory import weight_copies as weight_copies_file
from weightstream.streaming.memory.arena import Arena
from weightstream.streaming.memory.reader import Reader
from weightstream.streaming.model.packed_units import MeasuredUnit

FUNCTIONS: dict[str, tuple[Any, str]] = {
    "claim": (Arena, "claim"),
    "lock": (Arena, "lock"),
    "register": (PinningBackend, "register"),
    "measure": (packing_file, "measure_unit"),
    "write": (MeasuredUnit, "write"),
    "copy": (packing_file, "_copy_down"),
    "bake": (packing_file, "bake_residents"),
    "unpacker": (packing_file, "unpacker_of"),
    "mark": (PinningBackend, "mark"),
    "allocate": (PinningBackend, "allocate"),
    "synchronize": (PinningBackend, "synchronize"),
    "transfer": (Reader, "transfer"),
    "wait": (Reader, "wait"),
    "abandon": (Reader, "abandon"),
}
NAMES = {f"blocks.{block}.{part}.weight" for block in range(4) for part in ("qkv", "out", "mlp.0", "mlp.2")}
FAILURE = "the device has failed"


class Failing:
    """Has the call with a number fail, of those that are made while weights are packed.

    Attributes:
        raised: whether there were so many.
    """

    def __init__(self, patch: pytest.MonkeyPatch, function: str, number: int) -> None:
        self.raised = self._packing = False
        self._left = number
        holder, name = FUNCTIONS[function]
        patch.setattr(holder, name, self._failing(getattr(holder, name)))
        own = weight_copies_file.pack_units

        def pack_units(*args: Any) -> Any:
            self._packing = True
            try:
                return own(*args)
            finally:
                self._packing = False

        patch.setattr(weight_copies_file, "pack_units", pack_units)

    def _failing(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self._packing:
                self._left -= 1
                if self._left == 0:
                    self.raised = True
                    raise RuntimeError(FAILURE)
            return own(*args, **options)

        return call


@pytest.mark.parametrize("patched", [False, True], ids=["for the first time", "with patches"])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_after_an_error_all_is_as_before(function: str, number: int, patched: bool) -> None:
    model = make_model()
    expected = model(X)
    backend = PinningBackend()
    streamer = make(model, backend)
    streamer.load(streamer.plan_for(BUDGET))
    for _ in range(2):
        step(streamer, model)
    if patched:
        learned(streamer, model)
    with pytest.MonkeyPatch.context() as patch:
        failing = Failing(patch, function, number)
        try:
            if patched:
                streamer.load(streamer.plan, Doubled(NAMES))
            else:
                step(streamer, model)
        except RuntimeError as error:
            raised = str(error)
        else:
            raised = ""
    if not failing.raised:
        pytest.skip("it is not called so often then")
    if raised:  # (Where no memory can be page-locked weights stream as they are.)
        assert raised == FAILURE
        assert streamer.state is State.UNLOADED
        assert backend.allocated == 0
    streamer.load(streamer.plan_for(BUDGET))
    for _ in range(3):
        assert torch.equal(step(streamer, model), expected)
    assert streamer.plan.packed
    arena = streamer.site.supply.arena
    assert arena.pinned_bytes == sum(backend.registered.values())
    streamer.close()
    assert backend.allocated == backend.store.allocated == 0
    assert backend.registered == {}
    assert (arena.pinned_bytes, arena.pageable_bytes, arena.budget.used, arena.budget.locked) == (0, 0, 0, 0)
    assert not any(thread.name.startswith("weightstream-pack") for thread in threading.enumerate())
