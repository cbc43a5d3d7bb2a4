"""What somebody writes to a model or exchanges in it while it is sampled counts, as with the host's own loader."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import pytest
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP
from placing import Machine, place
from sampling import MB, MODEL, sample, with_lora
from torch import nn
from weightstream.nodes.loader import load_streamed

import nodes as host_nodes

pytestmark = pytest.mark.usefixtures("one_thread")

# Outside of blocks, and of two kinds of blocks; with a LoRA the matrices have patches.
NAMES = (
    "img_in.weight",
    "single_blocks.3.linear2.weight",
    "single_blocks.2.linear1.bias",
    "double_blocks.1.img_mlp.0.weight",
    "double_blocks.0.img_attn.norm.query_norm.weight",
)

Act = Callable[[Any], None]


def root_of(model: Any) -> nn.Module:
    return model.model.diffusion_model


def layers(model: Any) -> list[tuple[nn.Module, str]]:
    """Layers, and which of their tensors is written to."""
    split = [name.rpartition(".") for name in NAMES]
    return [(root_of(model).get_submodule(path), name) for path, _, name in split]


# -- what somebody does ------------------------------------------------------------------------------------------------


def scale_data(model: Any) -> None:
    for layer, name in layers(model):
        getattr(layer, name).data.mul_(1.25)


def scale(model: Any) -> None:
    for layer, name in layers(model):
        getattr(layer, name).mul_(1.25)


def write_by_numpy(model: Any) -> None:
    for layer, name in layers(model):
        getattr(layer, name).numpy()[...] *= 1.25


def copy_over(model: Any) -> None:
    for layer, name in layers(model):
        held = getattr(layer, name)
        held.copy_(held.flip(0) * 1.25)


def exchange(model: Any) -> None:
    for layer, name in layers(model):
        setattr(layer, name, nn.Parameter(getattr(layer, name) * 1.25, requires_grad=False))


def exchange_data(model: Any) -> None:
    for layer, name in layers(model):
        getattr(layer, name).data = getattr(layer, name) * 1.25


def exchange_layers(model: Any) -> None:
    for path in ("img_in", "single_blocks.3.linear2", "double_blocks.1.img_mlp.0"):
        layer = root_of(model).get_submodule(path)
        new = nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)
        new.weight.copy_(layer.weight * 1.25)
        new.bias.copy_(layer.bias)
        parent, _, name = path.rpartition(".")
        setattr(root_of(model).get_submodule(parent), name, new)


def copy_layers(model: Any) -> None:
    root = root_of(model)
    root.img_in = copy.deepcopy(root.img_in)
    root.img_in.weight.mul_(1.25)
    root.single_blocks[3] = copy.deepcopy(root.single_blocks[3])
    root.single_blocks[3].linear2.weight.mul_(1.25)


def take_bias_away(model: Any) -> None:
    root_of(model).single_blocks[2].linear1.bias = None


ACTS = (
    scale_data,
    scale,
    write_by_numpy,
    copy_over,
    exchange,
    exchange_data,
    exchange_layers,
    copy_layers,
    take_bias_away,
)


# -- when --------------------------------------------------------------------------------------------------------------


def before_the_run(model: Any, act: Act) -> None:
    model.add_callback(CallbacksMP.ON_PRE_RUN, act)


def once(act: Act) -> Act:
    """How often a model is loaded depends on how much of it streams."""
    calls = []

    def first(model: Any, *_: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            act(model)

    return first


def when_loaded(model: Any, act: Act) -> None:
    model.add_callback(CallbacksMP.ON_LOAD, once(act))


def when_injected(model: Any, act: Act) -> None:
    model.set_injections("test", [PatcherInjection(inject=once(act), eject=lambda patcher: None)])


def around(kind: str) -> Callable[[Any, Act], None]:
    def wrap(model: Any, act: Act) -> None:
        def wrapper(executor: Any, *args: Any, **options: Any) -> Any:
            act(model)
            return executor(*args, **options)

        model.add_wrapper(kind, wrapper)

    wrap.__name__ = f"in_{kind}"
    return wrap


def after_a_step(number: int) -> Callable[[Any, Act], None]:
    def wrap(model: Any, act: Act) -> None:
        calls = []

        def once(args: dict[str, Any]) -> torch.Tensor:
            calls.append(1)
            if len(calls) == number:
                act(model)
            return args["denoised"]

        model.set_model_sampler_post_cfg_function(once)

    wrap.__name__ = f"after_step_{number}"
    return wrap


def around_apply_model(model: Any, act: Act) -> None:
    calls = []

    def function(apply_model: Any, args: dict[str, Any]) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 1:
            act(model)
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(function)


def between_blocks(model: Any, act: Act) -> None:
    """In front of a block, in the middle of the first step."""
    calls = []

    def replaced(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 1:
            act(model)
        return extra["original_block"](args)

    model.set_model_patch_replace(replaced, "dit", "single_block", 1)


def within_a_block(model: Any, act: Act) -> None:
    """While a layer of a block runs, whose weights it may be."""
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            act(model)

    for path in ("double_blocks.1.img_mlp.2", "single_blocks.3.norm"):
        root_of(model).get_submodule(path).register_forward_hook(hook)


MOMENTS = (
    before_the_run,
    when_loaded,
    when_injected,
    *map(
        around,
        (WrappersMP.SAMPLER_SAMPLE, WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL),
    ),
    *map(after_a_step, (1, 2, 3)),
    around_apply_model,
    between_blocks,
    within_a_block,
)


# -- for the length of a step ------------------------------------------------------------------------------------------


def exchanged_for_a_step(model: Any) -> None:
    def wrapper(executor: Any, *args: Any, **options: Any) -> Any:
        before = [getattr(layer, name) for layer, name in layers(model)]
        exchange(model)
        try:
            return executor(*args, **options)
        finally:
            for (layer, name), held in zip(layers(model), before, strict=True):
                setattr(layer, name, held)

    model.add_wrapper(WrappersMP.DIFFUSION_MODEL, wrapper)


def written_for_a_step(model: Any) -> None:
    def wrapper(executor: Any, *args: Any, **options: Any) -> Any:
        before = [getattr(layer, name).clone() for layer, name in layers(model)]
        copy_over(model)
        try:
            return executor(*args, **options)
        finally:
            for (layer, name), held in zip(layers(model), before, strict=True):
                getattr(layer, name).copy_(held)

    model.add_wrapper(WrappersMP.DIFFUSION_MODEL, wrapper)


def exchanged_for_a_run(model: Any) -> None:
    """By an injection, which puts the old ones back before the model is loaded again."""
    kept: list[Any] = []

    def inject(patcher: Any) -> None:
        kept.extend((layer, name, getattr(layer, name)) for layer, name in layers(patcher))
        exchange(patcher)

    def eject(patcher: Any) -> None:
        for layer, name, held in kept:
            setattr(layer, name, held)
        kept.clear()

    model.set_injections("test", [PatcherInjection(inject=inject, eject=eject)])


# -- ways to a model ---------------------------------------------------------------------------------------------------


def from_host() -> Any:
    with torch.inference_mode():
        return host_nodes.UNETLoader().load_unet(MODEL, "default")[0]


@pytest.fixture
def ways(models: Any, native: Any, machine: Machine) -> dict[str, Callable[[], Any]]:
    """The tiny FLUX: most of it streams, all of it is resident, over two devices."""

    def loaded(count: int, budget: int) -> Any:
        machine(count, budget)
        with torch.inference_mode():
            model = load_streamed(str(models / MODEL), {})
        return model if count == 1 else place(model, split="equal")[0]

    return {
        "streamed": lambda: loaded(1, 14 * MB),
        "resident": lambda: loaded(1, 200 * MB),
        "split": lambda: loaded(2, 14 * MB),
        "split_resident": lambda: loaded(2, 100 * MB),
    }


WAYS = ("streamed", "resident", "split", "split_resident")


def runs(make: Callable[[], Any], hang: Callable[[Any], None], lora: bool, settled: bool) -> list[torch.Tensor]:
    """The model as it was left, with what hangs on a clone of it, and the model again, twice."""
    model = with_lora(make(), 0.8) if lora else make()
    if settled:
        for _ in range(2):
            sample(model)
            if hasattr(model, "streamer"):
                for streamer in model.streamers:
                    streamer.finish_building()
    clone = model.clone()
    hang(clone)
    latents = [sample(clone), sample(clone), sample(model)]
    mm.unload_all_models()
    return [*latents, sample(model)]


def compare(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert [torch.equal(one, other) for one, other in zip(found, expected, strict=True)] == [True] * len(expected)


# Three acts at each moment, each on another way to a model; in a block what is written by ``data`` is not seen.
UNSEEN = (scale_data, write_by_numpy, exchange_data)
CASES = [
    (WAYS[(place + turn) % len(WAYS)], act, moment, bool(turn % 2), bool(place // 2 % 2))
    for place, moment in enumerate(MOMENTS)
    for turn, act in enumerate(ACTS[place % 3 :: 3])
    if not (moment is within_a_block and act in UNSEEN)
]


@pytest.mark.parametrize(
    ("way", "act", "moment", "lora", "settled"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_what_is_changed_in_a_run_counts(
    ways: dict[str, Callable[[], Any]], native: Any, way: str, act: Act, moment: Any, lora: bool, settled: bool
) -> None:
    def hang(model: Any) -> None:
        moment(model, act)

    expected = runs(from_host, hang, lora, settled)
    mm.unload_all_models()
    compare(runs(ways[way], hang, lora, settled), expected)


@pytest.mark.parametrize("hang", [exchanged_for_a_step, written_for_a_step, exchanged_for_a_run])
@pytest.mark.parametrize(("way", "lora", "settled"), [("streamed", True, False), ("split", False, True)])
def test_what_is_changed_for_a_while_counts_as_long(
    ways: dict[str, Callable[[], Any]], native: Any, way: str, hang: Any, lora: bool, settled: bool
) -> None:
    expected = runs(from_host, hang, lora, settled)
    mm.unload_all_models()
    compare(runs(ways[way], hang, lora, settled), expected)
