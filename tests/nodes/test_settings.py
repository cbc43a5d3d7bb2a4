"""The node "Async Offload Settings": any MODEL streams as it says, and gives what it gave before."""

from __future__ import annotations

import gc
import json
import math
import re
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from prompts import SETTINGS
from sampling import MB, MODEL, Patched, sample, sample_with_hook, with_lora
from told import entry_of
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.offload import ROUND_GIB, STEP_GIB, Mode, OffloadSettings
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.settings import AsyncOffloadSettings, with_settings
from weightstream.nodes.twins import takeover
from weightstream.streaming import BudgetError, ConfigError, PackingMode, VirtualMemory

import nodes as host_nodes

Load = Callable[..., StreamedModelPatcher]
Device = Callable[[int], VirtualMemory]


def settings_node(model: ModelPatcher, **changes: Any) -> Any:
    with torch.inference_mode():
        return AsyncOffloadSettings.execute(model, **{**SETTINGS, **changes}).result[0]


@pytest.fixture
def foreign(models: Path, virtual_device: Device) -> ModelPatcher:
    """A MODEL from the host's own loader, on a device that it does not fit."""
    virtual_device(24 * MB)
    with torch.inference_mode():
        return host_nodes.UNETLoader().load_unet(MODEL, "default")[0]


@pytest.mark.parametrize("mode", ["auto", "stream", "sync"])
def test_a_model_of_another_loader_streams(foreign: ModelPatcher, native: ModelPatcher, mode: str) -> None:
    model = settings_node(foreign, mode=mode)
    for seed in (3, 4):
        assert torch.equal(sample(model, seed), sample(native, seed))
    assert isinstance(model, StreamedModelPatcher)
    assert model.streamed.name == MODEL
    assert model.status()["mode"] == ("synchronous" if mode == "sync" else "streamed")
    assert (model.status()["resident_bytes"] == 0) is (mode == "stream")
    assert (len(model.streamer.backend._streams) == 0) is (mode == "sync")
    specs = [spec for unit in model.streamer.blocks.units for spec in unit.layout.specs]
    assert specs
    assert all(spec.source is not None for spec in specs)


def test_a_model_without_a_factory_streams_from_its_memory(foreign: ModelPatcher, plain: torch.Tensor) -> None:
    foreign.cached_patcher_init = None
    sample(foreign)
    model = settings_node(foreign)
    assert torch.equal(sample(model), plain)
    assert model.status()["mode"] == "streamed"
    assert model.streamed.name == "Flux"
    theirs = foreign.model.diffusion_model.img_in.weight
    assert theirs.data_ptr() in {spec.original.data_ptr() for spec in model.streamer.blocks.specs}
    assert torch.equal(sample(foreign), plain)
    assert settings_node(model, mode="off").model is foreign.model


def test_a_model_that_cannot_be_copied_passes_through(foreign: ModelPatcher, caplog: pytest.LogCaptureFixture) -> None:
    foreign.cached_patcher_init = None
    foreign.model.diffusion_model.img_in.lock = threading.Lock()
    with caplog.at_level("INFO"):
        assert settings_node(foreign) is foreign
    assert "left as it is: its modules cannot be copied" in caplog.text


def test_what_hangs_on_the_model_comes_along(
    foreign: ModelPatcher, plain: torch.Tensor, plain_with_lora: Patched
) -> None:
    expected = plain_with_lora(0.7)
    assert torch.equal(sample(settings_node(with_lora(foreign, 0.7))), expected)
    assert torch.equal(sample(with_lora(settings_node(foreign), 0.7)), expected)
    assert torch.equal(sample(settings_node(foreign)), plain)
    seen = []
    foreign.set_model_unet_function_wrapper(
        lambda run, args: seen.append(1) or run(args["input"], args["timestep"], **args["c"])
    )
    assert torch.equal(sample(settings_node(foreign)), plain)
    assert seen


def test_the_model_that_came_in_is_left_alone(foreign: ModelPatcher, plain: torch.Tensor) -> None:
    model = settings_node(foreign)
    for _ in range(2):
        assert torch.equal(sample(model), plain)
        assert torch.equal(sample(foreign), plain)
    assert not isinstance(foreign, StreamedModelPatcher)
    assert model.model is not foreign.model


def test_other_settings_load_no_second_time(foreign: ModelPatcher, plain: torch.Tensor) -> None:
    first = settings_node(foreign)
    second = settings_node(foreign, mode="sync")
    assert second.model is first.model
    for model, streams in ((first, 2), (second, 0), (first, 2)):
        assert torch.equal(sample(model), plain)
        assert len(model.streamer.backend._streams) == streams


