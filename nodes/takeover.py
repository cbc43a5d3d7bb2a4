"""Stream a MODEL or CLIP that another node has loaded, and give one back to ComfyUI's own way.

What streams is a second model like the one that came in (twins.py, Note: a model of our own). What hangs on the
incoming patcher (patches, options, hooks, wrappers) is carried over to ours, and where that refers to modules of the
first model it cannot be (references.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from comfy.model_patcher import ModelPatcher

from ..streaming import CheckpointError, UnsupportedModelError
from .devices import make_backend, unload
from .generators import generators_kept
from .hosts import WrappersMP, made_with, what_is_of_the_model
from .loaded_state import take_off
from .names import shown_name
from .offload import OffloadSettings
from .patcher import PARTS, StreamedModelPatcher
from .references import refers_to
from .streamed_model import ATTRIBUTE, check_limit, make_streamed
from .text_encoder import step_of_text_encoder
from .twins import CANNOT_BE_CARRIED, alike, functions_of, make_twin

# Attributes of our own patchers, which those of the host do not have.
OURS = {"settings", "node_id"}

# The streamed twin of a model that came in, for as long as that lives: settings that change do not load it anew.
_twins: weakref.WeakKeyDictionary[torch.nn.Module, StreamedModelPatcher] = weakref.WeakKeyDictionary()


def take_over(patcher: ModelPatcher, settings: OffloadSettings, node_id: str | None) -> StreamedModelPatcher:
    """A patcher like ``patcher`` whose model streams.

    Raises:
        UnsupportedModelError: it cannot stream; the message says why.
        BudgetError: the limit has no room for the largest block.
    """
    make_backend(patcher.load_device)  # Where there is none nothing need be loaded.
    check_what_hangs_on(patcher)
    twin = _twins.get(patcher.model)
    if twin is None or not is_current(twin, patcher):
        twin = _twins[patcher.model] = _stream_twin(patcher, settings, node_id)
    check_limit(settings.vram_limit, twin.streamer, twin.streamed.name)
    ours = carry_over(patcher, twin.clone())
    ours.wrap_steps()
    ours.load_device, ours.offload_device = patcher.load_device, patcher.offload_device
    ours.settings, ours.node_id = settings, node_id
    ours.streamed.origin = weakref.ref(patcher)
    return ours


def is_current(twin: StreamedModelPatcher, patcher: ModelPatcher) -> bool:
    """Whether ``twin`` is still like the model of ``patcher``, in which somebody may have exchanged something."""
    try:
        with twin.originals():  # Its own may be patched too, and a file cut short must not be touched.
            # Where the host has patched weights of the other one they say nothing.
            if alike(twin.model, patcher.model, weights=not patcher.backup):
                return True
            take_off(patcher)  # A clone that is loaded may have changed it for as long as it is.
            return alike(twin.model, patcher.model)
    except CheckpointError:
        return False


def give_back(patcher: StreamedModelPatcher) -> ModelPatcher:
    """A patcher like ``patcher`` whose weights the host moves: of the model that came in, if it was one, and if it is
    still there. It loads to the device of its own loader.

    Raises:
        UnsupportedModelError: nobody but us can load this model.
    """
    check_what_hangs_on(patcher)
    origin = patcher.streamed.origin()
    theirs = origin.clone() if origin is not None else patcher.streamed.load_native()
    if theirs is None:
        raise UnsupportedModelError("nothing is known of how it was loaded")
    if functions_of(patcher.model) != functions_of(theirs.model):
        for loaded in (patcher, theirs):
            unload(loaded)  # What a clone that is loaded has injected goes with it.
        if functions_of(patcher.model) != functions_of(theirs.model):
            raise UnsupportedModelError(f"a function that was put on one of its modules {CANNOT_BE_CARRIED}")
    carry_over(patcher, theirs)
    theirs.remove_additional_models(PARTS)
    theirs.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, ATTRIBUTE)
    return theirs


def check_what_hangs_on(patcher: ModelPatcher) -> None:
    """Raise where something that would be carried over refers to modules of this model, or to patchers of its kind."""
    if patcher.get_additional_models_with_key("multigpu"):
        raise UnsupportedModelError("it runs on several GPUs at once; put this node in front of what splits it")
    root = getattr(patcher.model, "diffusion_model", patcher.model)
    modules = {id(patcher.model), *map(id, root.modules())}
    carried = _use_of(patcher)
    carried["additional_models"] = {key: value for key, value in patcher.additional_models.items() if key != PARTS}
    found = [name for name, value in carried.items() if refers_to([value], modules)]
    if found:
        raise UnsupportedModelError(f"{', '.join(found)} {CANNOT_BE_CARRIED}")


def anew(patcher: ModelPatcher, node_id: str | None) -> StreamedModelPatcher:
    """A streamed patcher of a second model like that of ``patcher``, which nobody else has; nothing is carried over.

    Raises:
        UnsupportedModelError: it cannot stream, or cannot be loaded a second time.
    """
    check_what_hangs_on(patcher)
    if not isinstance(patcher, StreamedModelPatcher):
        return _stream_twin(patcher, OffloadSettings(), node_id)
    if patcher.cached_patcher_init is None:
        raise UnsupportedModelError("nothing is known of how it was loaded")
    function, arguments = patcher.cached_patcher_init
    try:
        with generators_kept():
            found = function(*arguments)
    except Exception as error:  # The file may be gone.
        raise UnsupportedModelError(f"it cannot be loaded once more ({type(error).__name__}: {error})") from error
    if not isinstance(found, StreamedModelPatcher):
        raise UnsupportedModelError("it did not stream when it was loaded a second time; the log says why")
    return found


def carry_over(source: ModelPatcher, target: ModelPatcher) -> ModelPatcher:
    """Have ``target`` do with its model, on its device, what ``source`` does with the one that it has."""
    try:
        model, shared, *more = target.get_clone_model_override()
        # Empty ones: a patcher that goes lets go of what it has pinned, and ``state`` goes at once.
        override = (model, tuple(type(each)() for each in shared), *more)
        state = source.clone(disable_dynamic=True, model_override=override)
    except (TypeError, ValueError) as error:  # A patcher of another pack, with a clone of its own.
        raise UnsupportedModelError(f"its {type(source).__name__} cannot be rebuilt ({error})") from error
    vars(target).update(_use_of(state))
    target.size = target.model_size()
    return target


def _use_of(patcher: ModelPatcher) -> dict[str, object]:
    """What a patcher has for its use of its model (hosts.py, Note: of the model, or of its use)."""
    of_the_model = what_is_of_the_model(patcher) | OURS
    return {name: value for name, value in vars(patcher).items() if name not in of_the_model}


def _stream_twin(patcher: ModelPatcher, settings: OffloadSettings, node_id: str | None) -> StreamedModelPatcher:
    model, locate, factory = make_twin(patcher)
    root = model.diffusion_model if hasattr(model, "diffusion_model") else step_of_text_encoder(model)
    streamed = make_streamed(model, root, patcher.load_device, _name_of(patcher), locate, settings, node_id)
    streamed.load_by_host, streamed.kind = factory, type(patcher)
    twin = StreamedModelPatcher(model, **{**made_with(patcher), "size": streamed.streamer.model_bytes})
    if factory is not None:
        twin.cached_patcher_init = (_take_over_anew, (factory, settings, node_id))
    return twin


def _take_over_anew(
    factory: Callable[[], ModelPatcher], settings: OffloadSettings, node_id: str | None, **_: object
) -> StreamedModelPatcher:
    """For nodes of the host that want the same model once more. A streamed patcher is never dynamic."""
    return _stream_twin(factory(), settings, node_id)


def _name_of(patcher: ModelPatcher) -> str:
    """The file's name as the loader was given it, else the kind of model."""
    arguments = patcher.cached_patcher_init[1] if patcher.cached_patcher_init is not None else ()
    for argument in arguments:
        paths = argument if isinstance(argument, (list, tuple)) else [argument]
        if paths and all(isinstance(path, str) and path.lower().endswith(_ENDINGS) for path in paths):
            return " + ".join(map(shown_name, paths))
    return type(patcher.model).__name__


_ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
