"""A MODEL whose blocks stream: the host's calls, translated to the streamer."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher

from ...streaming import Plan, State, format_bytes
from ...streaming.model.shown import shown
from ..host import hosts
from ..host.devices import has_dynamic_vram, same_device, unload
from ..host.hosts import COMPILE_KEY, CallbacksMP, WrappersMP, wipe_lowvram_weight
from .following import follow
from .hooked import HookedPatcher
from .offload import host_config
from .patches import HostPatches, dtypes_loaded_by_host, weights_to_save
from .steps import load_again, load_when_called, run_streamed
from .streamed_model import ATTRIBUTE
from .streamed_patcher import PARALLEL, PARTS

logger = logging.getLogger(__name__)


class StreamedModelPatcher(HookedPatcher):
    """A :class:`ModelPatcher` that never moves weights itself: its streamer does.

    The base class keeps what is not about weights: patches, clones, hooks, callbacks, injections, object patches.

    Attributes:
        without_dynamic: whether this patcher was asked for without dynamic VRAM. A streamed one never has that, but the
            request changes how weights are patched (patches.py, Note: ways of the host).
    """

    def __init__(self, model: torch.nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(model, *args, **options)
        self.without_dynamic = False
        self.wrap_steps()

    def wrap_steps(self) -> None:
        """Have the host run each step through :func:`run_streamed`."""
        self.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, ATTRIBUTE)
        self.add_wrapper_with_key(WrappersMP.APPLY_MODEL, ATTRIBUTE, run_streamed)

    def clone(self, disable_dynamic: bool = False, *args: Any, **kwargs: Any) -> StreamedModelPatcher:
        clone = super().clone(disable_dynamic, *args, **kwargs)
        clone.settings, clone.node_id = self.settings, self.node_id
        clone.without_dynamic = self.without_dynamic or disable_dynamic
        for part in clone.parts:
            part.owner = weakref.ref(clone)
        return clone

    def deepclone_multigpu(self, *args: Any, **kwargs: Any) -> Any:
        """Clone the model for another device, with all of it there."""
        whole = StreamedModelPatcher.clone(self)
        whole.remove_additional_models(PARTS)
        found = super(StreamedModelPatcher, whole).deepclone_multigpu(*args, **kwargs)
        found.parent = None  # It has a model of its own (match_multigpu_clones).
        return found

    def match_multigpu_clones(self, *args: Any, **options: Any) -> None:
        """Copies for parallel work on other devices have no parts: each has the whole model.

        The host makes them anew for each run, and with a patcher's parent it frees what a patcher that is gone has
        loaded. That would be this one, of another model, so each gets the first patcher of its own.
        """
        parts, before = self.parts, self.get_additional_models_with_key(PARALLEL)
        self.remove_additional_models(PARTS)
        try:
            super().match_multigpu_clones(*args, **options)
        finally:
            if parts:
                self.set_additional_models(PARTS, parts)
        for clone, earlier in zip(self.get_additional_models_with_key(PARALLEL), before, strict=True):
            clone.parent = _first_of_its_model(earlier)
            if isinstance(clone, StreamedModelPatcher):
                clone.prompt_has_hooks = self.prompt_has_hooks

    def model_patches_models(self) -> list[Any]:
        """Models that the host loads with this one, also where a node has it load the MODEL alone."""
        return [*super().model_patches_models(), *self.parts]

    @property
    def would_be_dynamic(self) -> bool:
        """Whether the host would run this MODEL with dynamic VRAM, for the prompt that it was last asked to run."""
        return not self.without_dynamic and not self.prompt_has_hooks and has_dynamic_vram(self.load_device)

    def cleanup(self) -> None:
        """The host calls this when a run has ended, also one that has failed."""
        super().cleanup()
        self.end_run()

    def end_run(self) -> None:
        """Have the node say what was measured in the run that is over."""
        if self.streamer.state is not State.UNLOADED:
            for streamed in (self.streamed, *(part.streamed for part in self.parts)):
                streamed.end_run()
            self.streamed.tell_of_run()

    def status(self) -> dict[str, object]:
        """The state of this model's streaming: plain values, sizes in bytes."""
        return self.streamer.snapshot().as_dict()

    def model_size(self) -> int:
        return self.streamer.model_bytes

    def loaded_size(self) -> int:
        return self.streamer.device_bytes

    # -- loading -------------------------------------------------------------------------------------------------

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, *_: Any, **__: Any) -> float:
        """Make the model ready to run with ``extra_memory`` bytes more on the device than it has (fewer if negative).

        Returns the bytes that were taken in addition. The host's other arguments are about its own ways of loading, and
        are ignored: weights always carry their patches here.
        """
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            before = self.loaded_size()
            stays = self._stays_patched
            # The object patches may be another clone's. Its weights stay, and only those that differ are written anew.
            self.unpatch_model(self.offload_device, unpatch_weights=False)
            if stays:
                super().patch_model(load_weights=False)
                self.streamed.exchanged.clear()
            else:
                self.patch_model(load_weights=False)
            try:
                self.load(device_to, lowvram_model_memory=before + extra_memory)
            except BaseException:
                self.detach()
                raise
            return self.loaded_size() - before

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
        **_: Any,
    ) -> None:
        """Place the weights within ``lowvram_model_memory`` bytes; ``full_load`` sets no limit."""
        with self.use_ejected():
            self.unpatch_hooks()
            self.follow()
            if device_to is not None and not same_device(device_to, self.streamer.backend.device):
                # A clone for another GPU, or back from it.
                self.streamer.move_to(self.streamed.backend_on(device_to))
            self.streamed.show_on(self.node_id)
            self.streamer.refresh()
            self.streamed.begin_run()
            self.streamer.configure(host_config(self.settings, self.streamer.backend))
            self.streamer.expect_compiled(self._is_compiled())
            self.streamer.expect_writes(self.hooked.prompt_has_hooks or self.hooked.forced_hooks is not None)
            plan = self._plan(math.inf if full_load else lowvram_model_memory)
            self._prepare_modules()
            if self.streamed.boundary is not None:
                self.streamed.boundary.attach(self.streamer.root, self.streamed.placed, self._is_compiled())
            patches = self._host_patches()
            self.streamer.load_within(plan, lambda smaller: self.streamer.load(smaller, patches))
            self.streamer.begin_prompt()
            if self.streamed.shares is not None:
                self.streamed.shares.due = True
            self.streamed.set_loaded(self)
            self._tell_host(device_to)
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def follow(self) -> None:
        """Lay out anew what somebody has changed since the model was laid out (following.py)."""
        follow(self)

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, *_: Any, **__: Any) -> float:
        """Give up weights until ``memory_to_free`` bytes are free, and return how many bytes were freed.

        Nothing replaces them now: the copies that the model needs instead are made when it is loaded again. If less was
        freed than asked for, the host takes the whole model off the device.
        """
        with self.use_ejected():
            self.unpatch_hooks()
            freed = self.streamer.give_way(int(memory_to_free))
            if self.streamer.state is State.REDUCED:
                self.streamed.guard(load_when_called(self.hooked))
            self._tell_host(self.load_device)
        return freed

    def unpatch_model(
        self, device_to: torch.device | None = None, unpatch_weights: bool = True, **options: Any
    ) -> None:
        """Restore object patches and, with ``unpatch_weights``, take all weights off the device."""
        if unpatch_weights:
            self.unpatch_hooks()
            if self.streamer.state is not State.UNLOADED and self.streamer.has_model:
                self.streamed.guard(load_when_called(self.hooked))
            self.streamer.unload()
            if self.streamed.boundary is not None:
                self.streamed.boundary.detach()
            if self.streamer.backend.is_virtual:
                for part in self.parts:  # The host knows of one CPU, and unloads nothing on other virtual devices.
                    part.unpatch_model(device_to)
            self._restore_modules()
            self._tell_host(device_to)
            self.model.current_weight_patches_uuid = None
        self.streamed.exchanged |= self.object_patches_backup.keys()
        super().unpatch_model(device_to=None, unpatch_weights=False, **options)

    def patch_model(self, *args: Any, **options: Any) -> Any:
        """Apply object patches. For weights that they replace, keep what an unloaded model shows, which stays valid."""
        new = self.object_patches.keys() - self.object_patches_backup.keys()
        if new.isdisjoint(name for value in self._values for name in value.names):
            return super().patch_model(*args, **options)
        self.follow()
        replaced = {name: shown(value) for value in self._values for name in new.intersection(value.names)}
        patched = super().patch_model(*args, **options)
        self.object_patches_backup.update(replaced)
        self.streamed.exchanged |= new
        return patched

    @property
    def _stays_patched(self) -> bool:
        """Whether the host, without dynamic VRAM, would regard all weights as patched, since these very patches are in
        them. It then patches none, not even a weight that an object patch puts in anew."""
        same = self.model.current_weight_patches_uuid == self.patches_uuid
        return same and self.is_whole and not self.would_be_dynamic

    def _is_compiled(self) -> bool:
        """Whether torch.compile runs the model or parts of it: by the host's wrapper, or put in a block's place."""
        wrapped = self.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY)
        return bool(wrapped) or any(hasattr(patch, "_orig_mod") for patch in self.object_patches.values())

    def _host_patches(self) -> HostPatches:
        values, kind = self.streamer.blocks.values, self.streamed.kind
        dynamic, shared = self.would_be_dynamic, self.streamer.shares_copies
        return HostPatches(self, values, kind=kind, dynamic=dynamic, shared=shared)

    def reload(self, plan: Plan) -> None:
        """Carry ``plan`` out between two steps, with this MODEL's patches; hooks are off then.

        A model that was unloaded meanwhile is loaded by the host, which would not know of it otherwise.
        """
        known = (loaded.model is self for loaded in mm.current_loaded_models)
        if self.streamer.state is State.UNLOADED and not any(known):
            return load_again(self)
        self.unpatch_hooks()
        self.streamer.load(plan, self._host_patches())
        self._tell_host(self.load_device)

    def get_free_memory(self, device: torch.device) -> int:
        """Return the bytes that a step may take, including all that the model could give up.

        With a smaller figure the host would run prompts one by one that can share a step, and each would stream.
        """
        spare = self.streamer.device_bytes - self.streamer.minimum_bytes
        return super().get_free_memory(device) + max(0, spare) + hosts.record.held_bytes(device)

    def _plan(self, offered: float) -> Plan:
        """Return the plan for the bytes that the host offers; the one in effect if another would gain little."""
        streamer = self.streamer
        budget = self._budget(offered)
        logger.debug("offered %s, used as %s", format_bytes(offered), format_bytes(budget))
        if not streamer.backend.is_virtual:
            # A GPU may have room that the host's estimate does not see, so the least is tried.
            budget = max(budget, streamer.minimum_bytes)
        return streamer.next_plan(budget)

    def _budget(self, offered: float) -> float:
        """Return how many bytes on the device this model may take in all."""
        streamer = self.streamer
        if streamer.backend.is_virtual:
            return min(offered, self._free_virtual_memory())
        offered = streamer.prompt_budget(offered)
        if offered >= streamer.minimum_bytes or mm.vram_state == mm.VRAMState.NO_VRAM:
            return offered
        # The host's first offer can be 0 while other models still hold the memory (docs/design.md, "The offer").
        needed = [
            loaded
            for loaded in mm.current_loaded_models
            if loaded.currently_used or (loaded.model is not None and self.is_clone(loaded.model))
        ]
        free_before = mm.get_free_memory(self.load_device)
        mm.free_memory(streamer.model_bytes + mm.minimum_inference_memory(), self.load_device, keep_loaded=needed)
        return offered + max(0, mm.get_free_memory(self.load_device) - free_before)

    def _free_virtual_memory(self) -> int:
        """Make room on the virtual device and return the bytes that we may use. The host frees nothing for a CPU.

        First, other models stream what they keep. They are unloaded only if that is not enough for the least that we
        need: a model of the same prompt may be among them, and must stay ready to run.
        """
        for other in self._rivals():
            if self._virtual_room < self.streamer.model_bytes:
                other.partially_unload(other.offload_device, other.loaded_size() - other.streamer.minimum_bytes)
        for other in self._rivals():
            if self._virtual_room < self.streamer.minimum_bytes:
                unload(other)
        return self._virtual_room

    @property
    def _virtual_room(self) -> int:
        """Bytes of the virtual device that are free or ours."""
        backend = self.streamer.backend
        return backend.budget - backend.store.allocated + backend.allocated

    def _rivals(self) -> list[StreamedModelPatcher]:
        """Other loaded models on our virtual device, the least recently loaded first."""
        patchers = [loaded.model for loaded in reversed(mm.current_loaded_models)]
        return [
            other
            for other in patchers
            if isinstance(other, StreamedModelPatcher)
            and not self.is_clone(other)
            and other.streamer.backend.name == self.streamer.backend.name
        ]

    def _tell_host(self, device: torch.device | None) -> None:
        """Set what the host reads to know where the model is and how much it takes."""
        plan = self.streamer.plan
        if device is not None:
            self.model.device = device
        self.model.model_loaded_weight_memory = self.streamer.device_bytes
        self.model.model_lowvram = plan is not None and bool(plan.segments)
        self.model.current_weight_patches_uuid = self.patches_uuid
        if plan is not None:
            self.streamed.announce()

    # -- modules -------------------------------------------------------------------------------------------------

    def _prepare_modules(self) -> None:
        """Set the flags by which the host's layers use their weights as they are, patches included."""
        for name, module in self.model.named_modules():
            if not hasattr(module, "comfy_cast_weights"):
                continue
            wipe_lowvram_weight(module)
            module.comfy_force_cast_weights = self.force_cast_weights
            if self.force_cast_weights:
                module.prev_comfy_cast_weights = module.comfy_cast_weights
                module.comfy_cast_weights = True
            for kind in ("weight", "bias"):
                wrappers = self.weight_wrapper_patches.get(f"{name}.{kind}")
                if wrappers:
                    getattr(module, f"{kind}_function").extend(wrappers)
            module.comfy_patched_weights = True

    def _restore_modules(self) -> None:
        for module in self.model.modules():
            if hasattr(module, "comfy_cast_weights"):
                wipe_lowvram_weight(module)
            if hasattr(module, "comfy_patched_weights"):
                del module.comfy_patched_weights

    # -- weights that others read or write -----------------------------------------------------------------------

    def get_key_patches(self, *args: Any, **options: Any) -> dict[str, list]:
        """The original weights and the patches to them, as the host's own loaders have them."""
        with self.originals():
            patches = super().get_key_patches(*args, **options)
        dtypes = dtypes_loaded_by_host(self._values)
        for name in patches.keys() & dtypes.keys():
            weight, convert = patches[name][0]
            patches[name][0] = (weight.to(dtypes[name]), convert)
        return patches

    def model_state_dict_for_saving(
        self, model: torch.nn.Module | None = None, prefix: str = "", **_: Any
    ) -> dict[str, torch.Tensor]:
        """The weights as the host saves those of its own loaders."""
        with self.originals():
            tensors = (self.model if model is None else model).state_dict(prefix=prefix)
        saved = weights_to_save(self, tensors, dtypes_loaded_by_host(self._values))
        return {name.removeprefix(prefix): tensor for name, tensor in saved.items()}

    @contextmanager
    def originals(self) -> Iterator[None]:
        """Have the modules hold the weights as loaded, on all devices, inside of this context."""
        with ExitStack() as stack:
            for streamer in self.streamers:
                stack.enter_context(streamer.originals())
            yield

    @property
    def _values(self) -> list[Any]:
        return [value for streamer in self.streamers for value in streamer.blocks.values]


def _first_of_its_model(patcher: ModelPatcher) -> ModelPatcher:
    """The patcher of which this one is a clone, or a clone of a clone."""
    while patcher.parent is not None and patcher.parent.model is patcher.model:
        patcher = patcher.parent
    return patcher
