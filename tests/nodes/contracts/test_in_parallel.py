"""How the host runs one step on several GPUs: its own models and a CPU that says to be two devices."""

from __future__ import annotations

from typing import Any

import comfy.multigpu
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.controlnet import ControlBase
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from parallel import apart, copies_of
from sampling import with_lora
from weightstream.nodes.host import contracts

FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)


@pytest.fixture
def both(foreign: ModelPatcher) -> ModelPatcher:
    """On two devices, in the host's own way."""
    model = foreign.clone()
    model.load_device = FIRST
    with torch.inference_mode():
        copy = model.deepclone_multigpu(new_load_device=SECOND)
    copy.is_multigpu_base_clone = True
    model.set_additional_models("multigpu", [copy])
    return model


def test_this_host_can_work_in_parallel() -> None:
    assert contracts.why_not_parallel() == ""


def test_a_copy_for_another_device_is_made_by_the_factory_and_has_the_use(both: ModelPatcher) -> None:
    (copy,) = copies_of(both)
    assert type(copy) is type(both)
    assert copy.model is not both.model
    assert copy.load_device == SECOND
    assert copies_of(copy) == []
    patched = with_lora(both, 0.5)
    patched.match_multigpu_clones()
    (matched,) = copies_of(patched)
    assert matched.model is copy.model
    assert (matched.load_device, matched.patches_uuid) == (SECOND, patched.patches_uuid)
    assert matched.is_multigpu_base_clone


def test_steps_get_all_devices_and_a_thread_for_each(both: ModelPatcher, native: ModelPatcher) -> None:
    seen: list[Any] = []

    def step(executor: Any, model: Any, conds: Any, x: torch.Tensor, sigma: torch.Tensor, options: Any) -> Any:
        seen.append((model.current_patcher, options["multigpu_clones"], options["multigpu_thread_pool"], conds))
        if len(seen) == 2:  # Without them it is a step on one device.
            options = {name: value for name, value in options.items() if not name.startswith("multigpu")}
        return executor(model, conds, x, sigma, options)

    both.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "test", step)
    assert torch.equal(apart(both), apart(native))
    patcher, clones, pool, conds = seen[0]
    assert list(clones) == [FIRST, SECOND]
    assert patcher is clones[FIRST]
    assert isinstance(pool, comfy.multigpu.MultiGPUThreadPool)
    assert [len(entries) for entries in conds] == [1, 1]
    assert conds[0][0]["model_conds"]["c_crossattn"].cond.ndim == 3


def test_a_run_is_prepared_within_a_wrapper_that_has_the_prompts(both: ModelPatcher, native: ModelPatcher) -> None:
    def prepare(executor: Any, model: Any, shape: Any, conds: Any, *rest: Any, **named: Any) -> Any:
        assert conds.keys() == {"positive", "negative"}
        model.remove_additional_models("multigpu")
        return executor(model, shape, conds, *rest, **named)

    def step(executor: Any, *arguments: Any) -> Any:
        assert "multigpu_clones" not in arguments[-1], "who is not loaded does not work"
        return executor(*arguments)

    both.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "test", prepare)
    both.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "test", step)
    assert torch.equal(apart(both), apart(native))


def test_threads_do_what_they_are_given_in_turn_and_hand_over_errors() -> None:
    pool = comfy.multigpu.MultiGPUThreadPool([FIRST, SECOND])
    pool.submit(SECOND, lambda value: value + 1, 1)
    pool.submit(SECOND, lambda: 1 / 0)
    assert pool.get_result(SECOND) == (2, None)
    result, error = pool.get_result(SECOND)
    assert result is None
    assert isinstance(error, ZeroDivisionError)
    pool.shutdown()


def test_a_controlnet_that_knows_nothing_of_several_devices_says_so() -> None:
    with pytest.raises(NotImplementedError):
        ControlBase().deepclone_multigpu(SECOND)
