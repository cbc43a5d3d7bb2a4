"""LoRA files of every type that the host knows, for the tiny FLUX."""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensors = dict[str, torch.Tensor]
Noise = Callable[..., torch.Tensor]
WIDTH = 256
RANK = 4
BLOCK = 16  # of OFT and BOFT

# Layers of a double block, of a single one, and outside of blocks, with inputs and outputs.
LAYERS = {
    "double_blocks.0.img_attn.qkv": (WIDTH, 3 * WIDTH),
    "double_blocks.1.txt_mlp.2": (4 * WIDTH, WIDTH),
    "double_blocks.1.img_attn.proj": (WIDTH, WIDTH),
    "single_blocks.0.linear1": (WIDTH, 7 * WIDTH),
    "single_blocks.3.linear2": (5 * WIDTH, WIDTH),
    "img_in": (64, WIDTH),
}


def lora(noise: Noise, inputs: int, outputs: int) -> Tensors:
    return {
        "lora_down.weight": noise(RANK, inputs),
        "lora_up.weight": noise(outputs, RANK),
        "alpha": torch.tensor(float(RANK)),
    }


def dora(noise: Noise, inputs: int, outputs: int) -> Tensors:
    return {**lora(noise, inputs, outputs), "dora_scale": noise(1, inputs).abs() + 0.9}


def loha(noise: Noise, inputs: int, outputs: int) -> Tensors:
    return {
        "hada_w1_a": noise(outputs, RANK),
        "hada_w1_b": noise(RANK, inputs),
        "hada_w2_a": noise(outputs, RANK),
        "hada_w2_b": noise(RANK, inputs),
        "alpha": torch.tensor(float(RANK)),
    }


def lokr(noise: Noise, inputs: int, outputs: int) -> Tensors:
    return {
        "lokr_w1": noise(8, 8),
        "lokr_w2_a": noise(outputs // 8, RANK),
        "lokr_w2_b": noise(RANK, inputs // 8),
        "alpha": torch.tensor(float(RANK)),
    }


def glora(noise: Noise, inputs: int, outputs: int) -> Tensors:
    return {
        "a1.weight": noise(inputs, RANK),
        "a2.weight": noise(RANK, inputs),
        "b1.weight": noise(outputs, RANK),
        "b2.weight": noise(RANK, inputs),
        "alpha": torch.tensor(float(RANK)),
    }


def oft(noise: Noise, inputs: int, outputs: int) -> Tensors:
    return {"oft_blocks": noise(outputs // BLOCK, BLOCK, BLOCK), "alpha": torch.tensor(2.0)}


def boft(noise: Noise, inputs: int, outputs: int) -> Tensors:
    return {"oft_blocks": noise(3, outputs // BLOCK, BLOCK, BLOCK), "alpha": torch.tensor(2.0)}


def diff(noise: Noise, inputs: int, outputs: int) -> Tensors:
    return {"diff": noise(outputs, inputs), "diff_b": noise(outputs)}


def replaced(noise: Noise, inputs: int, outputs: int) -> Tensors:
    return {"set_weight": noise(outputs, inputs)}


Adapter = Callable[[Noise, int, int], Tensors]
ADAPTERS: dict[str, Adapter] = {
    "LoRA": lora,
    "DoRA": dora,
    "LoHa": loha,
    "LoKr": lokr,
    "GLoRA": glora,
    "OFT": oft,
    "BOFT": boft,
    "diff": diff,
    "set": replaced,
}


def lora_file(kind: str, seed: int = 0) -> Tensors:
    """The tensors of a LoRA file of one type, as trainers name them."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    return {
        f"lora_unet_{layer.replace('.', '_')}.{name}": tensor
        for layer, (inputs, outputs) in LAYERS.items()
        for name, tensor in ADAPTERS[kind](noise, inputs, outputs).items()
    }
