"""Hooks that the host writes into weights: never while copies of the step before may still be under way."""

from __future__ import annotations

from typing import Any

import comfy.hooks
import comfy.model_patcher
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from placing import Machine, place
from sampling import MB, sample_with_hook
from weightstream.streaming import CpuBackend


@pytest.mark.parametrize("mode", comfy.hooks.EnumHookMode)
@pytest.mark.parametrize("devices", [1, 2])
def test_copies_are_over_before_the_host_writes(
    loaded: Any,
    native: ModelPatcher,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    mode: comfy.hooks.EnumHookMode,
    devices: int,
) -> None:
    """A GPU is behind the host: copies of a step's last blocks, with hooks or without, come when it has been left."""
    for memory in machine(devices):
        memory.budget = 26 * MB // devices
    model, expected = place(loaded)[0], sample_with_hook(native, mode)
    order: list[Any] = []
    for owner, method, what in (
        (CpuBackend, "synchronize", lambda backend: backend.name),
        (comfy.utils, "copy_to_param", lambda *_: "written"),
    ):
        own = getattr(owner, method)

        def noted(*args: Any, own: Any = own, what: Any = what) -> Any:
            order.append(what(*args))
            return own(*args)

        monkeypatch.setattr(owner, method, noted)
    root = model.model.diffusion_model
    handle = root.register_forward_hook(lambda *_: order.append("step"), always_call=True)
    assert torch.equal(sample_with_hook(model, mode), expected)
    handle.remove()
    assert order.count("written") > 10
    streaming = {streamer.backend.name for streamer in model.streamers if streamer.plan.segments}
    assert len(streaming) == devices
    waited: set[str] = set()
    for what in order:
        if what == "step":
            waited.clear()
        elif what == "written":
            assert waited >= streaming
        else:
            waited.add(what)
