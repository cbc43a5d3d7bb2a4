"""A tiny ControlNet for the tiny FLUX."""

from __future__ import annotations

from pathlib import Path

from tools.checkpoints import FLUX_SIZES, TensorSpec, flux_tensors, linear, write_checkpoint

CONTROLNET = "tiny-flux-controlnet.safetensors"


def write_controlnet(path: Path) -> None:
    write_checkpoint(path, _tensors(), seed=3)


def _tensors() -> list[TensorSpec]:
    """A FLUX ControlNet of the XLabs kind: blocks of the model itself, and a layer behind each for its residual."""
    size = FLUX_SIZES["tiny"]
    specs = [spec for spec in flux_tensors(size) if not spec.name.startswith("final_layer")]
    for kind, count in (("controlnet_blocks", size.double_blocks), ("controlnet_single_blocks", size.single_blocks)):
        for block in range(count):
            specs += linear(f"{kind}.{block}", size.hidden, size.hidden)
    specs += linear("pos_embed_input", 64, size.hidden)
    channels = 3
    for layer in range(0, 15, 2):
        specs += linear(f"input_hint_block.{layer}", channels, 16, kernel=(3, 3))
        channels = 16
    return specs
