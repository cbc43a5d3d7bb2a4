"""An error in each function that packing calls: results are right afterwards, and no memory is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Doubled, PinningBackend
from packed_models import BUDGET, X, make, make_model, step
from weightstream.streaming import State
from weightstream.streaming.memory import packing as packing_file
from weightstream.streaming.memory import packing_place as place_file
from weightstream.streaming.memory import weight_copies as weight_copies_file
from weightstream.streaming.memory.arena import Arena
from weightstream.streaming.memory.reader import Reader
from weightstream.streaming.model.packed_units import MeasuredUnit

# With how often they are called, at three at the most: while weights are packed for the first time, and while patches
# come to packed weights.
FUNCTIONS: dict[str, tuple[Any, str, tuple[int, int]]] = {
    "claim": (Arena, "claim", (3, 0)),
    "lock": (Arena, "lock", (3, 1)),
    "register": (PinningBackend, "register", (3, 1)),
    "measure": (packing_file, "measure_unit", (3, 3)),
    "write": (MeasuredUnit, "write", (3, 3)),
    "copy": (packing_file, "_copy_down", (3, 3)),
    "bake": (place_file, "bake_residents", (0, 3)),
    "unpacker": (place_file, "unpacker_of", (1, 1)),
    "mark": (PinningBackend, "mark", (3, 3)),
    "allocate": (PinningBackend, "allocate", (1, 1)),
    "synchronize": (PinningBackend, "synchronize", (1, 1)),
    "transfer": (Reader, "transfer", (3, 3)),
    "wait": (Reader, "wait", (3, 3)),
    "abandon": (Reader, "abandon", (1, 1)),
}
CASES = [
    pytest.param(
        function, number, patched, id=f"{function}-{number}-{'with patches' if patched else 'for the first time'}"
    )
    for function, (_, _, calls) in FUNCTIONS.items()
    for patched in (False, True)
    for number in (1, 3)
    if number <= calls[patched]
]
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
        holder, name, _ = FUNCTIONS[function]
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


@pytest.mark.parametrize(("function", "number", "patched"), CASES)
def test_after_an_error_all_is_as_before(function: str, number: int, patched: bool) -> None:
    model = make_model()
    expected = model(X)
    backend = PinningBackend()
    streamer = make(model, backend)
    streamer.load(streamer.plan_for(BUDGET))
    for _ in range(3 if patched else 2):  # In the third step weights are packed.
        step(streamer, model)
    assert bool(streamer.plan.packed) == patched
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
    assert failing.raised
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
