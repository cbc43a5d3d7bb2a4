"""The node "Async Offload Settings": how any MODEL and CLIP streams, whichever node has loaded it.

[Note: presets]
A preset decides all inputs that say how weights stream, whatever they are set to, so an API prompt needs no other. In
the page, choosing one sets these inputs to what it decides (the page reads that here, from the schema), and setting one
of them by hand makes the preset "custom" again, which decides nothing. So what is shown is what is in effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..streaming import BudgetError, ConfigError, PackingMode, UnsupportedModelError
from .changed_files import count_outdated
from .model.offload import GIB, PINNING, ROUND_GIB, STEP_GIB, Mode, OffloadSettings
from .model.patcher import StreamedModelPatcher
from .model.streamed_model import check_limit
from .model.text_encoder import with_patcher
from .tell import messages
from .tell.failures import told_on_node
from .tell.notices import keep_notice, withdraw_notice
from .twins.components import patcher_on
from .twins.takeover import give_back, take_over

NAME = "Async Offload Settings"
MOST_GIB = 1024.0
ALIASES = ["vram", "low vram", "offload", "async offload", "block swap", "distorch", "unet", "text encoder"]

# What the inputs are where nobody has chosen anything.
AUTOMATIC = {
    "mode": Mode.AUTO.value,
    "copy_streams": 0,
    "prefetch_depth": 0,
    "vram_limit_gb": 0.0,
    "pin_memory": "auto",
    "pinned_limit_gb": 0.0,
    "reserve_vram_gb": 0.0,
    "packing": PackingMode.AUTO.value,
}
# Note: presets
CUSTOM = "custom"
PRESETS = {
    "fastest": AUTOMATIC,
    "leave 2 GiB for others": {**AUTOMATIC, "reserve_vram_gb": 2.0},
    "least VRAM": {**AUTOMATIC, "mode": Mode.STREAM.value},
    "debug": {**AUTOMATIC, "mode": Mode.SYNC.value, "packing": PackingMode.OFF.value},
}


class AsyncOffloadSettings(io.ComfyNode):
    """Chooses how the weights of a MODEL, a CLIP or both reach the GPU, whichever node has loaded them.

    auto keeps in VRAM what fits and streams the rest. stream keeps nothing, for the least VRAM. sync copies weights
    when they are needed, the reference for debugging. off is ComfyUI's own way. A preset sets all of this at once. The
    images are the same.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WeightStreamOffloadSettings",
            display_name=NAME,
            category="weightstream",
            description=cls.__doc__,
            search_aliases=ALIASES,
            # The host lists required inputs before optional ones. New ones come last: saved values have no names.
            inputs=[
                io.Combo.Input(
                    "mode",
                    options=[mode.value for mode in Mode],
                    default=Mode.AUTO.value,
                    tooltip="auto keeps what fits, stream keeps nothing, sync copies when needed, off is ComfyUI's own",
                ),
                io.Int.Input(
                    "copy_streams",
                    default=0,
                    min=0,
                    max=8,
                    advanced=True,
                    tooltip="Streams that copy in turn. 0 is automatic (2).",
                ),
                io.Int.Input(
                    "prefetch_depth",
                    default=0,
                    min=0,
                    max=7,
                    advanced=True,
                    tooltip="Parts that are copied ahead of the one that is computed. 0 is automatic.",
                ),
                _gib(
                    "vram_limit_gb", "VRAM for the weights, in GiB. 0 uses what ComfyUI offers, or the loader's limit."
                ),
                io.Combo.Input(
                    "pin_memory",
                    options=list(PINNING),
                    default="auto",
                    advanced=True,
                    tooltip="Page-lock the RAM that is streamed from. auto follows --disable-pinned-memory.",
                ),
                _gib(
                    "pinned_limit_gb",
                    "RAM of this model that may be page-locked, in GiB. 0 sets no limit.",
                    advanced=True,
                ),
                _gib("reserve_vram_gb", "VRAM that stays free beside what a step needs, in GiB. 0 is automatic."),
                io.Model.Input(
                    "model", optional=True, tooltip="Any MODEL. Connect the node directly behind its loader."
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="A text encoder to stream the same way, with a MODEL or alone.",
                ),
                io.Combo.Input(
                    "packing",
                    options=[mode.value for mode in PackingMode],
                    default=PackingMode.AUTO.value,
                    optional=True,
                    advanced=True,
                    tooltip="auto packs 16-bit weights where the bus is the limit: the same bits in 0.70 of the bytes "
                    "(bfloat16). on packs all that can be, off none.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *PRESETS],
                    default=CUSTOM,
                    optional=True,
                    extra_dict={"weightstream_presets": {CUSTOM: {}, **PRESETS}},
                    tooltip="Decides all of the inputs at once, whatever they are set to; the page shows them. Setting "
                    "one by hand makes it custom, which decides nothing.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The MODEL, streamed as chosen; as it came in where it cannot stream; nothing where none "
                    "is connected."
                ),
                io.Clip.Output(tooltip="The CLIP, streamed as chosen; nothing where none is connected."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> int:
        """The node runs again when a model's file was changed."""
        return count_outdated()

    @classmethod
    def execute(
        cls, model: ModelPatcher | None = None, clip: Any = None, preset: str = CUSTOM, **inputs: Any
    ) -> io.NodeOutput:
        settings = _settings({**AUTOMATIC, **inputs, **PRESETS.get(preset, {})})
        node_id = cls.hidden.unique_id if cls.hidden is not None else None
        with told_on_node(NAME, node_id):
            return io.NodeOutput(*both_with_settings(model, clip, settings, node_id))


def both_with_settings(
    model: ModelPatcher | None, clip: Any, settings: OffloadSettings, node_id: str | None
) -> tuple[ModelPatcher | None, Any]:
    """A MODEL and a CLIP, or one of them, that stream as ``settings`` say.

    Raises:
        ConfigError: there is neither.
        BudgetError: the limit has no room for one of them; the least that is named is enough for both.
    """
    if model is None and clip is None:
        raise ConfigError("nothing is connected: connect model, clip, or both")
    refused: list[BudgetError] = []
    if model is not None:
        with _collected(refused):
            model = with_settings(model, settings, node_id)
    if clip is not None:
        with _collected(refused):
            clip = clip_with_settings(clip, settings, node_id)
    if refused:
        raise max(refused, key=lambda error: error.minimum)
    return model, clip


@contextmanager
def _collected(refused: list[BudgetError]) -> Iterator[None]:
    try:
        yield
    except BudgetError as error:
        refused.append(error)


def _settings(inputs: Mapping[str, Any]) -> OffloadSettings:
    return OffloadSettings(
        mode=Mode(inputs["mode"]),
        copy_streams=inputs["copy_streams"],
        prefetch_depth=inputs["prefetch_depth"],
        vram_limit=_bytes(inputs["vram_limit_gb"]),
        pin_memory=PINNING[inputs["pin_memory"]],
        pinned_limit=_bytes(inputs["pinned_limit_gb"]),
        reserve_vram=_bytes(inputs["reserve_vram_gb"]),
        packing=PackingMode(inputs["packing"]),
    )


def with_settings(patcher: ModelPatcher, settings: OffloadSettings, node_id: str | None = None) -> ModelPatcher:
    """Return a MODEL like ``patcher`` that streams as ``settings`` say; if it cannot, ``patcher`` itself and a notice.

    Raises:
        BudgetError: the limit has no room for the largest block.
    """
    streams = isinstance(patcher, StreamedModelPatcher)
    name = patcher.streamed.name if streams else type(patcher.model).__name__
    withdraw_notice(name, node_id)
    try:
        if settings.mode is Mode.OFF:
            native = patcher_on(give_back(patcher), patcher.load_device, may_stream=False) if streams else patcher
            messages.announce(name, "its weights are moved ComfyUI's own way", node_id)
            return native
        if not streams:
            return take_over(patcher, settings, node_id)
    except UnsupportedModelError as error:
        _leave(patcher, name, error, node_id)
        return patcher
    ours = patcher.clone()
    ours.settings, ours.node_id = settings.over(patcher.settings), node_id
    for streamer in ours.streamers:
        check_limit(ours.settings.vram_limit, streamer, ours.streamed.name)
    return ours


def clip_with_settings(clip: Any, settings: OffloadSettings, node_id: str | None = None) -> Any:
    """As :func:`with_settings` for a CLIP."""
    patcher = with_settings(clip.patcher, settings, node_id)
    try:
        return clip if patcher is clip.patcher else with_patcher(clip, patcher)
    except UnsupportedModelError as error:
        _leave(clip.patcher, type(clip.patcher.model).__name__, error, node_id)
        return clip


def _leave(patcher: ModelPatcher, name: str, error: Exception, node_id: str | None) -> None:
    text = f"left as it is: {error}"
    messages.announce(name, text, node_id)
    keep_notice("inactive", name, text, node_id, patcher.model)


def _gib(name: str, tooltip: str, advanced: bool | None = None) -> io.Float.Input:
    limits = {"min": 0.0, "max": MOST_GIB, "step": STEP_GIB, "round": ROUND_GIB}
    return io.Float.Input(name, default=0.0, tooltip=tooltip, advanced=advanced, **limits)


def _bytes(gib: float) -> int | None:
    return int(gib * GIB) if gib > 0 else None
