"""Write random checkpoints in the shapes of real architectures, fast and with little memory.

    python tools/checkpoints.py flux PATH [--size tiny|thin|dev] [--seed N]
    python tools/checkpoints.py clip-l|flux-lora|qwen-image|sd35|wan PATH ...

The demo, the tests and the benchmarks use them: the host detects the architecture from names and shapes alone, and
how fast a block is copied or computed does not depend on what its weights mean. Values are normal and scaled to the
width of their layer, so that activations stay finite and every block changes the picture.

[Note: deterministic and parallel]
The file is cut into chunks. A chunk's values depend on the seed, its tensor and its place in it, never on the thread
that makes it: threads write where the header says, in any order, and the same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

CHUNK_VALUES = 1 << 20  # 4 MB of float32: larger chunks are no faster, and leave the cache
ITEM_BYTES = 2  # BF16 and F16 alike


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint: normal values of standard deviation ``std`` around ``mean``."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    dtype: str = "BF16"

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.values * ITEM_BYTES


def linear(
    name: str, inputs: int, outputs: int, bias: bool = True, dtype: str = "BF16", kernel: tuple[int, ...] = ()
) -> list[TensorSpec]:
    """A layer, or with ``kernel`` a convolution, whose outputs are about as large as its inputs, whatever its width."""
    std = (inputs * math.prod(kernel)) ** -0.5
    weight = TensorSpec(f"{name}.weight", (outputs, inputs, *kernel), std, dtype=dtype)
    return [weight, TensorSpec(f"{name}.bias", (outputs,), std=0.02, dtype=dtype)] if bias else [weight]


def norm(name: str, width: int, dtype: str = "BF16") -> TensorSpec:
    """A norm's scale: exactly 1."""
    return TensorSpec(name, (width,), std=0.0, mean=1.0, dtype=dtype)


@dataclass(frozen=True)
class FluxSize:
    """The figures from which the host recognises a FLUX; a head is always 128 wide."""

    hidden: int
    double_blocks: int
    single_blocks: int
    context: int
    pooled: int
    guidance: bool


FLUX_SIZES = {
    # Context and pooled widths are those of a CLIP-L text encoder, so that one small file can drive it.
    "tiny": FluxSize(hidden=256, double_blocks=2, single_blocks=4, context=768, pooled=768, guidance=False),
    # As many blocks as dev, each with as many kernels, and next to nothing for a GPU to do in them.
    "thin": FluxSize(hidden=256, double_blocks=19, single_blocks=38, context=4096, pooled=768, guidance=True),
    "dev": FluxSize(hidden=3072, double_blocks=19, single_blocks=38, context=4096, pooled=768, guidance=True),
}
HEAD = 128
FLUX_PATCH = 64  # 2 x 2 latent pixels of 16 channels


def flux_block_linears(size: FluxSize) -> Iterator[tuple[str, int, int]]:
    """Name, inputs and outputs of every matrix in FLUX's blocks."""
    h = size.hidden
    for block in range(size.double_blocks):
        for stream in ("img", "txt"):
            prefix = f"double_blocks.{block}.{stream}_"
            yield f"{prefix}mod.lin", h, 6 * h
            yield f"{prefix}attn.qkv", h, 3 * h
            yield f"{prefix}attn.proj", h, h
            yield f"{prefix}mlp.0", h, 4 * h
            yield f"{prefix}mlp.2", 4 * h, h
    for block in range(size.single_blocks):
        prefix = f"single_blocks.{block}."
        yield f"{prefix}modulation.lin", h, 3 * h
        yield f"{prefix}linear1", h, 7 * h
        yield f"{prefix}linear2", 5 * h, h


def flux_norms(size: FluxSize) -> Iterator[TensorSpec]:
    attentions = [f"double_blocks.{i}.{s}_attn." for i in range(size.double_blocks) for s in ("img", "txt")]
    attentions += [f"single_blocks.{i}." for i in range(size.single_blocks)]
    for prefix in attentions:
        yield norm(f"{prefix}norm.query_norm.scale", HEAD)
        yield norm(f"{prefix}norm.key_norm.scale", HEAD)


def flux_tensors(size: FluxSize) -> list[TensorSpec]:
    h = size.hidden
    outer = [("img_in", FLUX_PATCH, h), ("txt_in", size.context, h)]
    embedders = {"time_in": 256, "vector_in": size.pooled} | ({"guidance_in": 256} if size.guidance else {})
    for name, inputs in embedders.items():
        outer += [(f"{name}.in_layer", inputs, h), (f"{name}.out_layer", h, h)]
    outer += [("final_layer.linear", h, FLUX_PATCH), ("final_layer.adaLN_modulation.1", h, 2 * h)]
    linears = [*outer, *flux_block_linears(size)]
    return [*(spec for layer in linears for spec in linear(*layer)), *flux_norms(size)]


