"""What is measured: models, picture sizes, and how much VRAM is free. No torch, no ComfyUI."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

GB = 1_000_000_000
DEFAULT_STEPS = 12


@dataclass(frozen=True)
class Model:
    """A checkpoint that tools/checkpoints.py writes, and the conditioning that the model takes.

    Attributes:
        name: the file's stem.
        kind, options: what tools/checkpoints.py is called with.
        context: tokens and width of the text conditioning.
        pooled: width of the pooled conditioning; 0 where the model has none.
        virtual: bytes of the virtual device that a CPU streams a small model to.
        streamed_limit_gb: the loader node's limit where as much as possible must stream: room for what is outside of
            blocks and for the largest block, and little more.
    """

    name: str
    kind: str
    options: tuple[str, ...]
    context: tuple[int, int]
    pooled: int = 0
    virtual: str = ""
    streamed_limit_gb: float = 0.0

    @property
    def filename(self) -> str:
        return f"{self.name}.safetensors"


FLUX_DEV = Model("flux-dev-random", "flux", ("--size", "dev"), context=(512, 4096), pooled=768, streamed_limit_gb=0.85)
# As many blocks as FLUX_DEV, and next to nothing to compute or to copy in them: a step takes what the host takes.
FLUX_THIN = replace(FLUX_DEV, name="flux-thin-random", options=("--size", "thin"), streamed_limit_gb=0.0087)
FLUX_TINY = Model("flux-tiny-random", "flux", ("--size", "tiny"), context=(32, 768), pooled=768, virtual="24MB")
QWEN_IMAGE = Model("qwen-image-random", "qwen-image", (), context=(128, 3584))
QWEN_IMAGE_TINY = Model("qwen-image-tiny-random", "qwen-image", ("--layers", "2"), context=(16, 3584), virtual="2GB")
WAN = Model("wan-14b-random", "wan", ("--size", "14b"), context=(512, 4096))
WAN_TINY = Model("wan-tiny-random", "wan", ("--size", "tiny"), context=(16, 4096), virtual="24MB")
SD35 = Model("sd35-large-random", "sd35", ("--size", "large"), context=(154, 4096), pooled=2048)
SD35_TINY = Model("sd35-tiny-random", "sd35", ("--size", "tiny"), context=(32, 768), pooled=768, virtual="24MB")
TINY_MODELS = {FLUX_DEV: FLUX_TINY, FLUX_THIN: FLUX_TINY, QWEN_IMAGE: QWEN_IMAGE_TINY, WAN: WAN_TINY, SD35: SD35_TINY}

DYNAMIC_CONTENDERS = ("weightstream", "comfy-dynamic")
COMFY_CONTENDERS = (*DYNAMIC_CONTENDERS, "comfy-static")


class FastDisk(NamedTuple):
    """A contender that is another one with ComfyUI's reading from a fast disk forced on or off.

    Attributes:
        base: who it is otherwise.
        option: of ComfyUI's command line; a ComfyUI without it does not offer this contender.
        native: the contender that is ComfyUI's own loader with the same option.
    """

    base: str
    option: str
    native: str


FAST_DISK = {
    "weightstream-fast-disk": FastDisk("weightstream", "--fast-disk", "comfy-fast-disk"),
    "comfy-fast-disk": FastDisk("comfy-dynamic", "--fast-disk", "comfy-fast-disk"),
    "weightstream-no-fast-disk": FastDisk("weightstream", "--disable-fast-disk", "comfy-no-fast-disk"),
    "comfy-no-fast-disk": FastDisk("comfy-dynamic", "--disable-fast-disk", "comfy-no-fast-disk"),
}
PEERS = ("diffusers-block", "diffusers-leaf", "mmgp")
TWO_GPU_CONTENDERS = ("weightstream", "weightstream-blocks", "weightstream-one-gpu", "comfy-dynamic")
PARALLEL_CONTENDERS = ("weightstream", "weightstream-one-gpu")
LIMITS = ("resident", "h2d")
# They make their weights themselves, or none.
READ_NO_FILE = ("h2d", *PEERS)


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        width, height: of the picture in pixels.
        frames: of a video; None for a picture.
        free_gb: VRAM that is free when a contender's process starts; None leaves the whole card.
        stream_all: keep as little on the card as the contender can, whatever is free.
        compiled: by torch.compile: "whole", as the host's node does it, or "blocks", each by itself; "" for not at all.
        gpus: over which "weightstream" splits the model; everybody else has the first. Each has ``free_gb``.
        split: how much each GPU gets, as the placement node has it; "parallel" has all work at the same time.
        cfg: the guidance; with more than 1 a step computes two prompts.
        steps: denoising steps that are measured unless the command line says how many; None for the usual number.
        contenders: who runs by default, beside the two limits.
    """

    name: str
    model: Model
    width: int
    height: int
    frames: int | None = None
    free_gb: float | None = None
    stream_all: bool = False
    compiled: str = ""
    gpus: int = 1
    split: str = "auto"
    cfg: float = 1.0
    steps: int | None = None
    contenders: tuple[str, ...] = DYNAMIC_CONTENDERS
    tiny: bool = False

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """16 channels at an eighth of the size; of a video's frames the first, and one for every four that follow."""
        times = () if self.frames is None else ((self.frames - 1) // 4 + 1,)
        return (1, 16, *times, self.height // 8, self.width // 8)

    @property
    def vram_limit_gb(self) -> float:
        """The loader node's input; 0 lets it choose, as a user would."""
        return self.model.streamed_limit_gb if self.stream_all else 0.0

    @property
    def limits_key(self) -> tuple[str, tuple[int, ...], str, bool]:
        """Cases that agree in this have the same compute time with everything resident."""
        return self.model.name, self.latent_shape, self.compiled, self.cfg > 1

    @property
    def devices(self) -> str:
        """The placement node's input."""
        return ",".join(f"gpu:{number}" for number in range(self.gpus))

    def shrunk(self) -> Case:
        """The same case in a size that a CPU runs in a second, to try the scripts."""
        frames = None if self.frames is None else 5
        model = TINY_MODELS[self.model]
        return replace(self, model=model, width=128, height=128, frames=frames, free_gb=None, tiny=True)


# A step of these takes a second or more, so fewer make a good median.
LONG_STEPS = 6
WITH_CFG: dict[str, Any] = {"steps": LONG_STEPS, "contenders": (*PARALLEL_CONTENDERS, "comfy-cfg-split")}

CASES = {
    case.name: case
    for case in (
        Case("flux-1024-streamed", FLUX_DEV, 1024, 1024, stream_all=True, contenders=COMFY_CONTENDERS + PEERS),
        Case("flux-1024-6gb", FLUX_DEV, 1024, 1024, free_gb=6),
        Case("flux-1024-8gb", FLUX_DEV, 1024, 1024, free_gb=8, contenders=(*COMFY_CONTENDERS, *FAST_DISK)),
        Case("flux-1024-12gb", FLUX_DEV, 1024, 1024, free_gb=12, contenders=COMFY_CONTENDERS),
        Case("flux-1024-16gb", FLUX_DEV, 1024, 1024, free_gb=16, contenders=(*COMFY_CONTENDERS, *FAST_DISK)),
        Case("flux-1024-20gb", FLUX_DEV, 1024, 1024, free_gb=20, contenders=COMFY_CONTENDERS),
        Case("flux-1024-20gb-whole", FLUX_DEV, 1024, 1024, free_gb=20, compiled="whole"),
        Case("flux-1024-20gb-blocks", FLUX_DEV, 1024, 1024, free_gb=20, compiled="blocks"),
        Case("flux-1024-24gb", FLUX_DEV, 1024, 1024, free_gb=24),
        Case("flux-2048-4gb", FLUX_DEV, 2048, 2048, free_gb=4, steps=LONG_STEPS),
        Case("flux-2048-8gb", FLUX_DEV, 2048, 2048, free_gb=8, steps=LONG_STEPS, contenders=COMFY_CONTENDERS),
        Case("qwen-1328-12gb", QWEN_IMAGE, 1328, 1328, free_gb=12),
        Case("qwen-1328-24gb", QWEN_IMAGE, 1328, 1328, free_gb=24, contenders=COMFY_CONTENDERS),
        Case("wan-480p-8gb", WAN, 832, 480, frames=33, free_gb=8, steps=LONG_STEPS),
        Case("wan-480p-16gb", WAN, 832, 480, frames=33, free_gb=16, steps=LONG_STEPS),
        Case("sd35-1024-8gb", SD35, 1024, 1024, free_gb=8),
        Case("2gpus-flux-1024-streamed", FLUX_DEV, 1024, 1024, stream_all=True, gpus=2, contenders=TWO_GPU_CONTENDERS),
        Case("flux-thin-streamed", FLUX_THIN, 256, 256, stream_all=True),
        Case("2gpus-flux-thin-streamed", FLUX_THIN, 256, 256, stream_all=True, gpus=2, contenders=("weightstream",)),
        Case("2gpus-flux-1024-8gb", FLUX_DEV, 1024, 1024, free_gb=8, gpus=2, contenders=TWO_GPU_CONTENDERS),
        Case("2gpus-flux-1024-11gb", FLUX_DEV, 1024, 1024, free_gb=11, gpus=2, contenders=TWO_GPU_CONTENDERS),
        Case("2gpus-flux-1024-fits", FLUX_DEV, 1024, 1024, gpus=2, split="equal", contenders=("weightstream",)),
        Case("2gpus-qwen-1328-24gb", QWEN_IMAGE, 1328, 1328, free_gb=24, gpus=2, contenders=TWO_GPU_CONTENDERS),
        Case("2gpus-qwen-1328-fits", QWEN_IMAGE, 1328, 1328, gpus=2, split="equal", contenders=("weightstream",)),
        Case(
            "2gpus-wan-480p-12gb",
            WAN,
            832,
            480,
            frames=33,
            free_gb=12,
            gpus=2,
            steps=LONG_STEPS,
            contenders=TWO_GPU_CONTENDERS,
        ),
        *(
            Case(f"2gpus-{name}-parallel", model, *size, gpus=2, split="parallel", **more)
            for name, model, size, more in (
                ("flux-1024", FLUX_DEV, (1024, 1024), {"contenders": PARALLEL_CONTENDERS}),
                ("flux-1024-8gb", FLUX_DEV, (1024, 1024), {"free_gb": 8, "contenders": PARALLEL_CONTENDERS}),
                ("flux-2048", FLUX_DEV, (2048, 2048), {"steps": LONG_STEPS, "contenders": PARALLEL_CONTENDERS}),
                (
                    "flux-2048-8gb",
                    FLUX_DEV,
                    (2048, 2048),
                    {"free_gb": 8, "steps": LONG_STEPS, "contenders": PARALLEL_CONTENDERS},
                ),
                ("qwen-1328-24gb-cfg", QWEN_IMAGE, (1328, 1328), {"free_gb": 24, "cfg": 4.0, **WITH_CFG}),
                ("wan-480p-12gb-cfg", WAN, (832, 480, 33), {"free_gb": 12, "cfg": 5.0, **WITH_CFG}),
            )
        ),
    )
}
