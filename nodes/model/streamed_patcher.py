"""The base class of a MODEL that streams: what code that acts on one may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...streaming import Plan, State, Streamer
from .offload import OffloadSettings
from .streamed_model import ATTRIBUTE, StreamedModel

# Under this key of additional models are the patchers of a model's parts on other devices (parts.py).
PARTS = "weightstream_parts"
# Under this key the host has copies of a model for parallel work on other devices.
PARALLEL = "multigpu"


class StreamedPatcher(ModelPatcher):
    """A :class:`ModelPatcher` of a model that streams. It may have parts on other devices.

    Attributes:
        settings: how this MODEL streams. Patchers of one model may differ; the one that is loaded counts.
        node_id: the node that shows what is in effect when this one is loaded.
        follow: lays out anew what was changed since the model was laid out; patcher.py has it.
        reload: carries out a plan between two steps; patcher.py has it.
    """

    follow: Callable[[], None]
    reload: Callable[[Plan], None]

    def __init__(self, model: torch.nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(model, *args, **options)
        self.settings = OffloadSettings()
        self.node_id: str | None = None

    @property
    def streamed(self) -> StreamedModel:
        return getattr(self.model, ATTRIBUTE)

    @property
    def streamer(self) -> Streamer:
        return self.streamed.streamer

    @property
    def parts(self) -> list[Any]:
        """The patchers of what is on other devices; empty for a model on one device."""
        return self.get_additional_models_with_key(PARTS)

    @property
    def streamers(self) -> list[Streamer]:
        """The streamers of all devices, that of the MODEL's own device first."""
        return [self.streamer, *(part.streamer for part in self.parts)]

    @property
    def is_whole(self) -> bool:
        """Whether all of it is loaded, on all devices, with nothing given up."""
        return all(streamer.state is State.LOADED for streamer in self.streamers)

    @property
    def moves(self) -> list[int]:
        """How often its weights were moved, on each device."""
        return [streamer.moves for streamer in self.streamers]