def flux_lora_tensors(size: FluxSize, rank: int) -> list[TensorSpec]:
    """A LoRA on every matrix of every block that moves each weight by about a tenth of its size."""
    specs = []
    for name, inputs, outputs in flux_block_linears(size):
        key = f"lora_unet_{name.replace('.', '_')}"
        specs.append(TensorSpec(f"{key}.lora_down.weight", (rank, inputs), std=inputs**-0.5))
        specs.append(TensorSpec(f"{key}.lora_up.weight", (outputs, rank), std=0.1 * rank**-0.5))
        specs.append(TensorSpec(f"{key}.alpha", (), std=0.0, mean=float(rank)))
    return specs


def qwen_image_tensors(layers: int) -> list[TensorSpec]:
    h = 3072
    specs = [
        *linear("time_text_embed.timestep_embedder.linear_1", 256, h),
        *linear("time_text_embed.timestep_embedder.linear_2", h, h),
        norm("txt_norm.weight", 3584),
        *linear("img_in", 64, h),
        *linear("txt_in", 3584, h),
        *linear("norm_out.linear", h, 2 * h),
        *linear("proj_out", h, 64),
    ]
    for block in range(layers):
        prefix = f"transformer_blocks.{block}."
        for stream in ("img", "txt"):
            specs += linear(f"{prefix}{stream}_mod.1", h, 6 * h)
            specs += linear(f"{prefix}{stream}_mlp.net.0.proj", h, 4 * h)
            specs += linear(f"{prefix}{stream}_mlp.net.2", 4 * h, h)
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
            specs += linear(f"{prefix}attn.{name}", h, h)
        specs += [
            norm(f"{prefix}attn.{name}.weight", HEAD) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
        ]
    return specs


@dataclass(frozen=True)
class WanSize:
    """The figures from which the host recognises a Wan 2.1; a head is always 128 wide."""

    dim: int
    ffn: int
    layers: int


WAN_SIZES = {
    "tiny": WanSize(dim=256, ffn=1024, layers=6),
    "14b": WanSize(dim=5120, ffn=13824, layers=40),
}
# The host takes these for granted, so a small Wan has them too.
WAN_TEXT = 4096
WAN_TIME = 256
WAN_PATCH = (1, 2, 2)


def wan_tensors(size: WanSize) -> list[TensorSpec]:
    """A Wan 2.1 that makes video from text."""
    d = size.dim
    specs = [
        *linear("patch_embedding", 16, d, kernel=WAN_PATCH),
        *linear("text_embedding.0", WAN_TEXT, d),
        *linear("text_embedding.2", d, d),
        *linear("time_embedding.0", WAN_TIME, d),
        *linear("time_embedding.2", d, d),
        *linear("time_projection.1", d, 6 * d),
        *linear("head.head", d, 16 * math.prod(WAN_PATCH)),
        TensorSpec("head.modulation", (1, 2, d), std=d**-0.5),
    ]
    return [*specs, *(spec for block in range(size.layers) for spec in wan_block(f"blocks.{block}.", size))]


def wan_block(prefix: str, size: WanSize) -> Iterator[TensorSpec]:
    d = size.dim
    for attention in ("self_attn", "cross_attn"):
        for name in ("q", "k", "v", "o"):
            yield from linear(f"{prefix}{attention}.{name}", d, d)
        yield norm(f"{prefix}{attention}.norm_q.weight", d)
        yield norm(f"{prefix}{attention}.norm_k.weight", d)
    yield norm(f"{prefix}norm3.weight", d)
    yield TensorSpec(f"{prefix}norm3.bias", (d,), std=0.02)
    yield from linear(f"{prefix}ffn.0", d, size.ffn)
    yield from linear(f"{prefix}ffn.2", size.ffn, d)
    yield TensorSpec(f"{prefix}modulation", (1, 6, d), std=d**-0.5)


@dataclass(frozen=True)
class SD35Size:
    """The figures from which the host recognises a Stable Diffusion 3.5; a block and a head for every 64 of its width.

    Attributes:
        positions: side of the square of positions, in patches of 2 x 2 latent pixels.
    """

    depth: int
    context: int
    pooled: int
    positions: int

    @property
    def hidden(self) -> int:
        return SD35_HEAD * self.depth


