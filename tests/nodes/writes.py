"""Ways in which packs write to the weights of a model, and exchange or take away what it consists of."""

from __future__ import annotations

import copy
import ctypes
import warnings
from collections.abc import Callable
from typing import Any

import comfy.utils
import torch
from torch import nn

# In the rest, in a block as a matrix and as a bias, and outside of blocks.
NAMES = (
    "diffusion_model.double_blocks.1.img_attn.norm.query_norm.weight",
    "diffusion_model.single_blocks.3.linear2.weight",
    "diffusion_model.single_blocks.2.linear1.bias",
    "diffusion_model.img_in.weight",
)
Write = Callable[[Any], None]


def weights(model: Any) -> dict[str, torch.Tensor]:
    held = dict(model.model.named_parameters())
    return {name: held[name] for name in NAMES}


def other_values(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: 0.9 + 0.05 * torch.randn(held.shape, generator=generator) for name, held in weights(model).items()}


def load_state_dict(model: Any) -> None:
    model.model.load_state_dict(other_values(model), strict=False)


def set_data(model: Any) -> None:
    for name, value in other_values(model).items():
        weights(model)[name].data = value


def scale(model: Any) -> None:
    for held in weights(model).values():
        held.mul_(1.5)


def scale_a_view(model: Any) -> None:
    for held in weights(model).values():
        held.view(-1)[:64].mul_(1.5)


def change_one_number_by_data(model: Any) -> None:
    for held in weights(model).values():
        held.data.view(-1)[7] += 2.0


def turn_by_data(model: Any) -> None:
    """The same numbers in another order."""
    for held in weights(model).values():
        held.data.copy_(held.data.flip(0).clone())


def write_by_state_dict(model: Any) -> None:
    state = model.model.state_dict()
    for name in NAMES:
        state[name].add_(0.25)


def write_bytes(model: Any) -> None:
    for held in weights(model).values():
        held.view(torch.uint8)[..., :64].zero_()


def write_by_numpy_of_state_dict(model: Any) -> None:
    state = model.model.state_dict()
    for name in NAMES:
        state[name].numpy()[:] += 0.25


def write_to_storages(model: Any) -> None:
    """Of weights that stream or are not loaded. What is resident lies in one storage with others."""
    for name in NAMES[1:3]:
        held = weights(model)[name]
        whole = torch.tensor([], dtype=held.dtype).set_(held.untyped_storage())
        whole[held.storage_offset() : held.storage_offset() + held.numel()].mul_(1.5)


def write_by_dlpack(model: Any) -> None:
    for held in weights(model).values():
        torch.from_dlpack(held.detach()).mul_(1.5)


def write_by_pointers(model: Any) -> None:
    for held in weights(model).values():
        ctypes.memset(held.data_ptr(), 0, 64)


def wrap_parameters(model: Any) -> None:
    """New parameters around the weights, which are then written to by the old ones."""
    old = weights(model)
    for name, held in old.items():
        comfy.utils.set_attr(model.model, name, nn.Parameter(held, requires_grad=False))
    for held in old.values():
        held.mul_(1.5)


def normalise(model: Any) -> None:
    layer = model.model.diffusion_model.single_blocks[1].linear2
    nn.utils.parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.mul_(1.5)


def normalise_by_attributes(model: Any) -> None:
    layer = model.model.diffusion_model.single_blocks[1].linear2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)
    layer.weight_g.data.mul_(1.5)


def have_buffers_instead(model: Any) -> None:
    for layer in (model.model.diffusion_model.single_blocks[1].linear2, model.model.diffusion_model.img_in):
        weight = layer.weight.detach().clone() * 1.5
        del layer.weight
        layer.register_buffer("weight", weight)


def have_an_attribute_instead(model: Any) -> None:
    layer = model.model.diffusion_model.single_blocks[1].linear2
    bias = layer.bias.detach().clone() * 1.5
    del layer.bias
    layer.bias = bias.to("cpu")


def set_parameters(model: Any) -> None:
    for name, value in other_values(model).items():
        comfy.utils.set_attr_param(model.model, name, value)


def copy_to_parameters(model: Any) -> None:
    for name, value in other_values(model).items():
        comfy.utils.copy_to_param(model.model, name, value)


def exchange_layer(model: Any) -> None:
    block = model.model.diffusion_model.single_blocks[1]
    block.linear2 = copy.deepcopy(block.linear2)
    block.linear2.weight.mul_(0.5)


def round_layer(model: Any) -> None:
    model.model.diffusion_model.double_blocks[0].img_mlp[0].to(torch.float8_e5m2).to(torch.float32)


def take_bias_away(model: Any) -> None:
    model.model.diffusion_model.single_blocks[0].linear1.bias = None


def take_block_away(model: Any) -> None:
    del model.model.diffusion_model.single_blocks[2]


WRITES: dict[str, Write] = {
    write.__name__: write
    for write in (
        load_state_dict,
        set_data,
        scale,
        scale_a_view,
        change_one_number_by_data,
        turn_by_data,
        write_by_state_dict,
        write_bytes,
        write_by_numpy_of_state_dict,
        write_to_storages,
        write_by_dlpack,
        write_by_pointers,
        wrap_parameters,
        normalise,
        normalise_by_attributes,
        have_buffers_instead,
        have_an_attribute_instead,
        set_parameters,
        copy_to_parameters,
        exchange_layer,
        round_layer,
        take_bias_away,
        take_block_away,
    )
}
