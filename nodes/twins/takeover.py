"""Stream a MODEL or CLIP that another node has loaded, and give one back to ComfyUI's own way.

What streams is a second model like the incoming one (twins.py, Note: a model of our own). What is attached to the
incoming patcher (patches, options, hooks, wrappers) is carried over to ours, which fails if it refers to modules of the
first model (references.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import torch
from comfy.model_patcher import ModelPatcher

from ...streaming import CheckpointError, UnsupportedModelError
from ..host.devices import make_backend
from ..host.generators import generators_kept
from ..host.hosts import WrappersMP, made_with, what_is_of_the_model
from ..model.offload import OffloadSettings
from ..model.patcher import PARALLEL, PARTS, StreamedModelPatcher
from ..model.streamed_model import ATTRIBUTE, check_limit, make_streamed
from ..model.text_encoder import step_of_text_encoder
from ..state.references import refers_to
from ..tell.names import shown_name
from .copies import CANNOT_BE_CARRIED
from .twins import lasting_difference, make_twin

# Attributes of our own patchers, which those of the host do not have.
OF_OUR_PATCHERS = {"settings", "node_id", "without_dynamic", "prompt_has_hooks"}

CHANGED = (
    "somebody has changed it since it was loaded ({}), and its loader gives it without that; connect this node "
    "directly behind the loader, and what changes the model behind this node"
)

# The streamed twin of an incoming model, kept for as long as that lives: a change of settings does not load it anew.
_twins: weakref.WeakKeyDictionary[torch.nn.Module, StreamedModelPatcher] = weakref.WeakKeyDictionary()


def take_over(
    patcher: ModelPatcher, settings: OffloadSettings, node_id: str | None, device: torch.device | None = None
) -> StreamedModelPatcher:
    """Return a patcher like ``patcher`` whose model streams, to ``device`` if one is given.

    Raises:
        UnsupportedModelError: it cannot stream; the message says why.
        BudgetError: the limit has no room for the largest block.
    """
    device = patcher.load_device if device is None else device
    make_backend(device)  # If nothing can stream there, this fails before anything is loaded.
    check_what_hangs_on(patcher)
    twin = _twins.get(patcher.model)
    if twin is None or not is_current(twin, patcher):
        twin = _twins[patcher.model] = _stream_twin(patcher, device, settings, node_id)
    check_limit(settings.vram_limit, twin.streamer, twin.streamed.name)
    ours = carry_over(patcher, twin.clone())
    ours.wrap_steps()
    ours.load_device, ours.offload_device = device, patcher.offload_device
    ours.settings, ours.node_id = settings, node_id
    ours.streamed.origin = weakref.ref(patcher)
    return ours


def is_current(twin: ModelPatcher, patcher: ModelPatcher) -> bool:
    """Whether ``twin`` is still like the model of ``patcher``, in which somebody may have replaced something."""
    try:
        return not lasting_difference(twin, patcher)
    except CheckpointError:  # A file that was truncated must not be touched.
        return False


def give_back(patcher: StreamedModelPatcher) -> ModelPatcher:
    """Return a patcher like ``patcher`` whose weights the host moves. Its model is the incoming one, if there was one
    that still exists; else the host loads it. It loads to the device of its own loader.

    Raises:
        UnsupportedModelError: only we can load this model as it is.
    """
    check_what_hangs_on(patcher)
    theirs = carry_over(patcher, _as_dynamic_as(patcher, _moved_by_host(patcher)))
    theirs.remove_additional_models(PARTS)
    theirs.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, ATTRIBUTE)
    return theirs


def _moved_by_host(patcher: StreamedModelPatcher) -> ModelPatcher:
    """A patcher that the host moves, of a model like that of ``patcher``; nothing of its use is carried over yet."""
    _check_files(patcher)
    reason = "nothing is known of how it was loaded"
    origin = patcher.streamed.origin()
    for make in (origin.clone if origin is not None else lambda: None, patcher.streamed.load_native):
        theirs = make()
        if theirs is None:
            continue
        if not (name := lasting_difference(theirs, patcher)):
            return theirs
        reason = CHANGED.format(name)
    raise UnsupportedModelError(reason)


def _as_dynamic_as(patcher: StreamedModelPatcher, theirs: ModelPatcher) -> ModelPatcher:
    if not (patcher.without_dynamic and theirs.is_dynamic()):
        return theirs
    try:
        return theirs.clone(disable_dynamic=True)
    except RuntimeError as error:  # The host cannot load it a second time.
        raise UnsupportedModelError(f"it has been asked for without dynamic VRAM: {error}") from error


def _check_files(patcher: StreamedModelPatcher) -> None:
    try:
        for streamer in patcher.streamers:
            streamer.check_files()
    except CheckpointError as error:  # A truncated one must not be touched.
        raise UnsupportedModelError(f"its file is another now ({error})") from error


def check_what_hangs_on(patcher: ModelPatcher) -> None:
    """Raise :class:`UnsupportedModelError` if something that would be carried over refers to modules of this model, or
    if the host runs it on several GPUs at once."""
    if patcher.get_additional_models_with_key(PARALLEL):
        raise UnsupportedModelError("it runs on several GPUs at once; put this node in front of what splits it")
    carried = _use_of(patcher)
    carried["additional_models"] = {key: value for key, value in patcher.additional_models.items() if key != PARTS}
    if found := refer_to_its_modules(patcher, carried):
        raise UnsupportedModelError(f"{', '.join(found)} {CANNOT_BE_CARRIED}")


def refer_to_its_modules(patcher: ModelPatcher, attached: Mapping[str, object]) -> list[str]:
    """The names of what of ``attached`` refers to modules of the model of ``patcher``."""
    root = getattr(patcher.model, "diffusion_model", patcher.model)
    modules = {id(patcher.model), *map(id, root.modules())}
    return [name for name, value in attached.items() if refers_to([value], modules)]


def anew(patcher: ModelPatcher, node_id: str | None) -> StreamedModelPatcher:
    """A streamed patcher of a second model like that of ``patcher``, for one user alone; nothing is carried over.

    Raises:
        UnsupportedModelError: it cannot stream, or cannot be made a second time.
    """
    check_what_hangs_on(patcher)
    found = None
    if isinstance(patcher, StreamedModelPatcher):
        _check_files(patcher)
        found = _loaded_again(patcher)
    return found or _stream_twin(patcher, patcher.load_device, OffloadSettings(), node_id)


def _loaded_again(patcher: StreamedModelPatcher) -> StreamedModelPatcher | None:
    """Load the model a second time by our own loader; None if that is not like ``patcher``, so that a copy must do."""
    if patcher.cached_patcher_init is None:
        return None
    function, arguments = patcher.cached_patcher_init
    try:
        with generators_kept():
            found = function(*arguments)
    except Exception as error:  # The file may be gone.
        raise UnsupportedModelError(f"it cannot be loaded once more ({type(error).__name__}: {error})") from error
    if isinstance(found, StreamedModelPatcher) and not is_current(found, patcher):
        found.streamer.close()  # It has begun to build copies.
        return None
    return found if isinstance(found, StreamedModelPatcher) else None


def carry_over(source: ModelPatcher, target: ModelPatcher) -> ModelPatcher:
    """Have ``target`` do with its model, on its device, what ``source`` does with its own model. Returns ``target``.

    Raises:
        UnsupportedModelError: ``source`` has a clone of its own that cannot do this.
    """
    try:
        model, shared, *more = target.get_clone_model_override()
        # Empty ones: a patcher that is destroyed frees what it has pinned, and ``state`` is destroyed at once.
        override = (model, tuple(type(each)() for each in shared), *more)
        state = source.clone(disable_dynamic=True, model_override=override)
    except (TypeError, ValueError) as error:  # A patcher of another pack, with a clone of its own.
        raise UnsupportedModelError(f"its {type(source).__name__} cannot be rebuilt ({error})") from error
    vars(target).update(_use_of(state))
    target.size = target.model_size()
    if isinstance(target, StreamedModelPatcher):
        target.without_dynamic = _is_without_dynamic(source)
    return target


def _is_without_dynamic(patcher: ModelPatcher) -> bool:
    return patcher.without_dynamic if isinstance(patcher, StreamedModelPatcher) else not patcher.is_dynamic()


def _use_of(patcher: ModelPatcher) -> dict[str, object]:
    """The attributes of a patcher that belong to its use of the model (hosts.py, Note: of the model, or of its use)."""
    of_the_model = what_is_of_the_model(patcher) | OF_OUR_PATCHERS
    return {name: value for name, value in vars(patcher).items() if name not in of_the_model}


def _stream_twin(
    patcher: ModelPatcher, device: torch.device, settings: OffloadSettings, node_id: str | None
) -> StreamedModelPatcher:
    model, locate, factory = make_twin(patcher)
    root = model.diffusion_model if hasattr(model, "diffusion_model") else step_of_text_encoder(model)
    streamed = make_streamed(model, root, device, _name_of(patcher), locate, settings, node_id)
    streamed.load_by_host = factory
    if isinstance(patcher, StreamedModelPatcher):
        streamed.kind, streamed.origin = patcher.streamed.kind, patcher.streamed.origin
    else:
        streamed.kind, streamed.origin = type(patcher), weakref.ref(patcher)
    made = {**made_with(patcher), "load_device": device, "size": streamed.streamer.model_bytes}
    twin = StreamedModelPatcher(model, **made)
    if factory is not None:
        twin.cached_patcher_init = (_take_over_anew, (factory, settings, node_id))
    return twin


def _take_over_anew(
    factory: Callable[[], ModelPatcher], settings: OffloadSettings, node_id: str | None, **_: object
) -> StreamedModelPatcher:
    """The factory for nodes of the host that load the same model again. A streamed patcher is never dynamic."""
    patcher = factory()
    return _stream_twin(patcher, patcher.load_device, settings, node_id)


def _name_of(patcher: ModelPatcher) -> str:
    """The file's name as the loader was given it, else the kind of model."""
    if isinstance(patcher, StreamedModelPatcher):
        return patcher.streamed.title
    arguments = patcher.cached_patcher_init[1] if patcher.cached_patcher_init is not None else ()
    for argument in arguments:
        paths = argument if isinstance(argument, (list, tuple)) else [argument]
        if paths and all(isinstance(path, str) and path.lower().endswith(_ENDINGS) for path in paths):
            return " + ".join(map(shown_name, paths))
    return type(patcher.model).__name__


_ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
