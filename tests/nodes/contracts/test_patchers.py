"""What a MODEL of the host does: clones, patches, hooks, what hangs on it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management as mm
import comfy.model_patcher
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from sampling import MB, MODEL, sample, with_lora
from small_patcher import CPU, WEIGHT, SmallModel, difference, small_patcher
from weightstream.nodes.host import hosts
from weightstream.nodes.model.offload import Mode, OffloadSettings
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.settings import with_settings
from weightstream.nodes.twins.components import patcher_on
from weightstream.nodes.twins.takeover import carry_over

import nodes as host_nodes

Load = Callable[..., StreamedModelPatcher]

# What a patcher has for one use of its model. The rest is of the model, by the rule in hosts.py.
OF_THE_USE = {
    *("patches", "patches_uuid", "object_patches", "weight_wrapper_patches", "model_options", "force_cast_weights"),
    *("attachments", "additional_models", "callbacks", "wrappers", "is_injected", "skip_injection", "injections"),
    *("hook_patches", "hook_patches_backup", "cached_hook_patches", "current_hooks", "forced_hooks", "hook_mode"),
    *("is_clip", "is_multigpu_base_clone"),
}


class Ours(ModelPatcher):
    """A patcher of a pack, which takes whatever the host gives it."""

    def __init__(self, model: torch.nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(model, *args, **options)


def test_a_clone_is_of_the_class_of_its_patcher_and_has_the_same_model() -> None:
    patcher = small_patcher(Ours)
    clone = patcher.clone()
    assert type(clone) is Ours
    assert clone.model is patcher.model
    assert clone.is_clone(patcher)
    assert clone.parent is patcher


def test_a_clone_has_patches_options_and_wrappers_of_its_own() -> None:
    patcher = small_patcher()
    clone = patcher.clone()
    clone.add_patches({WEIGHT: difference()}, 0.5)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", lambda *_: None)
    clone.model_options["transformer_options"]["test"] = 1
    assert patcher.patches == {}
    assert patcher.get_wrappers(WrappersMP.APPLY_MODEL, "test") == []
    assert patcher.model_options["transformer_options"] == {}
    assert clone.patches_uuid != patcher.patches_uuid


def test_a_clone_of_another_model_takes_all_that_belongs_to_that() -> None:
    patcher, other = small_patcher(), small_patcher()
    clone = patcher.clone(disable_dynamic=True, model_override=other.get_clone_model_override())
    assert clone.model is other.model
    shared = {"backup", "backup_buffers", "object_patches_backup", "pinned"}
    assert shared <= hosts.what_is_of_the_model(patcher)
    assert all(getattr(clone, name) is getattr(other, name) for name in shared)


def test_every_attribute_of_a_patcher_is_of_its_model_or_of_its_use() -> None:
    """A new one that is neither an argument of the constructor nor known here: decide which it is, then list it."""
    patcher = small_patcher()
    assert set(vars(patcher)) - hosts.what_is_of_the_model(patcher) - OF_THE_USE == set()


def test_a_patcher_keeps_the_arguments_of_its_constructor() -> None:
    own = set(inspect.signature(ModelPatcher.__init__).parameters) - {"self"}
    assert own <= set(vars(small_patcher()))
    dynamic = set(inspect.signature(comfy.model_patcher.ModelPatcherDynamic.__init__).parameters) - {"self"}
    assert dynamic <= own, "a model that is dynamic is cloned as one that is not"


@pytest.fixture
def unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose patchers take an argument that nobody has heard of, keep it, and pass it on to clones."""
    original, clone = ModelPatcher.__init__, ModelPatcher.clone

    @functools.wraps(original)
    def begin(self: Any, *given: Any, unheard: str = "", **options: Any) -> None:
        original(self, *given, **options)
        self.unheard = unheard

    known = inspect.signature(original)
    more = inspect.Parameter("unheard", inspect.Parameter.KEYWORD_ONLY, default="")
    begin.__signature__ = known.replace(parameters=[*known.parameters.values(), more])

    def passing_on(self: Any, *args: Any, **options: Any) -> Any:
        kind, told = type(self), self.unheard
        begun = kind.__init__

        def told_more(other: Any, *given: Any, **more: Any) -> None:
            begun(other, *given, **{**more, "unheard": told})

        monkeypatch.setattr(kind, "__init__", told_more)
        try:
            return clone(self, *args, **options)
        finally:
            monkeypatch.setattr(kind, "__init__", begun)

    monkeypatch.setattr(ModelPatcher, "__init__", begin)
    monkeypatch.setattr(ModelPatcher, "clone", passing_on)


