"""What is measured: models, picture sizes, and how much VRAM is free. No torch, no ComfyUI."""

from __future__ import annotations

from dataclasses import dataclass, replace

GB = 1_000_000_000
STREAMED_LIMIT_GB = 1.5  # FLUX-dev's fixed weights and two slots of its largest block take 1.49 GB: nothing stays


@dataclass(frozen=True)
class Model:
    """A checkpoint that tools/checkpoints.py writes, and the conditioning that the model takes.

    Attributes:
        name: the file's stem.
        kind, options: what tools/checkpoints.py is called with.
        context: tokens and width of the text conditioning.
        pooled: width of the pooled conditioning; 0 where the model has none.
        virtual: bytes of the virtual device that a CPU streams a small model to.
    """

    name: str
    kind: str
    options: tuple[str, ...]
    context: tuple[int, int]
    pooled: int = 0
    virtual: str = ""

    @property
    def filename(self) -> str:
        return f"{self.name}.safetensors"


FLUX_DEV = Model("flux-dev-random", "flux", ("--size", "dev"), context=(512, 4096), pooled=768)
FLUX_TINY = Model("flux-tiny-random", "flux", ("--size", "tiny"), context=(32, 768), pooled=768, virtual="24MB")
QWEN_IMAGE = Model("qwen-image-random", "qwen-image", (), context=(128, 3584))
QWEN_IMAGE_TINY = Model("qwen-image-tiny-random", "qwen-image", ("--layers", "2"), context=(16, 3584), virtual="2GB")
TINY_MODELS = {FLUX_DEV: FLUX_TINY, QWEN_IMAGE: QWEN_IMAGE_TINY}

COMFY_CONTENDERS = ("weightstream", "comfy-dynamic", "comfy-static")
PEERS = ("diffusers-block", "diffusers-leaf", "mmgp")
LIMITS = ("resident", "h2d")


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        side: width and height of the picture in pixels.
        free_gb: VRAM that is free when a contender's process starts; None leaves the whole card.
        stream_all: keep no block on the card, whatever is free.
        contenders: who runs by default, beside the two limits.
    """

    name: str
    model: Model
    side: int
    free_gb: float | None = None
    stream_all: bool = False
    contenders: tuple[str, ...] = COMFY_CONTENDERS
    tiny: bool = False

    @property
    def latent_side(self) -> int:
        return self.side // 8

    @property
    def vram_limit_gb(self) -> float:
        """The loader node's input; 0 lets it choose, as a user would."""
        return STREAMED_LIMIT_GB if self.stream_all and not self.tiny else 0.0

    @property
    def limits_key(self) -> tuple[str, int]:
        """Cases that agree in this have the same compute time with everything resident."""
        return self.model.name, self.side

    def shrunk(self) -> Case:
        """The same case in a size that a CPU runs in a second, to try the scripts."""
        return replace(self, model=TINY_MODELS[self.model], side=128, free_gb=None, tiny=True)


CASES = {
    case.name: case
    for case in (
        Case("flux-1024-streamed", FLUX_DEV, 1024, stream_all=True, contenders=COMFY_CONTENDERS + PEERS),
        Case("flux-1024-8gb", FLUX_DEV, 1024, free_gb=8),
        Case("flux-1024-12gb", FLUX_DEV, 1024, free_gb=12),
        Case("flux-1024-16gb", FLUX_DEV, 1024, free_gb=16),
        Case("flux-1024-20gb", FLUX_DEV, 1024, free_gb=20),
        Case("flux-2048-8gb", FLUX_DEV, 2048, free_gb=8),
        Case("qwen-1328-24gb", QWEN_IMAGE, 1328, free_gb=24),
    )
}
