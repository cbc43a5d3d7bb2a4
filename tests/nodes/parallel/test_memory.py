"""What GPUs that work in parallel keep alive: nothing that is needed elsewhere, and no MODEL that nobody has."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import pytest
import torch
from failing import failing
from parallel import apart, close_all, copies_of, parallel
from prompts import conditioning, guided, latent
from sampling import MODEL
from weightstream.nodes.host.devices import same_device
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.parallel import verified
from weightstream.nodes.parallel.verified import verdicts
from weightstream.streaming.parallel.tokens import UndividedError


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    verdicts.clear()
    yield
    close_all()


def one_prompt(model: Any) -> torch.Tensor:
    return guided(model, positive=conditioning(1, 16), image=latent(16), cfg=1.0)


@pytest.mark.parametrize("on", [0, 1])
def test_one_gpu_goes_on_without_what_the_failed_step_had_computed(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, on: int
) -> None:
    model = parallel(loaded)
    one_prompt(model)
    computed: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    alone = verified._Step.alone

    def watched(step: Any) -> Any:
        alive.extend(reference() is not None for reference in computed)
        return alone(step)

    monkeypatch.setattr(verified._Step, "alone", watched)
    block = (model, *copies_of(model))[on].model.diffusion_model.single_blocks[1]

    def note(_: Any, args: tuple[Any, ...]) -> None:
        if not computed:
            computed.append(weakref.ref(args[0]))

    handle = block.register_forward_pre_hook(note)
    gc.disable()
    try:
        with failing(block, 0, error=UndividedError("something else")):
            one_prompt(model)
    finally:
        gc.enable()
        handle.remove()
    assert "its tokens cannot be divided" in model.streamed.alone
    assert alive[0] is False


def test_models_that_nobody_has_are_gone(models: Path) -> None:
    with torch.inference_mode():
        loaded = load_streamed(str(models / MODEL), {})
    model = parallel(loaded)
    apart(model)
    one_prompt(model)
    mm.unload_all_models()
    (copy,) = copies_of(model)
    living = [weakref.ref(one.model) for one in (loaded, model, copy)]
    streamers = [weakref.ref(one.streamer) for one in (loaded, model, copy)]
    del loaded, model, copy
    gc.collect()
    assert [reference() for reference in (*living, *streamers) if reference() is not None] == []


@pytest.mark.parametrize("given_up_by", ["a run", "a clone"])
def test_the_host_can_free_what_a_run_has_loaded_on_each_gpu(loaded: Any, given_up_by: str) -> None:
    """The host makes the copies anew for each run, and what it has loaded outlives these."""
    model = parallel(loaded)
    for _ in range(3):
        one_prompt(model if given_up_by == "a run" else model.clone())
    gc.collect()
    all_of_it = (model, *copies_of(model))
    assert {each.model.model for each in mm.current_loaded_models} == {one.model for one in all_of_it}
    for each in mm.current_loaded_models:
        assert same_device(each.device, each.model.load_device)
    for one in all_of_it:
        assert one.streamer.device_bytes > 0
        mm.free_memory(1e30, one.load_device)
        assert one.streamer.device_bytes == 0
    assert mm.current_loaded_models == []


def test_parents_are_of_the_same_model_and_few(loaded: Any) -> None:
    """The host frees by a parent what a run has loaded. A chain that grew would keep the copies of all runs."""

    def parents(patcher: Any) -> list[Any]:
        found = []
        while (patcher := patcher.parent) is not None:
            found.append(patcher)
        return found

    model = parallel(loaded)
    lengths = []
    for _ in range(4):
        lengths.append([len(parents(copy)) for copy in copies_of(model)])
        for one in (*copies_of(model), *copies_of(model.clone())):
            assert all(parent.model is one.model for parent in parents(one))
        one_prompt(model)
    assert lengths[1] == lengths[-1]
