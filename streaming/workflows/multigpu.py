"""The loader nodes of ComfyUI-MultiGPU and DisTorch2: which of the host's each stands for, and what it asks for.

The pack makes its classes from the host's: the same inputs, then its own. Plain ones (``UNETLoaderMultiGPU``) choose a
device. Those of DisTorch2 also move ``virtual_vram_gb`` of a model to ``donor_device``, or place it as
``expert_mode_allocations`` says (allocations.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .allocations import CPU, DEFAULT, Measure, device_name, read_allocation
from .graph import LINKED
from .kinds import CLIP, LOADER, MODEL, VAE, Kind

CORE, GGUF, NF4, LTX = "comfy-core", "ComfyUI-GGUF", "ComfyUI_bitsandbytes_NF4", "ComfyUI-LTXVideo"
SUFFIX, DISTORCH, DISTORCH_2 = "MultiGPU", "DisTorch", "DisTorch2"
SELECTOR = "DeviceSelectorMultiGPU"
FIRST = "gpu:0"
# What our nodes take.
LEAST_SHARE, MOST_GIB = 0.001, 1024.0
# The host's own text encoder loaders with an input that takes default or cpu.
OWN_DEVICE = ("CLIPLoader", "DualCLIPLoader")


def _host(name: str, title: str, pack: str, roles: str, *widgets: str) -> tuple[Kind, frozenset[str]]:
    own = {"device": DEFAULT} if name in OWN_DEVICE else {}
    return Kind(name, title, {**dict.fromkeys(widgets), **own}, pack=pack), frozenset(roles.split())


CLIPS = ("clip_name1", "clip_name2", "clip_name3", "clip_name4")
# By the host's class: the class, and what it gives of a MODEL, a CLIP and a VAE, in the order of its outputs.
HOSTS = {
    kind.name: (kind, roles)
    for kind, roles in (
        _host("UNETLoader", "Load Diffusion Model", CORE, "model", "unet_name", "weight_dtype"),
        _host("UnetLoaderGGUF", "Unet Loader (GGUF)", GGUF, "model", "unet_name"),
        _host(
            "UnetLoaderGGUFAdvanced",
            "Unet Loader (GGUF/Advanced)",
            GGUF,
            "model",
            *("unet_name", "dequant_dtype", "patch_dtype", "patch_on_device"),
        ),
        _host("LTXVLoader", "LTXV Loader", LTX, "model vae", "ckpt_name", "dtype"),
        _host("CheckpointLoaderSimple", "Load Checkpoint", CORE, "model vae", "ckpt_name"),
        _host("CheckpointLoaderNF4", "CheckpointLoaderNF4", NF4, "model vae", "ckpt_name"),
        _host("DiffusersLoader", "Load Diffusers Model", CORE, "model vae", "model_path"),
        _host("CLIPLoader", "Load CLIP", CORE, "clip", "clip_name", "type"),
        _host("DualCLIPLoader", "DualCLIPLoader", CORE, "clip", *CLIPS[:2], "type"),
        _host("TripleCLIPLoader", "TripleCLIPLoader", CORE, "clip", *CLIPS[:3]),
        _host("QuadrupleCLIPLoader", "QuadrupleCLIPLoader", CORE, "clip", *CLIPS),
        _host("CLIPLoaderGGUF", "CLIPLoader (GGUF)", GGUF, "clip", "clip_name", "type"),
        _host("DualCLIPLoaderGGUF", "DualCLIPLoader (GGUF)", GGUF, "clip", *CLIPS[:2], "type"),
        _host("TripleCLIPLoaderGGUF", "TripleCLIPLoader (GGUF)", GGUF, "clip", *CLIPS[:3]),
        _host("QuadrupleCLIPLoaderGGUF", "QuadrupleCLIPLoader (GGUF)", GGUF, "clip", *CLIPS),
        _host("VAELoader", "Load VAE", CORE, "vae", "vae_name"),
        _host("CLIPVisionLoader", "Load CLIP Vision", CORE, "", "clip_name"),
        _host("ControlNetLoader", "Load ControlNet Model", CORE, "", "control_net_name"),
        _host("DiffControlNetLoader", "Load ControlNet Model (diff)", CORE, "", "control_net_name"),
    )
}
ADVANCED = "CheckpointLoaderAdvanced"
# Of the Wan wrapper, whose models are no MODEL.
WAN = ("WanVideo", "LoadWanVideo")


@dataclass
class Wish:
    """What a loader node asks for.

    Attributes:
        devices: the GPUs for its MODEL, the one that computes first; None for the one that ComfyUI uses.
        ratio: a number for each of them, or none.
        limit_gib: VRAM for the weights; 0 where nothing limits it.
        clip_device, vae_device: as GPU Placement takes them.
        clip_streams: its text encoder shall stream.
        notes: codes of notes, each with its values.
    """

    devices: tuple[str, ...] | None = None
    ratio: tuple[float, ...] = ()
    limit_gib: float = 0.0
    clip_device: str = DEFAULT
    vae_device: str = DEFAULT
    clip_streams: bool = False
    notes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def tell(self, code: str, **values: Any) -> None:
        self.notes.append((code, values))


@dataclass(frozen=True)
class Archived:
    """A node class of the archived pack.

    Attributes:
        kind: what stands for it: one of the host's, or ours.
        roles: what it gives: model, clip, vae.
        names: its widgets, in the page's order.
    """

    kind: Kind
    roles: frozenset[str]
    names: tuple[str, ...]

    def read(self, values: Mapping[str, Any]) -> Wish:
        """What a node with these values asks for."""
        wish = Wish()
        if "unet_device" in self.names or "unet_compute_device" in self.names:
            _read_advanced(values, wish)
            return wish
        name = "compute_device" if "compute_device" in self.names else "device"
        device = _device(values, name, wish)
        if "model" in self.roles:
            _read_model(values, "", name, device, wish)
        if "vae" in self.roles:
            wish.vae_device = device if device != FIRST else DEFAULT
        if "clip" in self.roles:
            wish.clip_device = device if device != FIRST else DEFAULT
            _read_clip(values, "", wish)
        elif "model" not in self.roles:
            _say_unused(values, ("virtual_vram_gb", "donor_device", "expert_mode_allocations"), wish)
        if not self.roles and device not in (FIRST, DEFAULT):
            wish.tell("no-device", name=name, value=values[name])
        return wish

    @property
    def outputs(self) -> dict[str, int]:
        """The types that it gives, with the places of their outputs in the host's classes."""
        if MODEL.lower() not in self.roles:
            return {role.upper(): 0 for role in self.roles}
        vae = 1 if self.kind.name == "LTXVLoader" else 2
        both = (
            {CLIP: 1} if self.kind.name in ("CheckpointLoaderSimple", "CheckpointLoaderNF4", "DiffusersLoader") else {}
        )
        return {MODEL: 0, **both, **({VAE: vae} if "vae" in self.roles else {})}

    @property
    def own_device(self) -> bool:
        """Whether the node that stands for it can put its text encoder on the CPU itself."""
        return self.kind.name in OWN_DEVICE


