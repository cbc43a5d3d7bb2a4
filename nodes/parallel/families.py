"""The kinds of blocks of the host whose tokens may be divided among GPUs, by the full names of their classes.

A kind is described by the names of its forward's arguments, and nothing of the forward itself is repeated here. Blocks
of other classes, and those that are asked to do what is not described, compute all tokens on each GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ...streaming.parallel.kinds import Kind

_WAN = Kind(("x",), ("x",), along={"freqs": 1}, along_one={"e": ("x", 1)}, least_dims=4, attends=("self_attn",))
_TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
_IMAGE_FIRST = ("hidden_states", "encoder_hidden_states")

KINDS: dict[str, Kind] = {
    # FLUX 1 and 2, Kontext, Fill, Chroma, HunyuanVideo, HunyuanImage, Hunyuan3D 2
    "comfy.ldm.flux.layers.DoubleStreamBlock": Kind(
        ("txt", "img"),
        ("img", "txt"),
        along={"pe": 2},
        spans={"modulation_dims_img": "img", "modulation_dims_txt": "txt"},
    ),
    "comfy.ldm.flux.layers.SingleStreamBlock": Kind(("x",), ("x",), along={"pe": 2}, spans={"modulation_dims": "x"}),
    # Qwen-Image, Edit
    "comfy.ldm.qwen_image.model.QwenImageTransformerBlock": Kind(
        _TEXT_FIRST,
        _TEXT_FIRST,
        along={"image_rotary_emb": 2},
        places={"timestep_zero_index": "hidden_states"},
        absent=("encoder_hidden_states_mask",),
    ),
    # Wan 2.1 and 2.2
    "comfy.ldm.wan.model.WanAttentionBlock": _WAN,
    # Z-Image, Lumina 2
    "comfy.ldm.lumina.model.JointTransformerBlock": Kind(
        ("x",), ("x",), along={"freqs_cis": 1}, absent=("timestep_zero_index",)
    ),
    # LTX-Video
    "comfy.ldm.lightricks.model.BasicTransformerBlock": Kind(
        ("x",),
        ("x",),
        along={"pe": 1},
        along_one={"timestep": ("x", 1)},
        absent=("self_attention_mask",),
        attends=("attn1",),
    ),
    # MiniMax H3
    "comfy.ldm.minimax.model.DiTBlock": Kind(
        ("x",), ("x",), tokens=0, along={"rope_freqs": 1}, spans={"mod_segments": "x"}
    ),
    "comfy.ldm.aura.mmdit.MMDiTBlock": Kind(("c", "x"), ("c", "x")),
    "comfy.ldm.aura.mmdit.DiTBlock": Kind(("cx",), ("cx",)),
    "comfy.ldm.ideogram4.model.Ideogram4TransformerBlock": Kind(("x",), ("x",), along={"freqs_cis": 1}),
    "comfy.ldm.krea2.model.SingleStreamBlock": Kind(
        ("x",), ("x",), along={"freqs": 2}, places={"timestep_zero_index": "x"}
    ),
    "comfy.ldm.cogvideo.model.CogVideoXBlock": Kind(
        _TEXT_FIRST, _IMAGE_FIRST, along_one={"image_rotary_emb": ("hidden_states", 0)}
    ),
    "comfy.ldm.omnigen.omnigen2.OmniGen2TransformerBlock": Kind(
        ("hidden_states",), ("hidden_states",), along={"image_rotary_emb": 1}
    ),
    "comfy.ldm.kandinsky5.model.TransformerDecoderBlock": Kind(
        ("visual_embed",), ("visual_embed",), along={"freqs": 1}, attends=("self_attention",)
    ),
    "comfy.ldm.joyimage.model.JoyImageTransformerBlock": Kind(
        _IMAGE_FIRST, _IMAGE_FIRST, along_one={"image_rotary_emb": ("hidden_states", 1)}
    ),
}


def kind_of(block: nn.Module) -> Kind | None:
    """What is known of a block; None if it is of no kind above."""
    return KINDS.get(f"{type(block).__module__}.{type(block).__qualname__}")


def lists_of_blocks(root: nn.Module) -> Iterator[tuple[list[nn.Module], Kind]]:
    """Yield each list of blocks of a known kind in a model, and the kind. In blocks nothing is looked for."""
    for module in root.children():
        kinds = {id(kind): kind for kind in map(kind_of, module)} if isinstance(module, nn.ModuleList) else {}
        (kind,) = kinds.values() if len(kinds) == 1 else (None,)
        if kind is not None:
            yield list(module), kind
        else:
            yield from lists_of_blocks(module)
