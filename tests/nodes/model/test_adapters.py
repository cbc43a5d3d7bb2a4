"""Patches of weights: every type of adapter, any sequence of them, and no work beyond what changes."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import comfy.lora
import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from adapters import ADAPTERS, LAYERS, lora_file
from comfy.model_patcher import ModelPatcher
from prompts import check_same, conditioning, guided
from sampling import MB, SIDE, sample, with_lora
from weightstream.nodes.model.patches import HostPatches

Load = Callable[..., Any]


def with_adapter(model: Any, kind: str, strength: float, seed: int = 0) -> Any:
    """As Load LoRA does with the tensors of its file."""
    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(model, None, lora_file(kind, seed), strength, 0.0)[0]


def originals(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def check_weights(model: Any, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor.to(expected[name].dtype), expected[name]), name


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Which weights were computed with patches, and how often."""
    counts: Counter[str] = Counter()
    compute = HostPatches.compute

    def count(self: HostPatches, name: str, original: torch.Tensor) -> torch.Tensor:
        counts[name] += 1
        return compute(self, name, original)

    monkeypatch.setattr(HostPatches, "compute", count)
    return counts


@pytest.fixture
def no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The host logs an adapter that fails or is unknown, and goes on without it: two such images would be equal."""
    yield
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.usefixtures("no_errors")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(streamed: Load, native: ModelPatcher, kind: str) -> None:
    model = streamed(64 * MB, vram_limit=28 * MB)
    plain = sample(native, steps=1)
    for strength in (0.7, 1.3, 0.2, 0.0, -0.5):
        expected = sample(with_adapter(native, kind, strength), steps=1)
        assert strength == 0.0 or not torch.equal(expected, plain)
        assert torch.equal(sample(with_adapter(model, kind, strength), steps=1), expected)
    assert torch.equal(sample(model, steps=1), plain)


def test_an_adapter_changes_each_of_its_layers(streamed: Load) -> None:
    """So that no type is tested on fewer layers than it seems."""
    model = streamed()
    for kind in ADAPTERS:
        patched = with_adapter(model, kind, 1.0).patches
        assert {f"diffusion_model.{layer}.weight" for layer in LAYERS} <= patched.keys()


@pytest.mark.usefixtures("no_errors")
def test_all_adapters_at_once(streamed: Load, native: ModelPatcher) -> None:
    def all_of_them(model: Any) -> Any:
        for number, kind in enumerate(set_first(ADAPTERS)):
            model = with_adapter(model, kind, 0.5 - 0.1 * number, seed=number)
        return with_lora(model, 0.3)

    check_same(streamed(), native, all_of_them, sample)


def wider_input(model: Any, strength: float = 0.7) -> Any:
    """As the LoRA of FLUX Canny and Depth do it: the first layer takes the control image too."""
    generator = torch.Generator().manual_seed(9)
    name = "diffusion_model.img_in"
    rank, outputs, inputs = 4, 256, 64
    lora = {
        f"{name}.lora_A.weight": torch.randn(rank, 2 * inputs, generator=generator) * 0.1,
        f"{name}.lora_B.weight": torch.randn(outputs, rank, generator=generator) * 0.1,
        f"{name}.reshape_weight": torch.tensor([outputs, 2 * inputs]),
    }
    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]


def edited(model: Any) -> torch.Tensor:
    """With a control image."""
    image = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    positive, negative = conditioning(1), conditioning(2)
    for prompt in (positive, negative):
        prompt[0][1]["concat_latent_image"] = image
    return guided(model, positive=positive, negative=negative)


@pytest.mark.parametrize("budget", [24 * MB, 64 * MB], ids=["streamed", "resident"])
def test_a_lora_that_widens_a_weight(streamed: Load, native: ModelPatcher, plain: torch.Tensor, budget: int) -> None:
    expected = edited(wider_input(native))
    both = edited(with_lora(wider_input(native, 0.4), 0.5))
    model = streamed(budget)
    for _ in range(2):
        assert torch.equal(edited(wider_input(model)), expected)
        assert torch.equal(sample(model), plain)
        assert torch.equal(edited(with_lora(wider_input(model, 0.4), 0.5)), both)
    mm.unload_all_models()
    assert model.loaded_size() == 0
    assert torch.equal(edited(wider_input(model)), expected)


def set_first(kinds: Any) -> list[str]:
    """What sets a weight would undo what came before it."""
    return sorted(kinds, key=lambda kind: kind != "set")


def test_only_what_changes_is_computed(streamed: Load, computed: Counter[str]) -> None:
    model = streamed(64 * MB, vram_limit=28 * MB)
    everywhere = with_lora(model, 0.5)
    few = {f"diffusion_model.{layer}.weight" for layer in LAYERS}

    def computed_for(patcher: Any) -> dict[str, int]:
        computed.clear()
        sample(patcher, steps=1)
        return dict(computed)

    assert computed_for(model) == {}
    assert computed_for(everywhere) == dict.fromkeys(everywhere.patches, 1)
    assert computed_for(everywhere.clone()) == {}
    both = with_adapter(everywhere, "LoKr", 0.5)
    assert computed_for(both) == dict.fromkeys(few, 1)
    stronger = with_adapter(everywhere, "LoKr", 0.6)
    assert computed_for(stronger) == dict.fromkeys(few, 1)
    assert computed_for(everywhere) == dict.fromkeys(few & everywhere.patches.keys(), 1)
    assert computed_for(model) == {}
    assert computed_for(with_lora(model, 0.0)) == {}


class Walk:
    """The same patches on a streamed model and on the host's, step by step and at random."""

    def __init__(self, streamed: Any, native: Any, seed: int) -> None:
        self.choose = random.Random(seed)
        self.bases = (streamed, native)
        self.pairs = [(streamed, native)]

    def step(self) -> tuple[Any, Any]:
        """A pair of MODELs: one that was there before, or a new one."""
        pair = self.choose.choice(self.pairs)
        if self.choose.random() < 0.3:
            return pair
        change = self.change()
        pair = tuple(change(model) for model in pair)
        self.pairs.append(pair)
        return pair

    def change(self) -> Callable[[Any], Any]:
        kind = self.choose.choice([*ADAPTERS, "clone", "everywhere"])
        strength = self.choose.choice([0.0, 0.3, 0.3, 1.0, -0.6, 1.7])
        seed = self.choose.randrange(3)
        if kind == "clone":
            return lambda model: model.clone()
        if kind == "everywhere":
            return lambda model: with_lora(model, strength)
        return lambda model: with_adapter(model, kind, strength, seed)

    def disturb(self) -> None:
        """What may lie between two prompts."""
        streamed = self.bases[0]
        event = self.choose.random()
        if event < 0.15:
            mm.unload_all_models()
        elif event < 0.35:
            streamed.partially_unload(streamed.offload_device, self.choose.randrange(1, 8 * MB))
        elif event < 0.5:
            streamed.streamer.finish_building()


@pytest.mark.usefixtures("no_errors")
@pytest.mark.parametrize(("seed", "limit"), [(0, 24 * MB), (1, 28 * MB), (2, 33 * MB), (3, None)])
def test_any_sequence_of_patches(streamed: Load, native: ModelPatcher, seed: int, limit: int | None) -> None:
    model = streamed(64 * MB, vram_limit=limit)
    loaded = originals(model)
    plain = sample(native, steps=1)
    walk = Walk(model, native, seed)
    expected = functools.cache(functools.partial(sample, steps=1))  # The host samples each MODEL once.
    for _ in range(30):
        ours, theirs = walk.step()
        assert torch.equal(sample(ours, steps=1), expected(theirs))
        walk.disturb()
    assert torch.equal(sample(model, steps=1), plain)
    check_weights(model, loaded)
    mm.unload_all_models()
    check_weights(model, loaded)
    model.streamer.close()
    check_weights(model, loaded)
