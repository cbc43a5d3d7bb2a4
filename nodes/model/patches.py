"""LoRA and other weight patches, as the engine asks for them. The host's own functions compute them.

[Note: ways of the host]
ComfyUI computes a patched weight in several ways, whose results differ in the last bits. Without dynamic VRAM, a
weight on the card is cast to a dtype of its own for LoRA (float16 on most GPUs), and a weight that did not fit is
patched in its own dtype whenever its layer runs. With dynamic VRAM, the default on NVIDIA cards, it is patched in the
dtype in which the layer runs, but for layers of at most 16 KiB, and for patches that change a
weight's shape, which go the older way; and where the weight is stored in another dtype (fp8), the result is rounded to
that when it is kept on the card, and not when it is not. So ComfyUI's own image depends on how much memory is free.
Ours is always the one that ComfyUI gives in this process when the whole model fits on the card. A quantised weight goes
the same two ways, dequantised before and quantised with a new scale after.

A process with dynamic VRAM runs some MODELs without it, and so goes the older way for them: each prompt with hooks on
conditioning (``CFGGuider.inner_set_conds``), and the clones of nodes that ask for it, as that for torch.compile does.

[Note: patchers of other packs]
A pack may have a patcher class that patches weights in its own way. The one for GGUF files leaves patches beside a
packed weight, whose layer applies them, and computes those of a float16 or float32 weight in float32 on any device. So
that class's own method is called: it finds the weight in the model, and what it puts there is the patched weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.float
import comfy.lora
import comfy.memory_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...streaming import UnsupportedModelError
from ...streaming.model.layout import Value
from ..host.hosts import LazyCastingParam, QuantizedTensor
from .patch_identity import computing_context, identity_of_entries

# With dynamic VRAM on, the host loads a module of at most so many bytes whole (ModelPatcherDynamic.load).
PRELOADED_MODULE_BYTES = 16 * 1024


class PatchSignature:
    """The patches of one weight, in their order, and the dtype in which they are computed.

    Two signatures are equal when the same patch objects act with the same strengths, offsets and functions. Patch
    objects are compared by identity, and kept alive so that an identity is never used twice.

    Args:
        entries: as the host has them.
        dtype: in which they are computed, where that is not the weight's affair.
        context: all else that the result depends on; None where no other process is to know it.
    """

    def __init__(self, entries: list[tuple], dtype: torch.dtype | None, context: str | None = None) -> None:
        self._entries = tuple(entries)
        self._dtype = dtype
        self._context = context

    def identity(self) -> bytes | None:
        """What other processes know these patches by (patch_identity.py); None where they cannot."""
        return None if self._context is None else identity_of_entries(self._entries, self._context)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PatchSignature) or self._dtype != other._dtype:
            return False
        same_length = len(self._entries) == len(other._entries)
        return same_length and all(map(_same_patch, self._entries, other._entries))

    __hash__ = None  # type: ignore[assignment]


def _same_patch(mine: tuple, theirs: tuple) -> bool:
    strength, patch, model_strength, offset, function = mine
    return (
        patch is theirs[1]
        and function is theirs[4]
        and (strength, model_strength, offset) == (theirs[0], theirs[2], theirs[3])
    )


class HostPatches:
    """The patches of a MODEL (:class:`streaming.Patches`).

    Args:
        patcher: the MODEL.
        values: the model's parameters and buffers, or some of them.
        device: where patches are computed; None means the MODEL's load device.
        kind: the class of the patcher that the model came with, which may patch in its own way.
        dynamic: whether the host would run this MODEL with dynamic VRAM.
        shared: whether others may have what is made of them, so that they need identities.

    Raises:
        UnsupportedModelError: a patch addresses a weight that has two names; the host changes one of them alone.
    """

    def __init__(
        self,
        patcher: ModelPatcher,
        values: Iterable[Value],
        device: torch.device | None = None,
        kind: type[ModelPatcher] = ModelPatcher,
        dynamic: bool = False,
        shared: bool = False,
    ) -> None:
        self._patcher = patcher
        self._dynamic = dynamic
        self._shared = shared
        self._theirs = _as_another(patcher, kind) if _has_its_own_way(kind) else None
        self._device = patcher.load_device if device is None else device
        self._module_bytes: Counter[str] = Counter()
        for value in values:
            self._module_bytes[value.name.rpartition(".")[0]] += sum(spec.original.nbytes for spec in value.specs)
            if len(value.names) > 1 and any(name in patcher.patches for name in value.names):
                raise UnsupportedModelError(
                    f"{' and '.join(value.names)} are one weight, and a patch changes one of them; "
                    "load this model with ComfyUI's own loader"
                )
        self._patched: dict[str, bool] = {}

    def signature(self, name: str) -> PatchSignature | None:
        entries = self._patcher.patches.get(name)
        if not entries or not self._is_patched(name):
            return None
        return PatchSignature(entries, self._computing_dtype if self._dynamic else None, self._context_of(name))

    def _context_of(self, name: str) -> str | None:
        """What the result depends on beside the patches; None where nothing is shared, or a pack computes it."""
        if not self._shared or self._theirs is not None:
            return None
        module, _ = comfy.utils.resolve_attr(self._patcher.model, name)
        way = self._goes_the_dynamic_way(name), self._dynamic, self._computing_dtype
        return computing_context(self._device, module, name, type(self._patcher.model).__qualname__, way)

    @property
    def _computing_dtype(self) -> torch.dtype:
        """The dtype in which the model runs; that of a text encoder is set by its loader."""
        model = self._patcher.model
        if hasattr(model, "get_dtype_inference"):
            return model.get_dtype_inference()
        return self._patcher.object_patches.get("manual_cast_dtype") or torch.float32

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        """The patched weight exactly as the host computes it, on the load device (Note: ways of the host)."""
        if self._theirs is not None:
            return self._compute_their_way(self._theirs, name, original)
        if self._goes_the_dynamic_way(name) and not self._changes_shape(name, original):
            return self._compute_when_run(name, original)
        with _weight_in_place(self._patcher.model, name, original):
            return self._patcher.patch_weight_to_device(name, device_to=self._device, return_weight=True)

    def _is_patched(self, name: str) -> bool:
        """Whether the host applies patches to this weight at all. It patches parameters of modules that it loads one by
        one, which have no parameters in child modules, and with dynamic VRAM only those of its own layers. A parameter
        beside layers, as Wan has some, keeps its value."""
        if name not in self._patched:
            module, attribute = comfy.utils.resolve_attr(self._patcher.model, name)
            inner = (parameter for child in module.children() for parameter in child.parameters())
            loaded = attribute in module._parameters and next(inner, None) is None
            self._patched[name] = loaded and (not self._dynamic or hasattr(module, "comfy_cast_weights"))
        return self._patched[name]

    def _goes_the_dynamic_way(self, name: str) -> bool:
        module, attribute = comfy.utils.resolve_attr(self._patcher.model, name)
        if not self._dynamic or attribute not in ("weight", "bias") or not hasattr(module, "comfy_cast_weights"):
            return False
        return self._module_bytes[name.rpartition(".")[0]] > PRELOADED_MODULE_BYTES

    def _changes_shape(self, name: str, original: torch.Tensor) -> bool:
        return comfy.lora.calculate_shape(self._patcher.patches[name], original, name) != original.shape

    def _compute_when_run(self, name: str, original: torch.Tensor) -> torch.Tensor:
        """Compute as the host does when it casts a dynamic weight just before its layer runs, and keeps the result."""
        seed = comfy.utils.string_to_seed(name.rpartition(".")[0])
        device, dtype = self._device, self._computing_dtype
        if not isinstance(original, QuantizedTensor):
            patched = self._calculate(name, original.to(device=device, dtype=dtype, copy=True))
            return comfy.float.stochastic_rounding(patched, original.dtype, seed=seed)
        # Step by step, as the host does it: converted to device and dtype at once, the class may dequantise on the way.
        kept = torch.empty_like(original, device=device)
        kept.copy_(original)
        patched = self._calculate(name, kept.to(dtype=dtype).dequantize())
        kept.copy_(kept.requantize_from_float(patched, scale="recalculate", stochastic_rounding=seed))
        return kept

    def _compute_their_way(self, theirs: ModelPatcher, name: str, original: torch.Tensor) -> torch.Tensor:
        """Compute by the patcher class of the pack that the model came from (Note: patchers of other packs)."""
        theirs.backup = {name: None}  # It makes no backup of a weight that has one.
        with _weight_in_place(self._patcher.model, name, original):
            theirs.patch_weight_to_device(name, device_to=self._device)
            return comfy.utils.get_attr(self._patcher.model, name)

    def _calculate(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return comfy.lora.calculate_weight(self._patcher.patches[name], weight, name, intermediate_dtype=weight.dtype)


def dtypes_loaded_by_host(values: Iterable[Value]) -> dict[str, torch.dtype]:
    """The dtypes of plain weights with the host's own loaders: the model's, but with dynamic VRAM the file's."""
    dynamic = comfy.memory_management.aimdo_enabled
    plain = [value for value in values if value.is_plain]
    return {name: value.original.dtype if dynamic else value.dtype for value in plain for name in value.names}


