"""A loader makes the same model once more, and what somebody has changed in the first one is seen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import comfy.model_base
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from safetensors.torch import load_file, save_file
from sampling import MODEL, sample, with_lora
from weightstream.nodes.twins.equality import PIECE
from weightstream.nodes.twins.likeness import difference, held_by
from weightstream.nodes.twins.twins import build_like, factory_of

pytestmark = pytest.mark.usefixtures("one_thread")


def is_alike(patcher: ModelPatcher) -> bool:
    factory = factory_of(patcher)
    assert factory is not None
    with torch.inference_mode():
        return build_like(patcher, factory) is not None


class Scale:
    """What packs put on layers: an object that is called."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class OtherScale(Scale):
    pass


def scaled(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * factor


def parametrized(layer: torch.nn.Module) -> None:
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Identity(), unsafe=True)


def of_another_class(layer: torch.nn.Module) -> None:
    layer.__class__ = type("Other", (type(layer),), {})


def of_a_class_of_the_same_name(layer: torch.nn.Module) -> None:
    kind = type(layer)
    methods = {"forward": lambda self, x: kind.forward(self, x) * 2, "__qualname__": kind.__qualname__}
    layer.__class__ = type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__})


# Of a layer, by what is changed.
CHANGES: dict[str, Callable[[Any], object]] = {
    "hook behind": lambda layer: layer.register_forward_hook(lambda module, inputs, output: output * 2),
    "hook before": lambda layer: layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    "function": lambda layer: setattr(layer, "forward", lambda x: x),
    "method": lambda layer: setattr(layer, "forward", MethodType(lambda self, x: x, layer)),
    "partial": lambda layer: setattr(layer, "forward", functools.partial(torch.mul, 2.0)),
    "object": lambda layer: setattr(layer, "forward", Scale(2.0)),
    "class": of_another_class,
    "class of the same name": of_a_class_of_the_same_name,
    "number": lambda layer: setattr(layer, "in_features", 7),
    "not a number": lambda layer: setattr(layer, "in_features", float("nan")),
    "tensor beside": lambda layer: setattr(layer, "extra", [torch.ones(2)]),
    "dictionary": lambda layer: setattr(layer, "options", {"scale": 2.0}),
    "buffer": lambda layer: layer.register_buffer("extra", torch.ones(2)),
    "parametrization": parametrized,
    "dtype": lambda layer: layer.to(torch.float16),
    "one number": lambda layer: layer.weight.data[1, 1].add_(1),
    "bias": lambda layer: setattr(layer, "bias", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_layer_is_seen(foreign: ModelPatcher, change: str) -> None:
    assert is_alike(foreign)
    with torch.inference_mode():
        CHANGES[change](foreign.model.diffusion_model.img_in)
    assert not is_alike(foreign)


MODEL_CHANGES: dict[str, Callable[[Any], object]] = {
    "latent format": lambda model: setattr(model.latent_format, "scale_factor", 9.0),
    "another latent format": lambda model: setattr(model, "latent_format", comfy.latent_formats.SD15()),
    "kind of model": lambda model: setattr(model, "model_type", comfy.model_base.ModelType.EPS),
    "sampling": lambda model: model.model_sampling.set_parameters(shift=5.0),
    "another sampling": lambda model: setattr(model, "model_sampling", torch.nn.Identity()),
    "function": lambda model: setattr(model, "process_latent_in", lambda latent: latent * 2),
    "configuration": lambda model: model.model_config.unet_config.update(patch_size=4),
    "order of blocks": lambda model: model.diffusion_model.single_blocks._modules.update(
        {"0": model.diffusion_model.single_blocks[1], "1": model.diffusion_model.single_blocks[0]}
    ),
    "a block twice": lambda model: model.diffusion_model.single_blocks.__setitem__(
        1, model.diffusion_model.single_blocks[0]
    ),
    "a block more": lambda model: model.diffusion_model.single_blocks.append(model.diffusion_model.single_blocks[0]),
    "swapped": lambda model: swap(*model.diffusion_model.single_blocks[:2]),
}


def swap(one: Any, two: Any) -> None:
    one.linear1.weight, two.linear1.weight = two.linear1.weight, one.linear1.weight


@pytest.mark.parametrize("change", MODEL_CHANGES)
def test_a_change_of_the_model_is_seen(foreign: ModelPatcher, change: str) -> None:
    with torch.inference_mode():
        MODEL_CHANGES[change](foreign.model)
    assert not is_alike(foreign)


@pytest.mark.parametrize("strength", [0.0, 0.8])
def test_what_the_host_does_to_a_model_is_no_change(foreign: ModelPatcher, strength: float) -> None:
    patched = with_lora(foreign, strength)
    sample(patched)
    assert bool(foreign.backup) is (strength > 0)
    assert is_alike(foreign)
    assert bool(foreign.backup) is (strength > 0), "it was taken off the device"


def test_a_change_is_seen_while_patches_are_in_the_weights(foreign: ModelPatcher) -> None:
    patched = with_lora(foreign, 0.8)
    sample(patched)
    with torch.inference_mode():
        foreign.backup[next(iter(foreign.backup))].weight.mul_(2)
    assert not is_alike(foreign)


def test_two_functions_made_at_one_place_are_not_the_same() -> None:
    def holding(value: Any) -> ModelPatcher:
        layer = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(layer.weight)
        torch.nn.init.ones_(layer.bias)
        layer.act = value
        return ModelPatcher(torch.nn.Sequential(layer), torch.device("cpu"), torch.device("cpu"))

    values = [scaled(1.0), scaled(2.0), Scale(1.0), Scale(2.0), OtherScale(1.0), functools.partial(scaled, 1.0)]
    values += [functools.partial(scaled, 2.0), Scale(1.0).__call__, Scale(2.0).__call__, {1: Scale(1.0)}]
    for number, value in enumerate(values):
        found = [not difference(held_by(holding(value)), held_by(holding(other))) for other in values]
        assert found == [place == number for place in range(len(values))]


def test_not_a_number_is_what_it_is(models: Path, tmp_path: Path) -> None:
    """In every dtype; else such a model would be loaded anew whenever a node runs."""
    tensors = {name: tensor.clone() for name, tensor in load_file(models / MODEL).items()}
    weight = tensors["single_blocks.3.linear2.weight"]
    weight[0, 0] = weight[-1, -1] = weight[5] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    for dtype in (None, torch.bfloat16, torch.float8_e4m3fn):
        with torch.inference_mode():
            patcher = comfy.sd.load_diffusion_model(str(tmp_path / "nan.safetensors"), {"dtype": dtype})
        assert is_alike(patcher)
        with torch.inference_mode():
            patcher.model.diffusion_model.single_blocks[3].linear2.weight.data[0, 0] = 1.0
        assert not is_alike(patcher)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_one_number_of_a_large_weight_makes_a_difference(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """A file's dtype may be another than that of the model: what is compared of each must not hang on its bytes."""

    def holding(weight: torch.Tensor) -> ModelPatcher:
        layer = torch.nn.Linear(1, 1)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer.bias = None
        return ModelPatcher(layer, torch.device("cpu"), torch.device("cpu"))

    first, second = dtypes
    weight = torch.randn(1024, PIECE // 512, generator=torch.Generator().manual_seed(1)).to(first)
    for row, column in ((0, 0), (-1, -1), (500, 77)):
        other = weight.to(second, copy=True)
        other[row, column] += 1
        assert difference(held_by(holding(weight)), held_by(holding(other)), dtypes=False) == "weight"
    assert difference(held_by(holding(weight)), held_by(holding(weight.to(second, copy=True))), dtypes=False) == ""
