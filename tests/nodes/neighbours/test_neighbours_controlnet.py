"""A ControlNet beside a streamed model: its residuals are added between blocks, and it is a model of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from controlnets import CONTROLNET, write_controlnet
from placing import Machine, place
from prompts import check_same, check_streams, conditioning, guided
from sampling import MB, with_lora

import nodes as host_nodes

Load = Callable[..., Any]


@pytest.fixture(scope="module")
def controlnet(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Loaded by the host's node."""
    folder = tmp_path_factory.mktemp("controlnet")
    write_controlnet(folder / CONTROLNET)
    folder_paths.add_model_folder_path("controlnet", str(folder))
    with torch.inference_mode():
        return host_nodes.ControlNetLoader().load_controlnet(CONTROLNET)[0]


def controlled(model: Any, net: Any, strength: float = 0.8, start: float = 0.0, end: float = 1.0) -> torch.Tensor:
    picture = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        positive, negative = host_nodes.ControlNetApplyAdvanced().apply_controlnet(
            conditioning(1), conditioning(2), net, picture, strength, start, end
        )
    return guided(model, steps=4, positive=positive, negative=negative)


@pytest.mark.parametrize("limit", [24 * MB, 33 * MB])
def test_residuals(streamed: Load, native: ModelPatcher, controlnet: Any, limit: int) -> None:
    model, expected = streamed(64 * MB, vram_limit=limit), controlled(native, controlnet)
    plain = guided(native, steps=4)
    assert not torch.equal(expected, plain)
    for _ in range(2):
        check_streams(lambda: controlled(model, controlnet), model, expected)
        check_streams(lambda: guided(model, steps=4), model, plain)


def test_residuals_for_a_part_of_the_steps(streamed: Load, native: ModelPatcher, controlnet: Any) -> None:
    run = partial(controlled, net=controlnet, strength=1.2, start=0.2, end=0.7)
    model, expected = streamed(), run(native)
    assert not torch.equal(expected, controlled(native, controlnet, 1.2))
    check_streams(lambda: run(model), model, expected)


def test_residuals_and_lora(streamed: Load, native: ModelPatcher, controlnet: Any) -> None:
    check_same(streamed(), native, partial(with_lora, strength=0.5), partial(controlled, net=controlnet))


def test_a_step_that_ran_out_of_memory_runs_again_with_all_residuals(
    streamed: Load, native: ModelPatcher, controlnet: Any
) -> None:
    """The model takes residuals out of the lists that it is given."""
    model, expected = streamed(64 * MB, vram_limit=33 * MB), controlled(native, controlnet)
    failures = iter([True])

    def fail(*_: Any) -> None:
        if next(failures, False):
            raise torch.OutOfMemoryError("no room for activations")

    handle = model.model.diffusion_model.single_blocks[2].register_forward_pre_hook(fail)
    check_streams(lambda: controlled(model, controlnet), model, expected)
    handle.remove()
    assert next(failures, None) is None


@pytest.mark.parametrize("count", [2, 3])
def test_residuals_between_blocks_of_several_devices(
    loaded: Any, machine: Machine, native: ModelPatcher, controlnet: Any, count: int
) -> None:
    expected, plain = controlled(native, controlnet), guided(native, steps=4)
    machine(count, 60 * MB // count)
    model = place(loaded, split="equal")[0]
    for _ in range(2):
        assert torch.equal(controlled(model, controlnet), expected)
        assert torch.equal(guided(model, steps=4), plain)
    assert len(model.streamers) == count
