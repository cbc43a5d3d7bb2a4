"""Text encoders stream too: what a step of one is, and CLIP objects with a streamed patcher."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import comfy.sd
import torch

from ...streaming import UnsupportedModelError
from ..state.references import carry_functions
from ..tell.failures import told_on_node
from .patcher import StreamedModelPatcher
from .steps import ensure_loaded, in_effect, repeatable, run_loaded, shapes_of
from .streamed_model import ATTRIBUTE

# The methods that the host calls on a text encoder. Each call is a step, in which blocks run once, or many times where
# text is generated.
CALLS = ("encode_token_weights", "generate")


class Step(torch.nn.Module):
    """A module whose forward is one step of a text encoder, which the host does not call as a module itself."""

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


def step_of_text_encoder(model: torch.nn.Module) -> Step:
    """Have each of :data:`CALLS` of ``model`` run as a step of the loaded patcher. Returns the root of steps."""
    step = Step()
    for name in CALLS:
        if hasattr(model, name):
            setattr(model, name, StepCall(model, name, step))
    return step


class StepCall:
    """Stands on an encoder for one of :data:`CALLS`, and runs it as a step.

    Args:
        encoder: the encoder, which is referred to weakly: it holds this.
        name: of the method.
        step: the root of steps.
    """

    def __init__(self, encoder: torch.nn.Module, name: str, step: Step) -> None:
        self._encoder = weakref.ref(encoder)
        self._name, self._step = name, step
        self._call = getattr(type(encoder), name)
        update_wrapper(self, self._call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encoder = self._encoder()
        if encoder is None:
            raise ReferenceError(f"the encoder whose {self._name} this is does not exist any more")
        forward = lambda: self._step(lambda: self._call(encoder, *args, **kwargs))  # noqa: E731
        patcher = getattr(encoder, ATTRIBUTE).loaded()
        if not isinstance(patcher, StreamedModelPatcher):
            return forward()
        with told_on_node(patcher.streamed.title, patcher.streamed.node_id):
            ensure_loaded(patcher)
            forward = repeatable(patcher, in_effect(patcher, forward), {"what is encoded": (args, kwargs)})
            return run_loaded(patcher, forward, (self._name, shapes_of(args), _lengths(args)), None)


def _lengths(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The numbers of tokens in prompts as the host's tokenizers return them: time and memory depend on these."""
    found = []
    for value in args:
        if isinstance(value, dict):
            found.append(tuple((key, _lengths((value[key],))) for key in sorted(value)))
        elif isinstance(value, list):
            found.append(tuple(len(part) if isinstance(part, list) else 1 for part in value))
    return tuple(found)


def with_patcher(clip: comfy.sd.CLIP, patcher: Any) -> comfy.sd.CLIP:
    """``clip`` with another patcher, and its model.

    Raises:
        UnsupportedModelError: somebody has put another encoder into it, or a function on it that refers to it.
    """
    if clip.cond_stage_model is not clip.patcher.model:
        raise UnsupportedModelError("somebody has put another model into it, which nobody loads")
    twin = clip.clone()
    # The host's own clone leaves behind what others have put on it.
    vars(twin).update({name: value for name, value in vars(clip).items() if name not in vars(twin)})
    carry_functions(clip, twin, clip.cond_stage_model)
    twin.patcher = patcher
    twin.cond_stage_model = patcher.model
    return twin