@pytest.mark.parametrize("budget", [24 * MB, 64 * MB], ids=["streamed", "resident"])
def test_patches_in_its_weights_are_no_reason_to_load_it_anew(
    foreign: ModelPatcher, plain_with_lora: Patched, virtual_device: Device, budget: int
) -> None:
    virtual_device(budget)
    first = settings_node(foreign)
    expected = plain_with_lora(0.7)
    for _ in range(2):
        assert torch.equal(sample(with_lora(first, 0.7)), expected)
        assert settings_node(foreign, copy_streams=1).model is first.model


def test_a_twin_goes_with_the_model_that_came_in(models: Path, virtual_device: Device) -> None:
    virtual_device(24 * MB)
    with torch.inference_mode():
        foreign = host_nodes.UNETLoader().load_unet(MODEL, "default")[0]
    model = settings_node(foreign)
    sample(model)
    twin = weakref.ref(model.model)
    assert len(takeover._twins) == 1
    mm.unload_all_models()
    del model, foreign
    gc.collect()
    mm.cleanup_models_gc()
    assert twin() is None
    assert len(takeover._twins) == 0


@pytest.mark.parametrize("lora", [0.0, 0.5])
def test_off_is_the_hosts_own_way(streamed: Load, foreign: ModelPatcher, native: ModelPatcher, lora: float) -> None:
    expected = sample(with_lora(native, lora) if lora else native)
    for model in (streamed(), foreign, settings_node(foreign)):
        off = settings_node(with_lora(model, lora) if lora else model, mode="off")
        assert not isinstance(off, StreamedModelPatcher)
        assert torch.equal(sample(off), expected)
        again = settings_node(off)
        assert isinstance(again, StreamedModelPatcher)
        assert torch.equal(sample(again), expected)


def test_settings_of_a_streamed_model(streamed: Load, native: ModelPatcher, plain: torch.Tensor) -> None:
    model = streamed(64 * MB)
    assert model.status()["pinned_bytes"] == 0
    limited = with_settings(model, OffloadSettings(vram_limit=14 * MB, pinned_limit=5 * MB, prefetch_depth=1))
    for seed in (3, 4, 5):
        assert torch.equal(sample(limited, seed), sample(native, seed))
    status = limited.status()
    assert status["device_peak_bytes"] <= 14 * MB
    assert 0 < status["pinned_bytes"] <= 5 * MB
    assert status["staged_bytes"] > 0
    plan = limited.streamer.plan
    assert plan.staging_bytes <= 2 * max(segment.nbytes for segment in plan.segments)
    assert "this model's limit of 5.0 MiB page-locked memory is reached" in status["note"]
    assert torch.equal(sample(model), plain)
    assert model.status()["mode"] == "resident"


def test_page_locking_on_and_off(streamed: Load, plain: torch.Tensor) -> None:
    for setting, locked in (("off", False), ("on", True), ("auto", True)):
        model = settings_node(streamed(), pin_memory=setting)
        assert torch.equal(sample(model), plain)
        model.streamer.finish_building()
        assert (model.status()["pinned_bytes"] > 0) is locked


def test_packing_is_as_the_node_says(streamed: Load, plain: torch.Tensor) -> None:
    """The small model has float32 weights, of which none can be packed: where that was asked for, it is told."""
    for setting, mode in (("auto", PackingMode.AUTO), ("off", PackingMode.OFF), ("on", PackingMode.ON)):
        model = settings_node(streamed(), packing=setting)
        assert torch.equal(sample(model), plain)
        assert model.streamer.config.packing is mode
        why = model.status()["why_unpacked"]
        assert ("do not stream packed: none that streams is held" in why) is (setting == "on")
        assert why in model.streamer.explain()
    assert settings_node(streamed()).settings.packing is PackingMode.AUTO


def test_weights_of_16_bits_stream_packed(models: Path, virtual_device: Device) -> None:
    """What hooks of the host change streams as it is, and the status says so."""
    virtual_device(64 * MB)
    path, options = str(models / MODEL), {"dtype": torch.bfloat16}
    with torch.inference_mode():
        native, model = comfy.sd.load_diffusion_model(path, options), load_streamed(path, options)
    model = settings_node(model, mode="stream", packing="on")
    sample(native)  # The first sampling may differ from all later ones.
    for strength in (0.0, 0.7):
        ours, theirs = (with_lora(each, strength) if strength else each for each in (model, native))
        assert torch.equal(sample(ours), sample(theirs))
        entry = entry_of(model)
        share = entry["streamed_block_bytes"] / entry["streamed_weight_bytes"]
        assert 0.70 < share < 0.75
        assert entry["why_unpacked"] == ""
        assert 0.95 < entry["pinned_bytes"] / entry["streamed_block_bytes"] <= 1  # Slots are as large as was planned.
        assert "of weights) a step streamed" in entry["plan"]
    mode = comfy.hooks.EnumHookMode.MinVram
    assert torch.equal(sample_with_hook(model, mode), sample_with_hook(native, mode))
    assert entry_of(model)["why_unpacked"] == "weights do not stream packed: hooks change them in this prompt"


