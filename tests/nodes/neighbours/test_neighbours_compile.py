"""torch.compile before and after the streaming: the whole model, or block by block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import TorchCompileModel, skip_torch_compile_dict
from in_half import LoadInHalf, check_packed
from placing import Machine, place
from prompts import check_streams, output
from sampling import MB, Patched, sample, with_lora

Load = Callable[..., Any]
Compile = Callable[[Any], Any]

BLOCKS = [
    f"diffusion_model.{kind}.{block}"
    for kind, count in (("double_blocks", 2), ("single_blocks", 4))
    for block in range(count)
]


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    """Compiled anew by every test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def no_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that torch warns of: neither hooks that it cannot trace nor functions that are compiled too often. The
    host's own, by which it tells its records of blocks (0.35 and newer), are not ours to mend."""
    yield
    of_torch = [record for record in caplog.get_records("call") if record.name.startswith("torch")]
    said = [record.getMessage() for record in of_torch if record.levelno >= logging.WARNING]
    assert [text for text in said if "prefetch_queue_pop" not in text] == []


def whole(model: Any) -> Any:
    """By the host's node."""
    return output(TorchCompileModel.execute(model, "eager"))


def per_block(model: Any) -> Any:
    """By the host's function, as packs use it that compile blocks."""
    model = model.clone()
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(model, backend="eager", options=options, keys=BLOCKS)
    return model


def in_place_of_blocks(model: Any) -> Any:
    """As older packs do: each block is replaced by a compiled one."""
    model = model.clone()
    for name in BLOCKS:
        model.add_object_patch(name, torch.compile(model.get_model_object(name), backend="eager"))
    return model


WAYS = {"whole": whole, "per block": per_block}


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("way", WAYS)
def test_compiled_models(streamed: Load, plain: torch.Tensor, plain_with_lora: Patched, way: str) -> None:
    """Compiled after the loader, with and without LoRA before and behind it, and the model that is not compiled."""
    model = streamed()
    compiled = WAYS[way](model)
    for _ in range(2):
        check_streams(lambda: sample(compiled), model, plain)
    assert graphs() > 0
    made = graphs()
    check_streams(lambda: sample(compiled), model, plain)
    check_streams(lambda: sample(with_lora(compiled, 0.6)), model, plain_with_lora(0.6))
    check_streams(lambda: sample(WAYS[way](with_lora(model, 0.6))), model, plain_with_lora(0.6))
    assert graphs() <= 2 * made, "every prompt compiles anew"
    check_streams(lambda: sample(model), model, plain)
    assert model.status()["counters"]["misses"] == 0


@pytest.mark.parametrize("way", WAYS)
def test_compiled_models_that_stream_packed(
    streamed_in_half: LoadInHalf, native_in_half: ModelPatcher, plain_in_half: torch.Tensor, way: str
) -> None:
    """Weights are packed behind compiled steps; the next ones, also with a LoRA, make no other graphs."""
    with_patches = sample(with_lora(native_in_half, 0.6))
    model = streamed_in_half()
    compiled = WAYS[way](model)
    packed = check_packed(model, plain_in_half, lambda: sample(compiled), times=1)
    made = graphs()
    assert made > 0
    assert check_packed(model, with_patches, lambda: sample(with_lora(compiled, 0.6)), times=1) == packed
    assert graphs() == made
    assert model.status()["counters"]["misses"] == 0


def test_blocks_with_a_compiled_one_in_their_place(streamed: Load, plain: torch.Tensor) -> None:
    """Without LoRA, whose layers the host does not find under the names that they have then."""
    model = streamed()
    compiled = in_place_of_blocks(model)
    for each in (compiled, compiled, model, compiled):
        check_streams(lambda each=each: sample(each), model, plain)
    assert graphs() > 0


def test_a_model_that_ran_before_it_is_compiled(streamed: Load, plain: torch.Tensor) -> None:
    """Hooks are there already, on parts of blocks; compiled, blocks stream as a whole; then in parts again."""
    model = streamed()
    parts = []
    for each in (model, whole(model), model):
        for _ in range(2):
            check_streams(lambda each=each: sample(each), model, plain)
        parts.append(model.status()["segments"])
    assert parts[1] == 6
    assert min(parts[0], parts[2]) > 6


def test_a_block_is_one_graph(streamed: Load, native: ModelPatcher) -> None:
    """No more graphs than the host's own model is compiled to, and those that hooks around blocks cut."""
    sample(per_block(native))
    theirs = graphs()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sample(per_block(streamed()))
    assert 0 < graphs() <= theirs + 2


def test_memory_pressure_under_a_compiled_model(streamed: Load, plain: torch.Tensor) -> None:
    """Compiled while everything is resident and nothing hooked; then it streams."""
    model = streamed(64 * MB)
    compiled = whole(model)
    assert torch.equal(sample(compiled), plain)
    assert model.status()["mode"] == "resident"
    model.streamer.backend.store.budget = 24 * MB
    assert model.partially_unload(model.offload_device, 20 * MB) > 0
    for _ in range(2):
        check_streams(lambda: sample(compiled), model, plain)


@pytest.mark.parametrize("way", [*WAYS, "in place of blocks"])
@pytest.mark.parametrize("budget", [14 * MB, 40 * MB], ids=["it streams", "it fits"])
# Each function is compiled for each device, which here shows in the kind of tensors alone.
@torch._dynamo.config.patch(cache_size_limit=16)
def test_compiled_over_two_devices(
    loaded: Any, machine: Machine, plain: torch.Tensor, plain_with_lora: Patched, way: str, budget: int
) -> None:
    """Compiled behind the placement: what crosses between devices is not compiled."""
    machine(2, budget)
    model = place(loaded, split="equal")[0]
    compile_it = {**WAYS, "in place of blocks": in_place_of_blocks}[way]
    compiled, compiled_with_lora = compile_it(model), compile_it(with_lora(model, 0.6))
    for _ in range(2):
        assert torch.equal(sample(compiled), plain)
        assert torch.equal(sample(compiled_with_lora), plain_with_lora(0.6))
        assert torch.equal(sample(model), plain)
    assert len(model.streamers) == 2
    assert [streamer.counters.steps > 0 for streamer in model.streamers] == [True, True]
    assert graphs() > 0
