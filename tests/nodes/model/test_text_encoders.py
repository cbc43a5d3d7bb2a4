"""Text encoders stream, and what they say is what ComfyUI's own say."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from sampling import MB
from text_encoders import FAMILIES, PROMPTS, Family, encode, load, random_patches, tokens_of, write_encoder
from weightstream.nodes.model.offload import Mode, OffloadSettings
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.model.text_encoder import with_patcher
from weightstream.nodes.settings import AsyncOffloadSettings, with_settings
from weightstream.nodes.twins.takeover import give_back
from weightstream.streaming import BudgetError, UnsupportedModelError, VirtualMemory

Device = Callable[[int], VirtualMemory]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def path(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoders") / f"{family.name}.safetensors"
    write_encoder(family, path)
    return path


@pytest.fixture
def clip(family: Family, path: Path, virtual_device: Device) -> comfy.sd.CLIP:
    """As the host loads it, with a virtual device of two thirds of its size."""
    clip = load(family, path)
    virtual_device(clip.patcher.model_size() * 2 // 3)
    return clip


def stream(clip: comfy.sd.CLIP, **settings: Any) -> comfy.sd.CLIP:
    with torch.inference_mode():
        return with_patcher(clip, with_settings(clip.patcher, OffloadSettings(**settings)))


def assert_same(ones: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    assert ones
    assert len(ones) == len(others)
    assert all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("mode", [Mode.AUTO, Mode.STREAM, Mode.SYNC])
def test_an_encoder_streams(clip: comfy.sd.CLIP, mode: Mode) -> None:
    ours = stream(clip, mode=mode)
    assert isinstance(ours.patcher, StreamedModelPatcher)
    assert stream(clip).cond_stage_model is ours.cond_stage_model, "it is not loaded for each setting"
    for text in (*PROMPTS, *PROMPTS):
        assert_same(encode(ours, text), encode(clip, text))
    status = ours.patcher.status()
    assert status["mode"] == ("synchronous" if mode is Mode.SYNC else "streamed")
    assert status["counters"]["steps"] == 4
    assert status["counters"]["copies"] > 0
    assert ours.patcher.streamed.name == clip.patcher.cached_patcher_init[1][0][0].rpartition("/")[2]
    specs = [spec for unit in ours.patcher.streamer.blocks.units for spec in unit.layout.specs]
    assert all(spec.source is not None for spec in specs)


def test_the_host_finds_no_leak(clip: comfy.sd.CLIP) -> None:
    """It has loaded the encoder that it built for us, and the patcher that it did so with is gone."""
    ours = stream(clip)
    assert not any(loaded.is_dead() for loaded in mm.current_loaded_models)
    assert_same(encode(ours, PROMPTS[0]), encode(clip, PROMPTS[0]))
    assert not any(loaded.is_dead() for loaded in mm.current_loaded_models)


def test_an_encoder_that_has_run_before_is_no_other_model(
    clip: comfy.sd.CLIP, caplog: pytest.LogCaptureFixture
) -> None:
    """ComfyUI writes to it on which device it runs."""
    expected = encode(clip, PROMPTS[0])
    with caplog.at_level("INFO"):
        ours = stream(clip)
    assert isinstance(ours.patcher, StreamedModelPatcher)
    assert "another model" not in caplog.text
    assert_same(encode(ours, PROMPTS[0]), expected)
    assert stream(clip).cond_stage_model is ours.cond_stage_model


@pytest.mark.parametrize("alike", [False, True])
def test_a_function_that_somebody_puts_around_a_call_is_not_lost(clip: comfy.sd.CLIP, alike: bool) -> None:
    ours = stream(clip)
    model = ours.cond_stage_model
    call = model.encode_token_weights

    def theirs(*args: Any, **options: Any) -> Any:
        output = call(*args, **options)
        return (output[0] * 2, *output[1:])

    model.encode_token_weights = functools.wraps(call)(theirs) if alike else theirs
    with pytest.raises(UnsupportedModelError, match="somebody has changed it since it was loaded"):
        give_back(ours.patcher)
    model.encode_token_weights = call
    assert_same(encode(with_patcher(ours, give_back(ours.patcher)), PROMPTS[0]), encode(clip, PROMPTS[0]))


def test_patches_on_an_encoder(clip: comfy.sd.CLIP) -> None:
    patches = random_patches(clip)
    plain = encode(clip, PROMPTS[0])
    patched = clip.clone()
    assert len(patched.add_patches(patches, 0.7)) == len(patches)
    expected = encode(patched, PROMPTS[0])
    assert not all(map(torch.equal, plain, expected))
    ours = stream(clip)
    ours_patched = ours.clone()
    ours_patched.add_patches(patches, 0.7)
    for _ in range(2):
        assert_same(encode(ours_patched, PROMPTS[0]), expected)
        assert_same(encode(stream(patched), PROMPTS[0]), expected)
        assert_same(encode(ours, PROMPTS[0]), plain)


def test_a_layer_before_the_last(clip: comfy.sd.CLIP) -> None:
    ours = stream(clip)
    for layer in (-2, -3):
        clip.clip_layer(layer)
        ours.clip_layer(layer)
        assert_same(encode(ours, PROMPTS[1]), encode(clip, PROMPTS[1]))


@pytest.mark.parametrize("family", ["gemma"], indirect=True)
def test_text_is_generated(clip: comfy.sd.CLIP) -> None:
    """The blocks run many times in one step."""
    ours = stream(clip)
    for text in PROMPTS:
        written = [one.generate(tokens_of(one, text), do_sample=False, max_length=5) for one in (clip, ours)]
        assert written[0] == written[1]
        assert len(written[0]) > 1
    assert ours.patcher.status()["mode"] == "streamed"


def test_off_and_back(clip: comfy.sd.CLIP) -> None:
    ours = stream(clip)
    off = stream(ours, mode=Mode.OFF)
    assert not isinstance(off.patcher, StreamedModelPatcher)
    again = stream(off)
    for one in (off, again):
        assert_same(encode(one, PROMPTS[1]), encode(clip, PROMPTS[1]))
    assert again.patcher.status()["mode"] == "streamed"


def test_one_minimum_is_right_for_both(streamed: Callable[..., Any], family: Family, path: Path) -> None:
    model, clip = streamed(64 * MB), load(family, path)
    with torch.inference_mode():
        with pytest.raises(BudgetError) as caught:
            AsyncOffloadSettings.execute(model, clip, vram_limit_gb=1e-6)
        alone = []
        for one in ((model, None), (None, clip)):
            with pytest.raises(BudgetError) as refused:
                AsyncOffloadSettings.execute(*one, vram_limit_gb=1e-6)
            alone.append(refused.value.minimum)
        assert caught.value.minimum == max(alone)
        AsyncOffloadSettings.execute(model, clip, vram_limit_gb=max(alone) / (1 << 30))


def test_model_and_encoder_through_the_node(streamed: Callable[..., Any], family: Family, path: Path) -> None:
    model, clip = streamed(24 * MB), load(family, path)
    with torch.inference_mode():
        result = AsyncOffloadSettings.execute(model, clip).result
        nothing = AsyncOffloadSettings.execute(model).result[1]
        none, alone = AsyncOffloadSettings.execute(None, clip).result
    assert nothing is None
    assert none is None
    assert isinstance(alone.patcher, StreamedModelPatcher), "without a MODEL"
    assert_same(encode(alone, PROMPTS[1]), encode(clip, PROMPTS[1]))
    assert isinstance(result[1].patcher, StreamedModelPatcher)
    assert not any(loaded.is_dead() for loaded in mm.current_loaded_models), "left behind by the host's loader"
    assert_same(encode(result[1], PROMPTS[0]), encode(clip, PROMPTS[0]))
    assert clip.patcher is not result[1].patcher
    mm.unload_all_models()
    assert result[1].patcher.streamer.device_bytes == 0