def find(kind: str) -> Archived | None:
    """Return what is known of a class of the archived pack; None for other classes, and those without an equal."""
    if kind == "UNetLoaderLP":
        return Archived(LOADER, frozenset({"model"}), ("unet_name",))
    for middle in (DISTORCH_2, DISTORCH, ""):
        name = kind.removesuffix(middle + SUFFIX)
        if name != kind and name in (*HOSTS, ADVANCED):
            return _advanced(middle) if name == ADVANCED else _archived(name, middle)
    return None


def is_archived(kind: str) -> bool:
    """Whether a class is one of that pack, known or not."""
    return kind.endswith(SUFFIX) and kind != SELECTOR


def _archived(name: str, middle: str) -> Archived:
    host, roles = HOSTS[name]
    names = tuple(widget for widget in host.widgets if widget != "device")
    device = "compute_device" if middle == DISTORCH_2 and "clip" not in roles and "CLIP" not in name else "device"
    own = {
        "": (device,),
        DISTORCH: (device, "virtual_vram_gb", "use_other_vram", "expert_mode_allocations"),
        DISTORCH_2: (device, "virtual_vram_gb", "donor_device", "expert_mode_allocations", "eject_models"),
    }
    return Archived(LOADER if name == "UNETLoader" else host, roles, names + own[middle])


def _advanced(middle: str) -> Archived:
    names = ["ckpt_name", "unet_device", "clip_device", "vae_device"]
    if middle:
        names = ["ckpt_name"]
        names += [
            f"{part}_{what}"
            for part in ("unet", "clip")
            for what in ("compute_device", "virtual_vram_gb", "donor_device")
        ]
        names += ["vae_device", "unet_expert_mode_allocations", "clip_expert_mode_allocations", "high_precision_loras"]
    host, _ = HOSTS["CheckpointLoaderSimple"]
    return Archived(host, frozenset({"model", "clip", "vae"}), (*names, "eject_models"))