@pytest.mark.usefixtures("unheard")
def test_an_argument_that_nobody_has_heard_of_stays_with_the_model(streamed: Load, models: Path) -> None:
    with torch.inference_mode():
        theirs = host_nodes.UNETLoader().load_unet(MODEL, "default")[0]
    theirs.unheard = "of the file"
    expected = sample(with_lora(theirs, 0.5))
    streamed(24 * MB)
    ours = with_settings(theirs, OffloadSettings())
    assert isinstance(ours, StreamedModelPatcher)
    assert ours.unheard == ours.clone().unheard == "of the file"
    assert torch.equal(sample(with_lora(ours, 0.5)), expected)
    # Carried over to another model it would say something false of that.
    other = small_patcher(unheard="of another file")
    assert carry_over(with_lora(theirs, 0.5), other).unheard == "of another file"
    native = with_settings(ours, OffloadSettings(mode=Mode.OFF))
    assert native.unheard == "of the file"


@pytest.mark.usefixtures("unheard")
@pytest.mark.parametrize("devices", [1, 2])
def test_a_streamed_model_passes_on_what_it_is_given(streamed: Load, machine: Any, models: Path, devices: int) -> None:
    from weightstream.nodes.loader import load_streamed
    from weightstream.nodes.model.parts import split_blocks

    machine(2)
    with torch.inference_mode():
        model = load_streamed(str(models / MODEL), {})
        if devices == 2:
            split_blocks(model, [torch.device("cpu", 0), torch.device("cpu", 1)], None)
    model.unheard = "of the file"
    for part in model.parts:
        part.unheard = "of the file"
    clone = model.clone()
    assert clone.unheard == "of the file"
    assert [part.unheard for part in clone.parts] == ["of the file"] * (devices - 1)
    plain = sample(model)
    assert not torch.equal(sample(with_lora(clone, 0.7)), plain)
    assert torch.equal(sample(clone), plain)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.partially_load(CPU, 20 * MB, force_patch_weights=False, unheard=1),
        lambda model: model.partially_unload(CPU, MB, unheard=1),
        lambda model: model.load(CPU, 20 * MB, unheard=1),
        lambda model: model.model_state_dict_for_saving(unheard=1),
    ],
)
def test_what_a_newer_host_passes_besides_is_taken(
    streamed: Load, native: ModelPatcher, call: Callable[[StreamedModelPatcher], Any]
) -> None:
    """Of methods that do the host's work in our own way."""
    model = streamed(24 * MB)
    expected = sample(native)
    assert torch.equal(sample(model), expected)
    call(model)
    assert torch.equal(sample(model), expected)


PASSED_ON = {
    "unpatch_model": lambda model, **more: model.unpatch_model(None, False, **more),
    "patch_hooks": lambda model, **more: model.patch_hooks(None, **more),
    "unpatch_hooks": lambda model, **more: model.unpatch_hooks(**more),
    "get_key_patches": lambda model, **more: model.get_key_patches(**more),
    "match_multigpu_clones": lambda model, **more: model.match_multigpu_clones(**more),
}