def weights_to_save(
    patcher: ModelPatcher, originals: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """The weights of a MODEL in ``dtypes``, as the host writes them to a file.

    Patched weights are computed one by one while it is written, in another way than to run (Note: ways of the host).
    """
    originals = {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in originals.items()}
    patched = _SavedPatches(patcher, originals)
    return {
        name: LazyCastingParam(patched, name, tensor) if name in patcher.patches else tensor
        for name, tensor in originals.items()
    }


class _SavedPatches:
    """Stands in for a patcher when the host asks for a patched weight in whose place the model holds another tensor."""

    def __init__(self, patcher: ModelPatcher, originals: dict[str, torch.Tensor]) -> None:
        self.load_device = patcher.load_device
        self._patcher = patcher
        self._originals = originals

    def patch_weight_to_device(self, name: str, *args: Any, **options: Any) -> torch.Tensor:
        with _weight_in_place(self._patcher.model, name, self._originals[name]):
            return self._patcher.patch_weight_to_device(name, *args, **options)


def _has_its_own_way(kind: type[ModelPatcher]) -> bool:
    """Whether a patcher of this class patches weights by a method that is not the host's."""
    definer = next(each for each in kind.__mro__ if "patch_weight_to_device" in vars(each))
    return definer.__module__ != ModelPatcher.__module__


def _as_another(patcher: ModelPatcher, kind: type[ModelPatcher]) -> ModelPatcher:
    """Make an object of class ``kind`` with all that ``patcher`` has, to call its methods. ``__del__`` does nothing."""
    stand_in = object.__new__(type(kind.__name__, (kind,), {"__del__": lambda self: None}))
    vars(stand_in).update(vars(patcher))
    return stand_in


@contextmanager
def _weight_in_place(model: torch.nn.Module, name: str, weight: torch.Tensor) -> Iterator[None]:
    """Put ``weight`` into the model inside of this context: the host reads the weight to patch from there."""
    module, attribute = comfy.utils.resolve_attr(model, name)
    is_parameter = attribute in module._parameters
    holder = module._parameters if is_parameter else module._buffers
    before = holder[attribute]
    with torch.inference_mode(False):
        if is_parameter and not isinstance(weight, torch.nn.Parameter):
            weight = torch.nn.Parameter(weight, requires_grad=False)
        holder[attribute] = weight
    try:
        yield
    finally:
        if not is_parameter:
            module._parameters.pop(attribute, None)  # The patched one may have been put here.
        holder[attribute] = before
