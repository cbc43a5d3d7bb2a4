"""Blocks of every family on three GPUs in turn, plain and with ControlNet residuals and transformer patches.

No GPU is needed: tensors are fake ones, which have no values, or for a few families placed ones (placed.py). Either
way an operation on tensors of two devices raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.model_management as mm
import pytest
import torch
from fake_gpus import GPUS, HOME, WITH_VALUES, SoundLinks, denoise, devices, forget_tables, gpus, move, plenty
from families import FAMILIES, USES
from family_models import build_tiny, build_tiny_outline, sample, whole
from placed import MixedDevicesError
from torch import nn
from torch.utils._pytree import tree_leaves
from transformer_patches import Points
from weightstream.nodes.model.parts import AROUND_STEPS, TRANSFORMER_PATCHES
from weightstream.nodes.model.streamed_model import model_dtype
from weightstream.streaming import cut_model
from weightstream.streaming.handoff import boundary as handoff
from weightstream.streaming.handoff.away import Away
from weightstream.streaming.handoff.boundary import Boundary
from weightstream.streaming.model.entries import Entries

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("default")]

# Models of which one runs in each stage, with four blocks when they are tiny.
TRELLIS = ("structure_model", "img2shape_512", "img2shape", "shape2txt")


def idle_trellis(runs: str) -> set[str]:
    return {f"{model}.blocks.{number}" for model in TRELLIS if model != runs for number in range(4)}


# Blocks that do not run here: for references that are not given, for text of another width, in other stages, and for
# training.
IDLE = {
    "Omnigen2": {"ref_image_refiner.0", "ref_image_refiner.1"},
    "Boogu": {"ref_image_refiner.0", "ref_image_refiner.1"},
    "MiniMaxH3": {"token_refiner.blocks.0", "token_refiner.blocks.1"},
    "ACEStep": {"projectors.0.4", "projectors.1.4"},
    "Trellis2": idle_trellis("structure_model"),
    "Trellis2, small shape": idle_trellis("img2shape_512"),
    "Trellis2, shape": idle_trellis("img2shape"),
    "Trellis2, texture": idle_trellis("shape2txt"),
}
# Of these blocks cannot be replaced: the host calls them with an argument that they do not have.
UNREPLACEABLE = ("Kandinsky5", "Kandinsky5Image")
# Of these the host's classes ask for no patch and no residual.
UNPATCHED = {
    *("Stable_Cascade_B", "PixArtAlpha", "PixArtSigma", "PixelDiTT2I", "PiD", "HiDream", "Omnigen2", "Boogu"),
    *("Ideogram4", "ErnieImage", "CosmosT2V", "CosmosI2V", "CogVideoX_T2V", "CogVideoX_I2V", "CogVideoX_Inpaint"),
    *("ACEStep", "ACEStep15", "TripoSplat", "MiniMaxMusic3", "Trellis2"),
}


class Setup(NamedTuple):
    """A tiny model with its blocks on several devices, and where its blocks ran."""

    model: nn.Module
    places: dict[nn.Module, torch.device]
    ran: dict[nn.Module, set[torch.device]]
    boundary: Boundary


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [block.module for block in cut_model(model, model_dtype, minimum_share=0).blocks]


def split(model: nn.Module, blocks: list[nn.Module], values: bool) -> Setup:
    """Block by block on one device after another, all else on the first. The only block is not on the first."""
    places = {block: GPUS[number % len(GPUS)] for number, block in enumerate(blocks, start=1)}
    owners = {module: place for block, place in places.items() for module in block.modules()}
    for module in model.modules():
        move(module, owners.get(module, HOME), values)
    boundary = Boundary(HOME, SoundLinks(), TRANSFORMER_PATCHES, ignored=AROUND_STEPS)
    ran = {block: watch(block) for block in blocks}
    boundary.attach(model.diffusion_model, list(places.items()))
    return Setup(model, places, ran, boundary)


def watch(block: nn.Module) -> set[torch.device]:
    """Where its layers run."""
    seen: set[torch.device] = set()

    def see(_: nn.Module, args: Any, output: Any) -> None:
        seen.update(devices(output))

    for module in block.modules():
        if module._parameters:
            Entries().watch(module, lambda *_: None, see, methods=False)  # As what watches is no stranger.
    return seen


def check(setup: Setup, output: torch.Tensor, idle: set[str]) -> None:
    """Everything ran where it is."""
    assert type(output) is not Away
    assert output.device == HOME
    names = {module: name for name, module in setup.model.diffusion_model.named_modules()}
    assert {names[block] for block, seen in setup.ran.items() if not seen} == idle
    assert all(seen <= {setup.places[block]} for block, seen in setup.ran.items())
    for seen in setup.ran.values():
        seen.clear()


@pytest.fixture(autouse=True)
def plenty_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host asks how much there is on a device."""
    monkeypatch.setattr(mm, "get_free_memory", plenty)


