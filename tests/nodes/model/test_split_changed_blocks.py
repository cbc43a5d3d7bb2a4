"""What packs put into blocks and options has tensors at home: on other devices it computes all the same.

Fake GPUs with values (placed.py): an operation that mixes devices is an error, and what comes out is compared.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import pytest
import test_families_fake_gpus as fake
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock
from comfy.weight_adapter.bypass import BypassForwardHook
from comfy.weight_adapter.lora import LoRAAdapter
from families import FAMILIES
from family_models import build_tiny
from placed import Placed
from torch import nn

pytestmark = [
    pytest.mark.usefixtures("one_thread", "plenty_of_memory"),
    pytest.mark.filterwarnings("default"),
]

plenty_of_memory = fake.plenty_of_memory

HOME = fake.HOME
Home = Callable[[torch.Tensor], torch.Tensor]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


class Other(DoubleStreamBlock):
    """A block of a pack with the layers of the one in whose place it is, and a tensor of its own."""

    def __init__(self, original: nn.Module, scale: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({key: value for key, value in vars(original).items() if not key.startswith("_")})
        for name, child in original.named_children():
            setattr(self, name, child)
        self.scale = scale

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        img, txt = super().forward(*args, **kwargs)
        return img * self.scale, txt


def wrap_forward(module: nn.Module, wrapped: Callable[..., Any]) -> None:
    """``wrapped`` is given the forward that there is, and its arguments."""
    before = module.forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: wrapped(before, *args, **kwargs), module)


def blocks_of(model: Any) -> list[nn.Module]:
    return [*model.diffusion_model.double_blocks, *model.diffusion_model.single_blocks]


def in_options(model: Any, name: str, value: Any) -> None:
    def forward(before: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["transformer_options"][name] = value
        return before(*args, **kwargs)

    wrap_forward_orig(model, forward)


def wrap_forward_orig(model: Any, wrapped: Callable[..., Any]) -> None:
    root = model.diffusion_model
    before = root.forward_orig
    root.forward_orig = types.MethodType(lambda self, *args, **kwargs: wrapped(before, *args, **kwargs), root)


# -- what packs do -----------------------------------------------------------------------------------------------------


def another_block(model: Any, home: Home) -> None:
    blocks = model.diffusion_model.double_blocks
    for number, block in enumerate(blocks):
        blocks[number] = Other(block, home(noise(1)))


def layer_in_forward(model: Any, home: Home) -> None:
    layer = nn.Linear(blocks_of(model)[0].hidden_size, blocks_of(model)[0].hidden_size)
    layer.weight, layer.bias = (nn.Parameter(home(noise(*each.shape) / 8), False) for each in layer.parameters())
    for block in model.diffusion_model.double_blocks:

        def forward(before: Any, img: Any, *args: Any, **kwargs: Any) -> Any:
            img, txt = before(img, *args, **kwargs)
            return img + layer(img), txt

        wrap_forward(block, forward)


def state_in_forward(model: Any, home: Home) -> None:
    """It counts, and is written to, by each block."""
    state = home(torch.ones(1, 1, 1))
    for block in model.diffusion_model.single_blocks:

        def forward(before: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            x = before(x, *args, **kwargs)
            state.mul_(1.125)
            state.add_(x.mean())
            return x * state

        wrap_forward(block, forward)


def hook_on_layer(model: Any, home: Home) -> None:
    scale = home(noise(1))
    for block in model.diffusion_model.single_blocks:
        block.linear1.register_forward_hook(lambda module, args, output: output * scale)


class State:
    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask


def object_in_options(model: Any, home: Home) -> None:
    in_options(model, "state", State(home(noise(1, 1, 1))))
    for block in model.diffusion_model.double_blocks:

        def forward(before: Any, img: Any, *args: Any, **kwargs: Any) -> Any:
            img, txt = before(img, *args, **kwargs)
            return img * kwargs["transformer_options"]["state"].mask, txt

        wrap_forward(block, forward)


def attention_override(model: Any, home: Home) -> None:
    mask = home(noise(1))

    def override(function: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        return function(q * mask, k, v, *args, **kwargs)

    in_options(model, "optimized_attention_override", override)


def bypass_lora(model: Any, home: Home) -> None:
    for block in model.diffusion_model.double_blocks:
        layer = block.img_attn.proj
        outputs, inputs = layer.weight.shape
        adapter = LoRAAdapter(set(), (noise(outputs, 4), noise(4, inputs), 4.0, None, None, None))
        hook = BypassForwardHook(layer, adapter, 0.8)
        hook._move_adapter_weights_to_device = lambda device, dtype=None, adapter=adapter: setattr(
            adapter, "weights", tuple(home(w) if isinstance(w, torch.Tensor) else w for w in adapter.weights)
        )
        hook.inject()


def second_context(model: Any, home: Home) -> None:
    """NAG for Wan: made by the model's own layer, kept on the module, and read with the block's layers."""
    context = home(noise(1, 4, 64))
    for block in model.diffusion_model.blocks:
        attention = block.cross_attn
        attention.nag_context = context

        def forward(before: Any, x: Any, given: Any, *args: Any, attention: Any = attention, **kwargs: Any) -> Any:
            return before(x, given, *args, **kwargs) - 0.25 * before(x, attention.nag_context, *args, **kwargs)

        wrap_forward(attention, forward)


CHANGES = {
    "another block": ("Flux", another_block),
    "a layer in a block's forward": ("Flux", layer_in_forward),
    "a state in a block's forward": ("Flux", state_in_forward),
    "a hook on a layer": ("Flux", hook_on_layer),
    "an object in options": ("Flux", object_in_options),
    "an attention override": ("Flux", attention_override),
    "LoRA in bypass mode": ("Flux", bypass_lora),
    "NAG": ("WAN21_T2V", second_context),
}


def run(name: str, change: Callable[[Any, Home], None] | None, split: bool) -> torch.Tensor:
    """What one step gives, and the values of that."""
    model = build_tiny(name, FAMILIES[name])
    torch.manual_seed(0)
    with fake.gpus(values=True):
        if split:
            setup = fake.split(model, fake.blocks_of(model), values=True)
        else:
            for module in model.modules():
                fake.move(module, HOME, values=True)
        if change is not None:
            change(model, lambda tensor: Placed(tensor.detach().clone(), HOME))
            if split:  # As a load does, behind the changes.
                setup.boundary.attach(model.diffusion_model, list(setup.places.items()))
        output = fake.denoise(model, FAMILIES[name])
        assert output.device == HOME
        if split:
            setup.boundary.detach()
        return output.value


@pytest.mark.parametrize("title", CHANGES)
def test_what_a_pack_puts_into_blocks_computes_on_their_devices(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change = CHANGES[title]
    monkeypatch.setattr(mm, "get_torch_device", lambda: HOME)
    expected = run(name, change, split=False)
    assert not torch.equal(expected, run(name, None, split=False))
    assert torch.equal(run(name, change, split=True), expected)
