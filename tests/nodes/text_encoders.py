"""Tiny text encoders of the families that matter, with random weights, as files of the host's own formats."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.memory_management
import comfy.sd
import sentencepiece
import torch
from safetensors.torch import save_file

SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6, "vocab_size": 200}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
PROMPTS = ("a cat", "a cat that sits on a chair and reads of dogs, in the style of dogs")
T5 = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"


@dataclass(frozen=True)
class Family:
    """What makes the host take a file for an encoder of this kind, and what makes that small.

    Attributes:
        type: what the user chooses in Load CLIP.
        name: of the encoder inside of the model, and of its tokens.
        hints: shapes of tensors by which the host knows it.
        config: what is other than in the real one, but for what the host knows it by.
    """

    type: comfy.sd.CLIPType
    name: str
    hints: dict[str, tuple[int, ...]]
    config: dict[str, int]

    @property
    def options(self) -> dict[str, Any]:
        """What makes the host build the small one."""
        return {f"{self.name}_model_config": self.config}


FAMILIES = {
    "t5": Family(
        comfy.sd.CLIPType.MOCHI,
        "t5xxl",
        {T5: (10240, 1)},
        {"d_model": 16, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 6, "vocab_size": 200},
    ),
    "llama": Family(
        comfy.sd.CLIPType.HIDREAM,
        "llama",
        {"model.layers.0.post_attention_layernorm.weight": (4096,)},
        {
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "vocab_size": 200,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
        },
    ),
    "qwen": Family(
        comfy.sd.CLIPType.OMNIGEN2, "qwen25_3b", {"model.layers.0.self_attn.k_proj.bias": (256,)}, SMALL | HEADS
    ),
    "gemma": Family(
        comfy.sd.CLIPType.LUMINA2,
        "gemma2_2b",
        {"model.layers.0.post_feedforward_layernorm.weight": (2304,)},
        SMALL | HEADS,
    ),
}


def write_encoder(family: Family, path: Path, seed: int = 0) -> None:
    """Write a file of random weights that Load CLIP takes for this family."""
    hints = {name: torch.zeros(shape) for name, shape in family.hints.items()}
    pieces = {"spiece_model": _pieces()} if family.name.startswith("gemma") else {}
    # The host loads what is there and says what is missing: what is built is all that counts. With dynamic VRAM it
    # builds what is missing in the shape of its transpose (`_lazy_load_from_state_dict` in ComfyUI 0.30).
    with contextlib.suppress(RuntimeError), mock.patch.object(comfy.memory_management, "aimdo_enabled", False):
        built: list[torch.nn.Module] = []
        with _seen(built):
            comfy.sd.load_text_encoder_state_dicts(
                [hints | pieces], clip_type=family.type, model_options=family.options
            )
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(weight.shape, generator=generator).mul_(0.05).to(torch.float16)
        for name, weight in getattr(built[0], family.name).transformer.state_dict().items()
    }
    # The host knows a T5 by a tensor of its last block, which the small one lacks: nobody loads the one that is added.
    save_file({name: hint.half() for name, hint in hints.items()} | weights | pieces, path)


@contextlib.contextmanager
def _seen(built: list[torch.nn.Module]) -> Iterator[None]:
    """Every text encoder that the host builds meanwhile."""
    load = comfy.sd.CLIP.load_sd

    def load_sd(clip: comfy.sd.CLIP, *args: Any, **kwargs: Any) -> Any:
        built.append(clip.cond_stage_model)
        return load(clip, *args, **kwargs)

    comfy.sd.CLIP.load_sd = load_sd
    try:
        yield
    finally:
        comfy.sd.CLIP.load_sd = load


def _pieces() -> torch.Tensor:
    """A tokenizer of a few words, as files of this family bring it."""
    model = io.BytesIO()
    words = [f"a{letter}b {letter}c" for letter in "defghijklmnopqrstuvwxyz"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


def load(family: Family, path: Path) -> comfy.sd.CLIP:
    """As Load CLIP does it."""
    return comfy.sd.load_clip([str(path)], clip_type=family.type, model_options=family.options)


def tokens_of(clip: comfy.sd.CLIP, text: str) -> dict[str, list]:
    """Tokens of a prompt, with ids that the small encoder knows."""
    return {
        name: [[(token[0] % 180, *token[1:]) for token in part] for part in parts]
        for name, parts in clip.tokenize(text).items()
    }


def encode(clip: comfy.sd.CLIP, text: str) -> list[torch.Tensor]:
    """What the host's nodes get for a prompt."""
    with torch.inference_mode():
        found = clip.encode_from_tokens(tokens_of(clip, text), return_dict=True, return_pooled=True)
    return [value for value in found.values() if isinstance(value, torch.Tensor)]


def random_patches(clip: comfy.sd.CLIP) -> dict[str, tuple]:
    """Differences for the last matrices, as a LoRA for encoders brings them."""
    state = clip.patcher.model_state_dict()
    names = [name for name, weight in state.items() if weight.ndim == 2][-12:]
    generator = torch.Generator().manual_seed(3)
    return {name: ("diff", (torch.randn(state[name].shape, generator=generator) * 0.02,)) for name in names}