SD35_SIZES = {
    # As with FLUX, CLIP-L can drive the small one.
    "tiny": SD35Size(depth=4, context=768, pooled=768, positions=64),
    "large": SD35Size(depth=38, context=4096, pooled=2048, positions=192),
}
SD35_HEAD = 64


def sd35_tensors(size: SD35Size) -> list[TensorSpec]:
    h = size.hidden
    specs = [
        # As large as the sines and cosines that the published one holds.
        TensorSpec("pos_embed", (1, size.positions**2, h), std=0.5**0.5),
        *linear("x_embedder.proj", 16, h, kernel=(2, 2)),
        *linear("context_embedder", size.context, h),
        *linear("t_embedder.mlp.0", 256, h),
        *linear("t_embedder.mlp.2", h, h),
        *linear("y_embedder.mlp.0", size.pooled, h),
        *linear("y_embedder.mlp.2", h, h),
        *linear("final_layer.linear", h, 64),
        *linear("final_layer.adaLN_modulation.1", h, 2 * h),
    ]
    for block in range(size.depth):
        # Nothing reads the text after the last block, which therefore only takes attention from it.
        specs += sd35_stream(f"joint_blocks.{block}.context_block.", h, attended_only=block == size.depth - 1)
        specs += sd35_stream(f"joint_blocks.{block}.x_block.", h)
    return specs


def sd35_stream(prefix: str, h: int, attended_only: bool = False) -> Iterator[TensorSpec]:
    """The text's or the picture's half of a block."""
    yield from linear(f"{prefix}adaLN_modulation.1", h, (2 if attended_only else 6) * h)
    yield from linear(f"{prefix}attn.qkv", h, 3 * h)
    yield norm(f"{prefix}attn.ln_q.weight", SD35_HEAD)
    yield norm(f"{prefix}attn.ln_k.weight", SD35_HEAD)
    if not attended_only:
        yield from linear(f"{prefix}attn.proj", h, h)
        yield from linear(f"{prefix}mlp.fc1", h, 4 * h)
        yield from linear(f"{prefix}mlp.fc2", 4 * h, h)


def clip_l_tensors() -> list[TensorSpec]:
    """CLIP-L in full: the host knows its depth and width, and leaves a missing layer's memory uninitialised."""
    h, f16 = 768, "F16"
    specs = [
        TensorSpec("text_model.embeddings.token_embedding.weight", (49408, h), std=0.02, dtype=f16),
        TensorSpec("text_model.embeddings.position_embedding.weight", (77, h), std=0.01, dtype=f16),
    ]
    norms = ["text_model.final_layer_norm"]
    for layer in range(12):
        prefix = f"text_model.encoder.layers.{layer}."
        norms += [f"{prefix}layer_norm1", f"{prefix}layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            specs += linear(f"{prefix}self_attn.{name}", h, h, dtype=f16)
        specs += linear(f"{prefix}mlp.fc1", h, 4 * h, dtype=f16)
        specs += linear(f"{prefix}mlp.fc2", 4 * h, h, dtype=f16)
    for name in norms:
        specs += [norm(f"{name}.weight", h, f16), TensorSpec(f"{name}.bias", (h,), std=0.02, dtype=f16)]
    return [*specs, *linear("text_projection", h, h, bias=False, dtype=f16)]


def encode_header(specs: list[TensorSpec]) -> bytes:
    """The safetensors header of ``specs`` laid out one after the other, padded to 8 bytes as the format asks."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def random_bytes(spec: TensorSpec, count: int, seed: list[int]) -> bytes:
    """``count`` values of ``spec`` in its own number format."""
    if spec.std == 0.0:
        values = np.full(count, spec.mean, dtype=np.float32)
    else:
        values = np.random.Generator(np.random.PCG64DXSM(seed)).standard_normal(count, dtype=np.float32)
        values *= np.float32(spec.std)
        values += np.float32(spec.mean)
    if spec.dtype == "F16":
        return values.astype("<f2").tobytes()
    # bfloat16 is the upper half of a float32; cutting instead of rounding is as random.
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


@dataclass(frozen=True)
class Chunk:
    """A run of one tensor's values, the seed that they come from, and where they lie in the file."""

    spec: TensorSpec
    values: int
    seed: list[int]
    offset: int


def chunks(specs: list[TensorSpec], start: int, seed: int) -> Iterator[Chunk]:
    """Every chunk in the order of the file, the first at byte ``start``."""
    for index, spec in enumerate(specs):
        for number, first in enumerate(range(0, spec.values, CHUNK_VALUES)):
            count = min(CHUNK_VALUES, spec.values - first)
            yield Chunk(spec, count, [seed, index, number], start + first * ITEM_BYTES)
        start += spec.nbytes


def write_checkpoint(path: str | os.PathLike[str], specs: list[TensorSpec], seed: int = 0, threads: int = 0) -> Path:
    """Write ``specs`` to ``path``; see [Note: deterministic and parallel].

    The file gets its name when it is whole, so that a reader never finds a part of one.
    """
    path = Path(path)
    header = encode_header(specs)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            file.write(header)
            fill(file, chunks(specs, len(header), seed), threads or min(16, os.cpu_count() or 1))
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)
    return path