@pytest.mark.parametrize("name", PASSED_ON)
def test_what_a_newer_host_passes_besides_is_passed_on(
    streamed: Load, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of methods behind which the host's own does its part."""
    model, original, got = streamed(24 * MB), getattr(ModelPatcher, name), []

    def newer(self: Any, *args: Any, unheard: int = 0, **options: Any) -> Any:
        got.append(unheard)
        return original(self, *args, **options)

    monkeypatch.setattr(ModelPatcher, name, newer)
    PASSED_ON[name](model, unheard=7)
    assert 7 in got


def test_a_dynamic_patcher_says_so_and_its_factory_gives_one_that_is_not(models: Path) -> None:
    dynamic, asked = small_patcher(Dynamic), []
    assert (dynamic.is_dynamic(), small_patcher().is_dynamic()) == (True, False)

    def factory(*args: Any, **options: Any) -> ModelPatcher:
        asked.append((args, options))
        return small_patcher()

    dynamic.cached_patcher_init = (factory, (1, 2))
    clone = dynamic.clone(disable_dynamic=True)
    assert asked == [((1, 2), {"disable_dynamic": True})]
    assert type(clone) is ModelPatcher
    with torch.inference_mode():
        function, arguments, *_ = host_nodes.UNETLoader().load_unet(MODEL, "default")[0].cached_patcher_init
    assert function(*arguments, disable_dynamic=True).model is not None


class Dynamic(ModelPatcher):
    def is_dynamic(self) -> bool:
        return True


def test_additional_models_are_cloned_and_loaded_with_their_model() -> None:
    patcher, additional = small_patcher(), small_patcher()
    patcher.set_additional_models("test", [additional])
    [found] = patcher.clone().get_additional_models_with_key("test")
    assert found is not additional
    assert found.is_clone(additional)
    assert additional in patcher.get_additional_models()
    patcher.remove_additional_models("test")
    assert patcher.get_additional_models_with_key("test") == []


def test_a_patched_weight_is_given_and_the_one_in_the_model_stays() -> None:
    patcher = small_patcher()
    before = patcher.model.first.weight.detach().clone()
    patcher.add_patches({WEIGHT: difference()}, 0.5)
    patched = patcher.patch_weight_to_device(WEIGHT, device_to=CPU, return_weight=True)
    assert torch.equal(patched, before + 0.5)
    assert torch.equal(patcher.model.first.weight, before)
    assert patcher.backup == {}
    [(strength, _, model_strength, offset, function)] = patcher.patches[WEIGHT]
    assert (strength, model_strength, offset, function) == (0.5, 1.0, None, None)


def test_object_patches_are_put_in_without_weights_and_taken_out() -> None:
    patcher, patch = small_patcher(), torch.nn.Identity()
    before = patcher.model.second
    patcher.add_object_patch("second", patch)
    patcher.patch_model(load_weights=False)
    assert patcher.model.second is patch
    patcher.unpatch_model(device_to=None, unpatch_weights=False)
    assert patcher.model.second is before


def test_patches_of_hooks_are_written_into_the_weights_and_taken_back() -> None:
    patcher = small_patcher()
    before = patcher.model.first.weight.detach().clone()
    hook = comfy.hooks.WeightHook(strength_model=1.0)
    hook.weights, hook.need_weight_init = {WEIGHT: difference()}, False
    hooks = comfy.hooks.HookGroup()
    hooks.add(hook)
    patcher.add_hook_patches(hook=hook, patches=hook.weights, strength_patch=1.0)
    assert set(patcher.get_combined_hook_patches(hooks)) == {WEIGHT}
    patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    patcher.patch_hooks(hooks)
    assert torch.equal(patcher.model.first.weight, before + 1)
    assert set(patcher.hook_backup) == {WEIGHT}
    patcher.unpatch_hooks()
    assert torch.equal(patcher.model.first.weight, before)
    assert patcher.hook_backup == {}


def test_callbacks_for_loading_are_called_behind_it() -> None:
    patcher, called = small_patcher(), []
    patcher.add_callback(CallbacksMP.ON_LOAD, lambda *args: called.append(args[:2]))
    patcher.partially_load(CPU, 1e32)
    assert called == [(patcher, CPU)]
    patcher.detach()


def test_injections_are_out_while_weights_are_placed() -> None:
    patcher, told = small_patcher(), []
    inject = comfy.model_patcher.PatcherInjection(
        inject=lambda _: told.append("in"), eject=lambda _: told.append("out")
    )
    patcher.set_injections("test", [inject])
    patcher.inject_model()
    with patcher.use_ejected():
        told.append("placing")
    assert told == ["in", "out", "placing", "in"]


@pytest.mark.skipif(
    not hosts.is_newer_than_known(),
    reason=f"ComfyUI {hosts.VERSION} has no patches of configurations (newer ones have)",
)
def test_patches_of_configurations_become_object_patches() -> None:
    from comfy.configurable import ConfigurableModule

    class Configured(torch.nn.Identity, ConfigurableModule):
        def with_config(self, config: torch.Tensor) -> torch.nn.Module:
            return torch.nn.Identity()

    patcher = small_patcher()
    patcher.model.second = Configured()
    patcher.add_patches({"second.config": ("config", (torch.zeros(1),))}, 1.0)
    assert "second" in patcher.object_patches
    assert "second.config" not in patcher.patches


def test_a_model_that_is_placed_elsewhere_keeps_its_use(models: Path, machine: Any) -> None:
    """Rebuilt by its factory for another device: the use comes along, what is of the model does not."""
    with torch.inference_mode():
        theirs = host_nodes.UNETLoader().load_unet(MODEL, "default")[0]
    changed = with_lora(theirs, 0.5)
    changed.model_options["transformer_options"]["test"] = 7
    changed.load_device = torch.device("cpu", 1)
    moved = patcher_on(changed, CPU)
    assert moved.model is not theirs.model
    assert moved.patches.keys() == changed.patches.keys() != set()
    assert moved.model_options["transformer_options"]["test"] == 7
    assert (moved.load_device, moved.offload_device) == (CPU, CPU)
    assert moved.pinned is not theirs.pinned


def test_a_module_may_be_any() -> None:
    """The host's patcher asks nothing of a model that :class:`SmallModel` has not."""
    patcher = small_patcher()
    assert patcher.model_size() == sum(each.nbytes for each in SmallModel().parameters())
    mm.load_models_gpu([patcher])
    assert patcher.loaded_size() == patcher.model_size()
    assert torch.equal(patcher.model.first(torch.eye(4)), SmallModel().first(torch.eye(4)))
    mm.unload_all_models()
    assert mm.current_loaded_models == []
