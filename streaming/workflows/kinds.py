"""The node classes that are put into workflows, and the host's that give a MODEL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

MODEL, CLIP, VAE = "MODEL", "CLIP", "VAE"


class Socket(NamedTuple):
    """An input or output that links connect."""

    name: str
    type: str
    optional: bool = False


@dataclass(frozen=True)
class Kind:
    """A node class as a workflow needs it.

    Attributes:
        name: its id.
        title: what the page shows.
        widgets: the defaults of its widgets, in the page's order.
        sockets: its inputs that are no widgets, in order.
        outputs: empty leaves those of the node that becomes one.
        optional: widgets that an API prompt may leave out.
        pack: where it comes from, as the page notes it.
        size: width and height on the canvas, with room to spare.
    """

    name: str
    title: str
    widgets: Mapping[str, Any]
    sockets: tuple[Socket, ...] = ()
    outputs: tuple[Socket, ...] = ()
    optional: frozenset[str] = frozenset()
    pack: str = ""
    size: tuple[int, int] = (340, 120)


OURS = "weightstream"
ALL_THREE = (Socket(MODEL, MODEL), Socket(CLIP, CLIP), Socket(VAE, VAE))

LOADER = Kind(
    "WeightStreamModelLoader",
    "Streamed Model Loader",
    {"unet_name": "", "weight_dtype": "default", "vram_limit_gb": 0.0},
    outputs=ALL_THREE,
    optional=frozenset({"vram_limit_gb"}),
    pack=OURS,
    size=(340, 150),
)
SETTINGS = Kind(
    "WeightStreamOffloadSettings",
    "Async Offload Settings",
    {
        "mode": "auto",
        "copy_streams": 0,
        "prefetch_depth": 0,
        "vram_limit_gb": 0.0,
        "pin_memory": "auto",
        "pinned_limit_gb": 0.0,
        "reserve_vram_gb": 0.0,
        "packing": "auto",
    },
    sockets=(Socket("model", MODEL, optional=True), Socket("clip", CLIP, optional=True)),
    outputs=ALL_THREE[:2],
    optional=frozenset({"packing"}),
    pack=OURS,
    size=(340, 330),
)
PLACEMENT = Kind(
    "WeightStreamGPUPlacement",
    "GPU Placement",
    {
        "devices": "",
        "split": "auto",
        "ratio": "",
        "clip_device": "default",
        "vae_device": "default",
        "on_missing": "fallback",
        "parallel_bits": "exact",
    },
    sockets=(Socket("model", MODEL), Socket("clip", CLIP, optional=True), Socket("vae", VAE, optional=True)),
    outputs=ALL_THREE,
    optional=frozenset({"devices", "split", "ratio", "clip_device", "vae_device", "on_missing", "parallel_bits"}),
    pack=OURS,
    size=(340, 544),
)
THROUGH = {kind.name: kind for kind in (SETTINGS, PLACEMENT)}

DIFFUSION_LOADER = "UNETLoader"

# In a prompt nothing says what type a link has. These of the host and of ComfyUI-GGUF give a MODEL in their first
# output and take none ...
GIVE_MODEL = frozenset(
    {
        "CheckpointLoader",
        "CheckpointLoaderNF4",
        "CheckpointLoaderSimple",
        "DiffusersLoader",
        "ImageOnlyCheckpointLoader",
        "LTXVLoader",
        "NunchakuFluxDiTLoader",
        "NunchakuQwenImageDiTLoader",
        "NunchakuZImageDiTLoader",
        "UnetLoaderGGUF",
        "UnetLoaderGGUFAdvanced",
        "unCLIPCheckpointLoader",
    }
)
# ... and whatever these have connected to "model" is one.
TAKE_MODEL = frozenset(
    {
        "BasicGuider",
        "BasicScheduler",
        "CFGGuider",
        "DualCFGGuider",
        "KSampler",
        "KSamplerAdvanced",
        "LoraLoader",
        "LoraLoaderModelOnly",
        "ModelSamplingAuraFlow",
        "ModelSamplingFlux",
        "ModelSamplingSD3",
        "PerturbedAttentionGuidance",
        "RescaleCFG",
        "SamplerCustom",
        "TorchCompileModel",
        PLACEMENT.name,
        SETTINGS.name,
    }
)
# What a widget holds: an input of these types takes no part of a model.
PLAIN_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "NUMBER"})
# KJNodes and Easy-Use: what one takes another one gives, wherever it is in the graph. They know each other by a name.
SET_NODES = frozenset({"SetNode", "easy setNode"})
GET_NODES = frozenset({"GetNode", "easy getNode"})
# They pass on what comes from elsewhere, by a name or a link that only the page knows.
PAGE_ONLY = frozenset({"Reroute", "PrimitiveNode", *SET_NODES, *GET_NODES})