def _read_advanced(values: Mapping[str, Any], wish: Wish) -> None:
    name = "unet_compute_device" if "unet_compute_device" in values else "unet_device"
    _read_model(values, "unet_", name, _device(values, name, wish), wish)
    clip = _device(values, name.replace("unet", "clip"), wish)
    wish.clip_device = clip if clip != FIRST else DEFAULT
    _read_clip(values, "clip_", wish)
    vae = _device(values, "vae_device", wish)
    wish.vae_device = vae if vae != FIRST else DEFAULT


def _read_model(values: Mapping[str, Any], prefix: str, name: str, device: str, wish: Wish) -> None:
    """What is asked for a MODEL that computes on ``device``."""
    if device == CPU:
        wish.tell("compute-cpu", name=name)
    compute = device if device not in (CPU, DEFAULT) else FIRST
    wish.devices = None if compute == FIRST else (compute,)
    expert = f"{prefix}expert_mode_allocations"
    if (text := values.get(expert)) is LINKED:
        wish.tell("linked", name=expert)
    elif text:
        _read_expert(str(text), expert, compute, wish)
        return
    gib = _gib(values, f"{prefix}virtual_vram_gb", wish)
    if not gib:
        return
    wish.tell("virtual-vram", gib=f"{gib:g}")
    if values.get("use_other_vram") is True:
        wish.devices = ()
        wish.tell("donors")
        return
    donor = _device(values, f"{prefix}donor_device", wish)
    if donor not in (CPU, DEFAULT, compute):
        wish.devices = (compute, donor)
        wish.tell("donor", donor=donor, devices=f"{compute}, {donor}")


def _read_expert(text: str, name: str, compute: str, wish: Wish) -> None:
    """What an allocation asks for, of a MODEL that computes on ``compute``."""
    allocation = read_allocation(text)
    if allocation is None:
        wish.tell("unread", name=name, value=text)
        return
    gpus = allocation.gpus
    devices = tuple(dict.fromkeys((compute, *gpus)))
    wish.devices = devices if devices != (FIRST,) else None
    amounts = [gpus.get(device) for device in devices]
    known = [amount for amount in amounts if amount]
    if allocation.measure is Measure.MEMORY or (len(devices) > 1 and len(known) < len(devices)):
        wish.tell("by-memory", name=name, value=text, devices=", ".join(devices))
    elif len(devices) > 1:
        wish.ratio = tuple(max(LEAST_SHARE, round(amount, 3)) for amount in known)
        wish.tell("ratio", name=name, value=text, ratio=":".join(map(share_text, wish.ratio)))
    elif allocation.measure is Measure.BYTES and known:
        wish.limit_gib = min(MOST_GIB, max(0.1, round(known[0], 1)))
        wish.tell("limit", gib=f"{wish.limit_gib:g}", name=name, value=text)
    else:
        wish.tell("by-memory", name=name, value=text, devices=", ".join(devices))


def _read_clip(values: Mapping[str, Any], prefix: str, wish: Wish) -> None:
    """Of a text encoder: how its bytes are divided has no equal, but on a GPU it can stream."""
    expert, gib = f"{prefix}expert_mode_allocations", f"{prefix}virtual_vram_gb"
    unused = [f"{prefix}donor_device", expert]
    if wish.clip_device == CPU:
        unused.insert(0, gib)
    else:
        wish.clip_streams = bool(_gib(values, gib, wish)) or bool(values.get(expert))
    _say_unused(values, unused, wish)


def _say_unused(values: Mapping[str, Any], names: Sequence[str], wish: Wish) -> None:
    """Tell of values that have no equal for what the node loads; the pack's defaults ask for nothing."""
    for name in names:
        if (value := values.get(name)) not in (None, "", 0, CPU):
            wish.tell("no-device", name=name, value="a link" if value is LINKED else value)


def share_text(share: float) -> str:
    """A number of a ratio as GPU Placement takes it: without an exponent."""
    return f"{share:.3f}".rstrip("0").rstrip(".")


def _device(values: Mapping[str, Any], name: str, wish: Wish) -> str:
    value = values.get(name, DEFAULT)
    if value is LINKED:
        wish.tell("linked", name=name)
        return DEFAULT
    device = device_name(str(value))
    if device is None:
        wish.tell("device", name=name, value=value)
    return device or DEFAULT


def _gib(values: Mapping[str, Any], name: str, wish: Wish) -> float:
    value = values.get(name, 0)
    if value is LINKED:
        wish.tell("linked", name=name)
    elif isinstance(value, (int, float)) and 0 <= value < math.inf:
        return round(float(value), 2)
    elif value is not None:
        wish.tell("unread", name=name, value=str(value))
    return 0.0
