"""Transformers that make images."""

from __future__ import annotations

from typing import Any

import torch
from family import MASK, POOLED, Family, noise

FLUX: dict[str, Any] = {
    "image_model": "flux",
    "axes_dim": [16, 56, 56],
    "num_heads": 24,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "out_channels": 16,
    "qkv_bias": True,
    "txt_ids_dims": [],
    "in_channels": 16,
    "hidden_size": 3072,
    "context_in_dim": 4096,
    "patch_size": 2,
    "vec_in_dim": 768,
    "depth": 19,
    "depth_single_blocks": 38,
    "guidance_embed": True,
    "yak_mlp": False,
    "txt_norm": False,
}
FLUX2 = FLUX | {
    "image_model": "flux2",
    "axes_dim": [32, 32, 32, 32],
    "num_heads": 48,
    "hidden_size": 6144,
    "mlp_ratio": 3.0,
    "theta": 2000,
    "out_channels": 128,
    "in_channels": 128,
    "global_modulation": True,
    "mlp_silu_act": True,
    "qkv_bias": False,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    "txt_ids_dims": [3],
    "patch_size": 1,
    "context_in_dim": 15360,
    "vec_in_dim": None,
    "depth": 8,
    "depth_single_blocks": 48,
}
LONGCAT = FLUX | {
    "guidance_embed": False,
    "vec_in_dim": None,
    "context_in_dim": 3584,
    "txt_ids_dims": [1, 2],
    "depth": 10,
    "depth_single_blocks": 20,
}
CHROMA = {key: value for key, value in FLUX.items() if key not in ("guidance_embed", "yak_mlp", "txt_norm")} | {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 3072,
    "hidden_dim": 5120,
    "n_layers": 5,
    "vec_in_dim": None,
}
RADIANCE = CHROMA | {
    "image_model": "chroma_radiance",
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 16,
    "nerf_hidden_size": 64,
    "nerf_mlp_ratio": 4,
    "nerf_depth": 4,
    "nerf_max_freqs": 8,
    "nerf_tile_size": 512,
    "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32,
    "use_x0": False,
    "use_sequential_txt_ids": False,
}
TINY_FLUX: dict[str, Any] = {
    "hidden_size": 64,
    "num_heads": 2,
    "axes_dim": [8, 12, 12],
    "context_in_dim": 64,
    "vec_in_dim": 64,
    "depth": 2,
    "depth_single_blocks": 4,
}
TINY_CHROMA = TINY_FLUX | {"vec_in_dim": None, "out_dim": 64, "hidden_dim": 64, "n_layers": 2}
LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 2304,
    "cap_feat_dim": 2304,
    "n_layers": 26,
    "qk_norm": True,
    "n_heads": 24,
    "n_kv_heads": 8,
    "axes_dims": [32, 32, 32],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 4.0,
}
ZIMAGE = LUMINA | {
    "dim": 3840,
    "cap_feat_dim": 2560,
    "n_layers": 30,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
ZIMAGE_PIXELS = ZIMAGE | {
    "image_model": "zimage_pixel",
    "patch_size": 32,
    "in_channels": 3,
    "decoder_in_channels": 3072,
    "decoder_hidden_size": 3840,
    "decoder_num_res_blocks": 4,
    "decoder_max_freqs": 8,
}
TINY_LUMINA = {
    "dim": 64,
    "cap_feat_dim": 64,
    "n_layers": 4,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [8, 12, 12],
    "multiple_of": 16,
}
TINY_ZIMAGE = TINY_LUMINA | {"dim": 256, "n_heads": 8, "n_kv_heads": 8}
TINY_DECODER = {"decoder_hidden_size": 64, "decoder_num_res_blocks": 2, "decoder_in_channels": 192, "patch_size": 8}
PIXART = {"num_heads": 16, "patch_size": 2, "hidden_size": 1152, "in_channels": 4, "depth": 28, "input_size": 128}
TINY_PIXART = {"hidden_size": 96, "num_heads": 2, "depth": 4, "caption_channels": 64}
HYDIT = {"depth": 40, "hidden_size": 1408, "mlp_ratio": 4.3637}
TINY_HYDIT = {"depth": 4, "hidden_size": 64, "num_heads": 2, "text_states_dim": 64, "text_states_dim_t5": 64}
HYDIT_TEXT = {"conditioning_mt5xl": (1, 256, 64)}
HYDIT_MASKS = {"attention_mask": torch.ones(1, 77), "attention_mask_mt5xl": torch.ones(1, 256)}
PREDICT2 = {
    "image_model": "cosmos_predict2",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 5120,
    "concat_padding_mask": True,
    "crossattn_emb_channels": 1024,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop",
    "min_fps": 1,
    "max_fps": 30,
    "use_adaln_lora": True,
    "adaln_lora_dim": 256,
    "num_blocks": 36,
    "num_heads": 40,
    "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}
TINY_PREDICT2 = {"model_channels": 64, "num_heads": 2, "num_blocks": 4, "adaln_lora_dim": 16}
SD3 = {
    "in_channels": 16,
    "patch_size": 2,
    "out_channels": 16,
    "depth": 38,
    "input_size": None,
    "adm_in_channels": 2048,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 2432}},
    "num_patches": 36864,
    "pos_embed_max_size": 192,
    "qk_norm": "rms",
    "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": [],
}
TINY_SD3 = {
    "depth": 3,
    "adm_in_channels": 64,
    "num_patches": 256,
    "pos_embed_max_size": 16,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 192}},
}
HIDREAM = {
    "image_model": "hidream",
    "attention_head_dim": 128,
    "axes_dims_rope": [64, 32, 32],
    "caption_channels": [4096, 4096],
    "max_resolution": [128, 128],
    "in_channels": 16,
    "llama_layers": [*range(32), *[31] * 16],
    "num_attention_heads": 20,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "num_layers": 16,
    "num_single_layers": 32,
    "out_channels": 16,
    "patch_size": 2,
    "text_emb_dim": 2048,
}
TINY_HIDREAM = {
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "axes_dims_rope": [16, 8, 8],
    "caption_channels": [64, 64],
    "llama_layers": [0, 1, 1, 1],
    "num_layers": 2,
    "num_single_layers": 2,
    "text_emb_dim": 64,
}
OMNIGEN2 = {
    "image_model": "omnigen2",
    "axes_dim_rope": [40, 40, 40],
    "axes_lens": [1024, 1664, 1664],
    "hidden_size": 2520,
    "num_attention_heads": 21,
    "num_kv_heads": 7,
    "num_layers": 32,
    "num_refiner_layers": 2,
    "text_feat_dim": 2048,
    "timestep_scale": 1000.0,
}
TINY_OMNIGEN = {"hidden_size": 64, "num_attention_heads": 2, "num_kv_heads": 1, "num_layers": 3, "multiple_of": 16}
TINY_PIXELDIT = {
    "hidden_size": 64,
    "num_groups": 2,
    "pixel_attn_hidden_size": 64,
    "pixel_num_groups": 2,
    "patch_depth": 4,
    "txt_embed_dim": 64,
}
KANDINSKY_IMAGE = {
    "image_model": "kandinsky5",
    "model_dim": 2560,
    "axes_dims": (32, 48, 48),
    "rope_scale_factor": (1.0, 1.0, 1.0),
    "time_dim": 512,
    "ff_dim": 10240,
    "visual_embed_dim": 64,
    "num_text_blocks": 2,
    "num_visual_blocks": 50,
}
TINY_KANDINSKY = {
    "model_dim": 64,
    "axes_dims": (8, 12, 12),
    "time_dim": 32,
    "ff_dim": 128,
    "num_visual_blocks": 4,
    "num_text_blocks": 2,
    "in_text_dim": 64,
    "in_text_dim2": 64,
}
TINY_KREA = {
    "features": 128,
    "heads": 4,
    "kvheads": 2,
    "layers": 4,
    "txtdim": 64,
    "txtheads": 2,
    "txtkvheads": 2,
    "txtlayers": 2,
    "tdim": 32,
}
TINY_ERNIE = {"hidden_size": 64, "num_attention_heads": 2, "num_layers": 4, "ffn_hidden_size": 128, "text_in_dim": 64}
TINY_IDEOGRAM = {"intermediate_size": 128, "adaln_dim": 32, "llm_features_dim": 64, "mrope_section": [6, 5, 5]}
TINY_LAYERS = {"num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 2}
TINY_QWEN = TINY_LAYERS | {"axes_dims_rope": (8, 12, 12), "joint_attention_dim": 64}
TOKENS = {"t5xxl_ids": torch.arange(8), "t5xxl_weights": torch.ones(8)}
PIXELS = ((1, 3, 64, 64),)
LARGER = ((1, 4, 64, 64),)
TINY_QWEN3VL = {
    "text_config_overrides": {
        "vocab_size": 151700,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rope_dims": [6, 5, 5],
    },
    "vision_config_overrides": {"hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "depth": 2},
}

IMAGES = {
    "SD3": Family(SD3, TINY_SD3, extras=POOLED),
    "AuraFlow": Family(
        {"max_seq": 4096, "cond_seq_dim": 2048, "n_double_layers": 4, "n_layers": 36},
        {"dim": 128, "n_heads": 2, "n_double_layers": 2, "n_layers": 5, "cond_seq_dim": 64, "global_conddim": 128},
    ),
    "PixArtAlpha": Family(
        PIXART | {"image_model": "pixart_alpha", "pe_interpolation": 2, "micro_condition": True},
        TINY_PIXART,
        values={"width": 512, "height": 512},
        latent=LARGER,
    ),
    "PixArtSigma": Family(
        PIXART
        | {"image_model": "pixart_sigma", "pe_interpolation": 2, "micro_condition": False, "model_max_length": 300},
        TINY_PIXART,
        latent=LARGER,
    ),
    "HunyuanDiT": Family(HYDIT | {"image_model": "hydit"}, TINY_HYDIT, (1, 77, 64), HYDIT_TEXT, HYDIT_MASKS),
    "HunyuanDiT1": Family(
        HYDIT | {"image_model": "hydit1", "size_cond": True, "use_style_cond": True},
        TINY_HYDIT,
        (1, 77, 64),
        HYDIT_TEXT,
        HYDIT_MASKS,
    ),
    "Flux": Family(FLUX, TINY_FLUX, extras=POOLED),
    "FluxInpaint": Family(FLUX | {"in_channels": 96}, TINY_FLUX, extras=POOLED),
    "FluxSchnell": Family(FLUX | {"guidance_embed": False}, TINY_FLUX, extras=POOLED),
    "LongCatImage": Family(LONGCAT, TINY_FLUX | {"vec_in_dim": None}),
    "Flux2": Family(FLUX2, TINY_FLUX | {"axes_dim": [8, 8, 8, 8], "vec_in_dim": None}),
    "Chroma": Family(CHROMA, TINY_CHROMA),
    "ChromaRadiance": Family(RADIANCE, TINY_CHROMA | {"nerf_hidden_size": 16, "nerf_depth": 2}, latent=PIXELS),
    "Lens": Family(
        {"image_model": "lens", "in_channels": 128, "num_layers": 48, "enc_hidden_dim": 2880},
        TINY_LAYERS | {"enc_hidden_dim": 64, "axes_dims_rope": (8, 12, 12)},
        context=(1, 8, 4 * 64),
    ),
    "CosmosT2IPredict2": Family(PREDICT2, TINY_PREDICT2 | {"crossattn_emb_channels": 64}),
    "CosmosI2VPredict2": Family(PREDICT2 | {"in_channels": 17}, TINY_PREDICT2 | {"crossattn_emb_channels": 64}),
    "Anima": Family(
        PREDICT2 | {"image_model": "anima", "model_channels": 2048, "num_blocks": 28, "num_heads": 16},
        TINY_PREDICT2 | {"crossattn_emb_channels": 64},
        values=TOKENS,
        narrow_parts=("comfy.ldm.anima.model.LLMAdapter",),
        narrow_named={"source_dim": 64, "target_dim": 64, "model_dim": 64, "num_layers": 2, "num_heads": 2},
    ),
    "Lumina2": Family(LUMINA, TINY_LUMINA),
    "ZImage": Family(ZIMAGE, TINY_ZIMAGE),
    "ZImagePixelSpace": Family(ZIMAGE_PIXELS, TINY_ZIMAGE | TINY_DECODER, latent=PIXELS),
    "PixelDiTT2I": Family({"image_model": "pixeldit_t2i"}, TINY_PIXELDIT, latent=PIXELS),
    "PiD": Family(
        {"image_model": "pid", "lq_hidden_dim": 512, "lq_latent_channels": 16, "latent_spatial_down_factor": 8},
        TINY_PIXELDIT | {"lq_hidden_dim": 32},
        extras={"lq_latent": (1, 16, 2, 2)},
        values={"degrade_sigma": torch.tensor([0.1])},
        latent=PIXELS,
    ),
    "HiDream": Family(HIDREAM, TINY_HIDREAM, extras=POOLED | {"conditioning_llama3": (1, 2, 8, 64)}),
    "HiDreamO1": Family(
        {"image_model": "hidream_o1"},
        TINY_QWEN3VL,
        context=None,
        values={"text_input_ids": torch.arange(8)[None], "reference_latents": [noise(1, 64, 64, 3)]},
        latent=PIXELS,
    ),
    "Omnigen2": Family(OMNIGEN2, TINY_OMNIGEN | {"text_feat_dim": 64, "axes_dim_rope": [8, 12, 12]}, values=MASK),
    "Boogu": Family(
        {"image_model": "boogu"},
        TINY_OMNIGEN | {"instruction_feat_dim": 64, "num_double_stream_layers": 2, "axes_dim_rope": [8, 12, 12]},
        values=MASK,
    ),
    "MageFlow": Family({"image_model": "mage_flow"}, TINY_QWEN),
    "QwenImage": Family({"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}, TINY_QWEN),
    "JoyImage": Family(
        {"image_model": "joyimage", "hidden_size": 4096, "num_attention_heads": 32, "num_layers": 40},
        {"hidden_size": 64, "num_attention_heads": 2, "num_layers": 3, "text_dim": 64, "rope_dim_list": [8, 12, 12]},
    ),
    "Ideogram4": Family(
        {"image_model": "ideogram4", "in_channels": 128, "num_layers": 34}, TINY_LAYERS | TINY_IDEOGRAM
    ),
    "Krea2": Family({"image_model": "krea2"}, TINY_KREA, context=(1, 8, 2 * 64), latent=((1, 16, 1, 16, 16),)),
    "ErnieImage": Family({"image_model": "ernie"}, TINY_ERNIE | {"rope_axes_dim": (8, 12, 12)}),
    "Kandinsky5Image": Family(KANDINSKY_IMAGE, TINY_KANDINSKY, extras=POOLED),
}