def fill(file: BinaryIO, jobs: Iterable[Chunk], threads: int) -> None:
    """Make and write every chunk. Making is the slow part; one writer at a time keeps up with the disk."""
    turn = threading.Lock()

    def write_chunk(job: Chunk) -> None:
        data = random_bytes(job.spec, job.values, job.seed)
        with turn:
            file.seek(job.offset)
            file.write(data)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(write_chunk, jobs):
            pass  # taking each result raises what its thread raised


def write_flux(path: str | os.PathLike[str], size: str = "tiny", seed: int = 0) -> Path:
    """A FLUX.

    ``tiny`` (19 MB, 38 MB once a CPU host has made it float32), ``dev`` (FLUX.1-dev's shapes, 23.8 GB) or ``thin`` (as
    many blocks as ``dev``, a twelfth as wide, 168 MB).
    """
    return write_checkpoint(path, flux_tensors(FLUX_SIZES[size]), seed)


def write_flux_lora(path: str | os.PathLike[str], size: str = "tiny", rank: int = 8, seed: int = 0) -> Path:
    """A LoRA for ``write_flux``'s model of the same size, on every matrix of every block."""
    return write_checkpoint(path, flux_lora_tensors(FLUX_SIZES[size], rank), seed)


def write_qwen_image(path: str | os.PathLike[str], layers: int = 60, seed: int = 0) -> Path:
    """A Qwen-Image: 20.4 B parameters in 60 blocks; only the number of blocks is free."""
    return write_checkpoint(path, qwen_image_tensors(layers), seed)


def write_wan(path: str | os.PathLike[str], size: str = "tiny", seed: int = 0) -> Path:
    """A Wan 2.1 text-to-video: ``tiny`` (16 MB) or ``14b`` (the shapes of Wan 2.1 T2V 14B, 28.6 GB)."""
    return write_checkpoint(path, wan_tensors(WAN_SIZES[size]), seed)


def write_sd35(path: str | os.PathLike[str], size: str = "tiny", seed: int = 0) -> Path:
    """A Stable Diffusion 3.5: ``tiny`` (21 MB) or ``large`` (the shapes of SD3.5-large, 16.3 GB)."""
    return write_checkpoint(path, sd35_tensors(SD35_SIZES[size]), seed)


def write_clip_l(path: str | os.PathLike[str], seed: int = 0) -> Path:
    """A CLIP-L text encoder (246 MB) for the host's Load CLIP, type ``stable_diffusion``."""
    return write_checkpoint(path, clip_l_tensors(), seed)


SIZES = {"flux": FLUX_SIZES, "flux-lora": FLUX_SIZES, "wan": WAN_SIZES, "sd35": SD35_SIZES}


def parse_args() -> argparse.Namespace:
    names = sorted({name for sizes in SIZES.values() for name in sizes})
    parser = argparse.ArgumentParser(description="write a random checkpoint")
    parser.add_argument("kind", choices=["flux", "flux-lora", "clip-l", "qwen-image", "wan", "sd35"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--size", choices=names, default="tiny", help="of a FLUX or its LoRA, a Wan or an SD3.5")
    parser.add_argument("--rank", type=int, default=8, help="of a LoRA")
    parser.add_argument("--layers", type=int, default=60, help="blocks of a Qwen-Image")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sizes = SIZES.get(args.kind, {"tiny": None})
    if args.size not in sizes:
        parser.error(f"--size of {args.kind}: choose from {', '.join(sizes)}")
    return args


def main() -> None:
    args = parse_args()
    specs = {
        "flux": lambda: flux_tensors(FLUX_SIZES[args.size]),
        "flux-lora": lambda: flux_lora_tensors(FLUX_SIZES[args.size], args.rank),
        "clip-l": clip_l_tensors,
        "qwen-image": lambda: qwen_image_tensors(args.layers),
        "wan": lambda: wan_tensors(WAN_SIZES[args.size]),
        "sd35": lambda: sd35_tensors(SD35_SIZES[args.size]),
    }[args.kind]()
    write_checkpoint(args.path, specs, args.seed)


if __name__ == "__main__":
    main()