def test_the_minimum_that_is_named_is_enough_at_once_and_later(streamed: Load, native: ModelPatcher) -> None:
    """Not the one that is enough once the order of parts is known: with other settings it is learned anew."""
    model, named = streamed(64 * MB), []
    for seed in (3, 4):
        with pytest.raises(
            BudgetError, match=r"^vram_limit_gb=0\.001 is too small for .* at least \d+\.\d\d \(GiB\)"
        ) as caught:
            settings_node(model, vram_limit_gb=0.001)
        (least,) = re.findall(r"at least (\d+\.\d\d) ", str(caught.value))
        named.append((least, caught.value.minimum))
        limited = settings_node(model, vram_limit_gb=float(least))
        assert torch.equal(sample(limited, seed), sample(native, seed))
        assert limited.status()["device_peak_bytes"] <= float(least) * (1 << 30)
    assert named[0] == named[1]


def test_the_inputs_take_a_value_as_fine_as_the_minimum() -> None:
    inputs = {item.id: item for item in AsyncOffloadSettings.define_schema().inputs}
    for name in ("vram_limit_gb", "pinned_limit_gb", "reserve_vram_gb"):
        assert (inputs[name].step, inputs[name].round) == (STEP_GIB, ROUND_GIB)
        # The page shows as many digits as this, and rounds to them.
        assert math.floor(math.log10(STEP_GIB)) == math.floor(math.log10(ROUND_GIB)) == -2


# -- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("fastest", OffloadSettings()),
        ("leave 2 GiB for others", OffloadSettings(reserve_vram=2 << 30)),
        ("least VRAM", OffloadSettings(mode=Mode.STREAM)),
        ("debug", OffloadSettings(mode=Mode.SYNC, packing=PackingMode.OFF)),
    ],
)
def test_a_preset_decides_whatever_the_inputs_say(streamed: Load, preset: str, settings: OffloadSettings) -> None:
    others = {"mode": "auto", "copy_streams": 3, "vram_limit_gb": 1.0, "pin_memory": "off", "reserve_vram_gb": 1.0}
    assert settings_node(streamed(64 * MB), **others, preset=preset).settings == settings
    with torch.inference_mode():
        alone = AsyncOffloadSettings.execute(streamed(64 * MB), preset=preset)
    assert alone.result[0].settings == settings, "an API prompt needs no other input"


def test_custom_changes_nothing(streamed: Load) -> None:
    chosen = {"mode": "sync", "copy_streams": 3, "vram_limit_gb": 1.0, "pinned_limit_gb": 0.5, "packing": "off"}
    model = streamed(64 * MB)
    assert settings_node(model, **chosen, preset="custom").settings == settings_node(model, **chosen).settings


def test_a_preset_decides_every_input_and_the_page_knows_what() -> None:
    schema = AsyncOffloadSettings.define_schema()
    *others, last = schema.inputs
    values = {item.id: item.default for item in others if item.id not in ("model", "clip")}
    assert (last.id, last.default, last.optional) == ("preset", "custom", True)
    told = last.as_dict()["weightstream_presets"]
    assert [*told] == last.options
    assert told["custom"] == {}
    assert told["fastest"] == values, "the values that the node has at first"
    for name, preset in told.items():
        assert name == "custom" or preset.keys() == values.keys()
    json.dumps(told)


# -- what is connected -------------------------------------------------------------------------------------------------


def test_nothing_connected_is_said(streamed: Load) -> None:
    with pytest.raises(ConfigError, match="connect model, clip, or both"):
        AsyncOffloadSettings.execute()


def test_inputs_of_saved_workflows_keep_their_places() -> None:
    """The page saves values without names, in the order in which the host lists the inputs."""
    groups = AsyncOffloadSettings.INPUT_TYPES()
    values = [name for group in ("required", "optional") for name in groups[group] if name not in ("model", "clip")]
    assert values == [*SETTINGS, "preset"]
    assert [entry.io_type for entry in AsyncOffloadSettings.define_schema().outputs] == ["MODEL", "CLIP"]


def test_a_limit_that_is_too_small_is_refused(streamed: Load, foreign: ModelPatcher) -> None:
    for model in (streamed(), foreign):
        for _ in range(2):  # The second time it is known already.
            with pytest.raises(BudgetError, match="vram_limit_gb"):
                settings_node(model, vram_limit_gb=0.001)
            settings_node(model)
        assert isinstance(settings_node(model), StreamedModelPatcher)


def test_a_loaders_limit_stays_unless_the_node_has_one(streamed: Load) -> None:
    model = streamed(64 * MB, vram_limit=14 * MB)
    assert settings_node(model).settings == OffloadSettings(vram_limit=14 * MB)
    assert settings_node(model, vram_limit_gb=1.0).settings == OffloadSettings(vram_limit=1 << 30)
    assert settings_node(settings_node(model, mode="sync")).settings.mode is Mode.AUTO