def patched_by(points: Points, family: str, replace: bool) -> Callable[[Any, dict[str, Any]], torch.Tensor]:
    """Gives a model patches and residuals of all kinds, and checks that they are left as they were."""

    def call(apply: Any, args: dict[str, Any]) -> torch.Tensor:
        conditioning = args["c"]
        options = conditioning["transformer_options"]
        options |= {"patches": points.patches(), "patches_replace": points.replacements() if replace else {}}
        conditioning["control"] = points.residuals(family)
        patches = tree_leaves((options["patches"], options["patches_replace"]))
        output = apply(args["input"], args["timestep"], **conditioning)
        assert tree_leaves((options["patches"], options["patches_replace"])) == patches
        assert devices((options, conditioning["control"])) == {HOME}
        return output

    return call


def by_frames(model: nn.Module) -> Callable[[Any, dict[str, Any]], torch.Tensor]:
    """Gives a model caches that blocks write to, as the host's sampler of one frame after another does."""
    root = model.diffusion_model

    def call(apply: Any, args: dict[str, Any]) -> torch.Tensor:
        x, options = args["input"], args["c"]["transformer_options"]
        batch, _, frames, height, width = x.shape
        caches = root.init_kv_caches(batch, frames * height * width // 4, HOME, x.dtype)
        state = {"kv_caches": caches, "crossattn_caches": root.init_crossattn_caches(batch, HOME, x.dtype)}
        found = []
        for frame in range(frames):
            options["ar_state"] = state | {"start_frame": frame}
            found.append(apply(x[:, :, frame : frame + 1], args["timestep"], **args["c"]))
        assert devices([[cache["k"], cache["v"]] for cache in caches]) == {HOME}
        return torch.cat(found, 2)

    return call


def run(use: str, values: bool = False, replace: bool = True) -> Points:
    """One step with patches and residuals, and a plain one, unless the first used none of them."""
    name, family = USES[use]
    points, idle = Points(HOME), IDLE.get(use, set())
    model = build_tiny(name, family) if values else build_tiny_outline(name, family)
    blocks = blocks_of(model)
    with gpus(values):
        setup = split(model, blocks, values)
        check(setup, denoise(model, family, patched_by(points, name, replace)), idle)
        if points.used or family.sampler:
            check(setup, denoise(model, family, by_frames(model) if family.sampler else None), idle)
        setup.boundary.detach()
    return points


def no_meeting(*_: Any) -> None:
    raise AssertionError("something of home would be brought to a block while it runs")


@pytest.mark.parametrize("use", USES)
def test_no_operation_mixes_devices(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "Meeting", no_meeting)
    name, _ = USES[use]
    points = run(use, values=use in WITH_VALUES, replace=name not in UNREPLACEABLE)
    assert points.used == points.asked
    assert bool(points.used) == (name not in {*UNPATCHED, *UNREPLACEABLE})


def test_nothing_fake_is_left_for_the_next_model() -> None:
    name = "LTXAV"  # The host remembers its rotary frequencies.
    model, family = build_tiny(name, FAMILIES[name]), FAMILIES[name]
    forget_tables()
    expected = sample(whole(model), family)
    forget_tables()
    run(name)
    assert torch.equal(sample(whole(model), family), expected)


@pytest.mark.parametrize("use", [use for use in WITH_VALUES if use in USES])
def test_values_are_read(use: str) -> None:
    with pytest.raises(RuntimeError, match=r"^aten\.\w+\.default$|not supported for tensor subclasses"):
        run(use)


@pytest.mark.parametrize("name", UNREPLACEABLE)
def test_blocks_cannot_be_replaced(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        run(name)


@pytest.mark.parametrize("values", [False, True], ids=["fake", "placed"])
def test_devices_mix_when_nobody_moves_tensors(values: bool) -> None:
    model = build_tiny("Flux", FAMILIES["Flux"])
    error = MixedDevicesError if values else RuntimeError
    blocks = blocks_of(model)
    with gpus(values):
        split(model, blocks, values).boundary.detach()
        with pytest.raises(error, match=r"cuda:0.*cuda:1|cuda:1.*cuda:0"):
            denoise(model, FAMILIES["Flux"])
