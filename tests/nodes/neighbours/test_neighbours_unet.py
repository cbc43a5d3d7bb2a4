"""Nodes that act inside of a UNet: on what its blocks give, on its attention, on the size of its tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_freelunch import FreeU, FreeU_V2
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel
from family import Family
from family_models import build_tiny, streamed, whole
from prompts import Change, check_same, guided, output
from unet_families import UNET
from weightstream.nodes.model.patcher import StreamedModelPatcher

pytestmark = pytest.mark.usefixtures("one_thread")

# FreeU knows a block by how many times wider it is than the first, so the widths grow as in the real one.
SD15 = Family(UNET, {"model_channels": 32})
IMAGE = {"samples": torch.zeros(1, 4, 16, 16)}

run = partial(guided, image=IMAGE)


def deep_shrink(model: Any, block: int, after_skip: bool) -> Any:
    """The first half of the steps goes through the inner blocks at half the size."""
    return output(PatchModelAddDownscale.execute(model, block, 2.0, 0.0, 0.5, after_skip, "bicubic", "nearest-exact"))


def hypertile(model: Any, swap_size: int) -> Any:
    return output(HyperTile.execute(model, 32, swap_size, 1, True))


def relight(model: Any) -> Any:
    """As IC-Light: the first convolution takes four channels more, of a picture, and patches are for what is there;
    one is larger than the weight that the model came with."""
    first, last = "diffusion_model.input_blocks.0.0", "diffusion_model.out.2"
    generator = torch.Generator().manual_seed(5)
    model = model.clone()
    old = model.get_model_object(first)
    wider = torch.nn.Conv2d(8, old.out_channels, 3, padding=1).requires_grad_(False)
    wider.weight.zero_()
    wider.weight[:, :4] = old.weight
    wider.bias.copy_(old.bias)
    model.add_object_patch(first, wider)
    shapes = {f"{first}.weight": wider.weight.shape, f"{last}.weight": model.get_model_object(last).weight.shape}
    model.add_patches({name: (0.05 * torch.randn(shape, generator=generator),) for name, shape in shapes.items()}, 0.8)
    picture = torch.randn(1, 4, 16, 16, generator=generator)

    def with_picture(apply: Any, args: dict[str, Any]) -> torch.Tensor:
        shown = picture.to(args["input"]).expand(len(args["input"]), -1, -1, -1)
        return apply(args["input"], args["timestep"], **{**args["c"], "c_concat": shown})

    model.set_model_unet_function_wrapper(with_picture)
    return model


NODES: dict[str, Change] = {
    "FreeU": lambda model: output(FreeU.execute(model, 1.1, 1.2, 0.9, 0.2)),
    "FreeU_V2": lambda model: output(FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2)),
    "HyperTile": lambda model: hypertile(model, 1),
    "HyperTile at random": lambda model: hypertile(model, 3),
    "deep shrink after the skip": lambda model: deep_shrink(model, 3, True),
    "deep shrink before the skip": lambda model: deep_shrink(model, 4, False),
    "PerturbedAttentionGuidance": lambda model: output(PerturbedAttentionGuidance.execute(model, 3.0)),
    "SelfAttentionGuidance": lambda model: output(SelfAttentionGuidance.execute(model, 0.5, 2.0)),
    "IC-Light": relight,
    "TomePatchModel": lambda model: output(TomePatchModel.execute(model, 0.5)),
}


@pytest.fixture(scope="module")
def native() -> ModelPatcher:
    model = whole(build_tiny("SD15", SD15))
    run(model)  # The host's first sampling in a process may differ from all of its later ones.
    return model


@pytest.fixture
def model() -> StreamedModelPatcher:
    return streamed("SD15", build_tiny("SD15", SD15))


@pytest.mark.parametrize("node", NODES)
def test_a_node_of_unets(model: StreamedModelPatcher, native: ModelPatcher, node: str) -> None:
    check_same(model, native, NODES[node], run)
    assert model.streamer.plan.segments


def test_several_nodes_of_unets_at_once(model: StreamedModelPatcher, native: ModelPatcher) -> None:
    def chain(base: Any) -> Any:
        for node in ("FreeU", "HyperTile", "deep shrink after the skip", "PerturbedAttentionGuidance"):
            base = NODES[node](base)
        return base

    check_same(model, native, chain, partial(run, steps=4))
