"""Transformers that make videos, sound and shapes."""

from __future__ import annotations

from typing import Any

import torch
from family import MASK, POOLED, Family, noise, vision
from image_families import KANDINSKY_IMAGE, TINY_KANDINSKY

HUNYUAN: dict[str, Any] = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "patch_size": [1, 2, 2],
    "out_channels": 16,
    "vec_in_dim": 768,
    "axes_dim": [16, 56, 56],
    "meanflow": False,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 20,
    "depth_single_blocks": 40,
    "theta": 256,
    "qkv_bias": True,
    "byt5": False,
    "guidance_embed": True,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
HUNYUAN15 = HUNYUAN | {
    "in_channels": 65,
    "patch_size": [1, 1, 1],
    "out_channels": 32,
    "vec_in_dim": None,
    "context_in_dim": 3584,
    "hidden_size": 2048,
    "num_heads": 16,
    "depth": 54,
    "depth_single_blocks": 0,
    "byt5": True,
    "guidance_embed": False,
    "use_cond_type_embedding": True,
    "vision_in_dim": 1152,
    "meanflow_sum": True,
}
HUNYUAN_IMAGE = HUNYUAN | {
    "in_channels": 64,
    "out_channels": 64,
    "patch_size": [1, 1],
    "axes_dim": [64, 64],
    "vec_in_dim": None,
    "hidden_size": 3584,
    "num_heads": 28,
    "context_in_dim": 3584,
    "byt5": True,
    "guidance_embed": False,
}
REFINER = HUNYUAN_IMAGE | {
    "in_channels": 128,
    "patch_size": [1, 1, 1],
    "axes_dim": [16, 56, 56],
    "hidden_size": 3328,
    "num_heads": 26,
    "byt5": False,
}
TINY_HUNYUAN: dict[str, Any] = {
    "hidden_size": 64,
    "num_heads": 2,
    "axes_dim": [8, 12, 12],
    "context_in_dim": 64,
    "depth": 2,
    "depth_single_blocks": 3,
}
TINY_HUNYUAN1 = TINY_HUNYUAN | {"vec_in_dim": 64}
TINY_HUNYUAN15 = TINY_HUNYUAN | {"depth_single_blocks": 0, "depth": 4}
GLYPHS = {"conditioning_byt5small": (1, 4, 1472)}
WAN: dict[str, Any] = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 5120,
    "out_dim": 16,
    "num_heads": 40,
    "ffn_dim": 13824,
    "num_layers": 40,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "in_dim": 16,
}
WAN_SMALL = WAN | {"dim": 1536, "num_heads": 12, "ffn_dim": 8960, "num_layers": 30}
WAN_5B = WAN | {"in_dim": 48, "out_dim": 48, "dim": 3072, "num_heads": 24, "ffn_dim": 14336, "num_layers": 30}
FRAMES, HALF = (1, 16, 2, 16, 16), (1, 16, 2, 8, 8)
CAMERA = {"camera_conditions": (1, 24, 2, 128, 128)}
TINY_WAN: dict[str, Any] = {"dim": 64, "num_heads": 2, "ffn_dim": 128, "num_layers": 4, "text_dim": 64}
COSMOS = {
    "image_model": "cosmos",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 5120,
    "block_config": "FA-CA-MLP",
    "concat_padding_mask": True,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": False,
    "pos_emb_interpolation": "crop",
    "block_x_format": "THWBD",
    "affline_emb_norm": True,
    "use_adaln_lora": True,
    "adaln_lora_dim": 256,
    "num_blocks": 36,
    "num_heads": 40,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}
TINY_COSMOS = {
    "model_channels": 64,
    "num_heads": 2,
    "num_blocks": 4,
    "crossattn_emb_channels": 64,
    "adaln_lora_dim": 16,
    "max_img_h": 32,
    "max_img_w": 32,
    "max_frames": 8,
}
COGVIDEO = {
    "image_model": "cogvideox",
    "num_attention_heads": 48,
    "num_layers": 42,
    "in_channels": 16,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": False,
}
TINY_COGVIDEO = {"num_attention_heads": 1, "num_layers": 4, "text_embed_dim": 64, "time_embed_dim": 32}
MOCHI = {
    "image_model": "mochi_preview",
    "depth": 48,
    "patch_size": 2,
    "num_heads": 24,
    "hidden_size_x": 3072,
    "hidden_size_y": 1536,
    "mlp_ratio_x": 4.0,
    "mlp_ratio_y": 4.0,
    "learn_sigma": False,
    "in_channels": 12,
    "qk_norm": True,
    "qkv_bias": False,
    "out_bias": True,
    "attn_drop": 0.0,
    "patch_embed_bias": True,
    "posenc_preserve_area": True,
    "timestep_mlp_bias": True,
    "attend_to_padding": False,
    "timestep_scale": 1000.0,
    "use_t5": True,
    "t5_feat_dim": 4096,
    "t5_token_length": 256,
    "rope_theta": 10000.0,
}
TINY_MOCHI = {
    "depth": 3,
    "num_heads": 2,
    "hidden_size_x": 64,
    "mlp_ratio_x": 12288 / 64,
    "hidden_size_y": 32,
    "t5_feat_dim": 64,
    "t5_token_length": 8,
}
LTX = {"image_model": "ltxv", "num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096}
TINY_LTX = {
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "cross_attention_dim": 64,
    "caption_channels": 64,
}
TINY_LTXAV = TINY_LTX | {
    "audio_cross_attention_dim": 32,
    "audio_attention_head_dim": 8,
    "audio_num_attention_heads": 4,
    "connector_attention_head_dim": 16,
    "connector_num_attention_heads": 4,
}
TINY_MINIMAX = {
    "hidden_size": 64,
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "ffn_hidden_size": 128,
    "text_dim": 64,
    "time_embed_hidden_size": 64,
    "time_embed_dim": 32,
    "rope_inv_freq_len": 4,
}
KANDINSKY_VIDEO = {key: value for key, value in KANDINSKY_IMAGE.items() if key != "rope_scale_factor"} | {
    "model_dim": 4096,
    "time_dim": 1024,
    "ff_dim": 16384,
    "visual_embed_dim": 132,
    "num_text_blocks": 4,
    "num_visual_blocks": 60,
}
SEEDVR2 = {
    "image_model": "seedvr2",
    "vid_dim": 2560,
    "heads": 20,
    "num_layers": 32,
    "norm_eps": 1e-5,
    "mlp_type": "swiglu",
    "vid_out_norm": True,
}
TINY_SEEDVR2 = {"vid_dim": 64, "heads": 2, "num_layers": 4, "mm_layers": 2}
STEREO: dict[str, Any] = {"audio_model": "dit1.0", "embed_dim": 1536, "project_cond_tokens": False, "depth": 24}
STEREO1 = STEREO | {"global_cond_dim": 1536, "timestep_features_type": "learned"}
STEREO3 = STEREO | {
    "global_cond_dim": 768,
    "io_channels": 256,
    "input_concat_dim": 0,
    "timestep_features_type": "expo",
    "local_add_cond_dim": 257,
    "global_cond_shared_embed": True,
    "global_cond_type": "adaLN",
    "norm_type": "rms_norm",
    "attn_kwargs": {"qk_norm": "rms", "differential": False},
}
SECONDS_START = "conditioner.conditioners.seconds_start"
SECONDS_TOTAL = "conditioner.conditioners.seconds_total"
TINY_STEREO = {"embed_dim": 64, "num_heads": 1, "depth": 4, "project_cond_tokens": True}
ACE = {
    "audio_model": "ace",
    "attention_head_dim": 128,
    "in_channels": 8,
    "inner_dim": 2560,
    "max_height": 16,
    "max_position": 32768,
    "max_width": 32768,
    "mlp_ratio": 2.5,
    "num_attention_heads": 20,
    "num_layers": 24,
    "out_channels": 8,
    "patch_size": [16, 1],
    "rope_theta": 1000000.0,
    "speaker_embedding_dim": 512,
    "text_embedding_dim": 768,
    "ssl_encoder_depths": [8, 8],
    "ssl_latent_dims": [1024, 768],
    "ssl_names": ["mert", "m-hubert"],
    "lyric_encoder_vocab_size": 6693,
    "lyric_hidden_size": 1024,
}
TINY_ACE = {
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "inner_dim": 64,
    "num_layers": 4,
    "text_embedding_dim": 64,
    "lyric_encoder_vocab_size": 64,
    "max_position": 256,
    "max_width": 256,
}
TINY_ACE15 = {
    "hidden_size": 64,
    "text_hidden_dim": 64,
    "num_dit_layers": 4,
    "num_lyric_layers": 2,
    "num_timbre_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 32,
    "intermediate_size": 128,
    "fsq_dim": 64,
    "encoder_hidden_size": 64,
    "encoder_intermediate_size": 128,
    "encoder_num_heads": 2,
}
SHAPES = {"image_model": "hunyuan3d2", "in_channels": 64, "context_in_dim": 1536, "hidden_size": 1024, "num_heads": 16}
TINY_SHAPES = {"hidden_size": 64, "num_heads": 2, "context_in_dim": 64, "depth": 2, "depth_single_blocks": 3}
TINY_SHAPES21 = {
    "hidden_size": 64,
    "num_heads": 2,
    "depth": 5,
    "context_dim": 64,
    "num_moe_layers": 2,
    "num_experts": 4,
}
TINY_SPLAT = {
    "model_channels": 64,
    "num_head_channels": 32,
    "cond_channels": 64,
    "num_blocks": 4,
    "q_token_length": 64,
}

VIDEOS = {
    "GenmoMochi": Family(MOCHI, TINY_MOCHI, values=MASK),
    "LTXV": Family(LTX, TINY_LTX, values=MASK),
    "LTXAV": Family(
        LTX | {"image_model": "ltxav"},
        TINY_LTXAV,
        values={"attention_mask": torch.ones(1, 1024, dtype=torch.long)},
        latent=((1, 128, 2, 4, 4), (1, 8, 4, 16)),
    ),
    "MiniMaxH3": Family({"image_model": "minimax_h3"}, TINY_MINIMAX, latent=((1, 24, 2, 4, 4), (1, 32, 2, 8))),
    "HunyuanVideo": Family(HUNYUAN, TINY_HUNYUAN1, extras=POOLED),
    "HunyuanVideoI2V": Family(HUNYUAN | {"in_channels": 33}, TINY_HUNYUAN1, extras=POOLED),
    "HunyuanVideoSkyreelsI2V": Family(HUNYUAN | {"in_channels": 32}, TINY_HUNYUAN1, extras=POOLED),
    "HunyuanVideo15": Family(HUNYUAN15, TINY_HUNYUAN15, extras=GLYPHS | POOLED, values=vision(1152)),
    "HunyuanVideo15_SR_Distilled": Family(
        HUNYUAN15 | {"in_channels": 98}, TINY_HUNYUAN15, extras=GLYPHS | POOLED, values=vision(1152)
    ),
    "HunyuanImage21": Family(HUNYUAN_IMAGE, TINY_HUNYUAN | {"axes_dim": [16, 16]}, extras=GLYPHS),
    "HunyuanImage21Refiner": Family(REFINER, TINY_HUNYUAN),
    "CosmosT2V": Family(COSMOS, TINY_COSMOS),
    "CosmosI2V": Family(COSMOS | {"in_channels": 17}, TINY_COSMOS),
    "WAN21_T2V": Family(WAN, TINY_WAN),
    "WAN21_CausalAR_T2V": Family(WAN_SMALL | {"causal_ar": True}, TINY_WAN),
    "WAN22_T2V": Family(WAN_5B, TINY_WAN),
    "WAN21_I2V": Family(WAN | {"model_type": "i2v", "in_dim": 36}, TINY_WAN, values=vision(1280)),
    "WAN21_FunControl2V": Family(WAN | {"model_type": "i2v", "in_dim": 48}, TINY_WAN, values=vision(1280)),
    "WAN21_Camera": Family(WAN | {"model_type": "camera", "in_dim": 32}, TINY_WAN, extras=CAMERA, values=vision(1280)),
    "WAN22_Camera": Family(WAN | {"model_type": "camera_2.2", "in_dim": 36}, TINY_WAN, extras=CAMERA),
    "WAN21_Vace": Family(
        WAN | {"model_type": "vace", "vace_in_dim": 96, "vace_layers": 8}, TINY_WAN | {"vace_layers": 2}
    ),
    "WAN22_S2V": Family(
        WAN | {"model_type": "s2v"},
        TINY_WAN | {"audio_inject_layers": [0, 2]},
        extras={"audio_embed": (1, 25, 1024, 8), "control_video": FRAMES, "reference_motion": (1, 16, 19, 16, 16)},
        values={"reference_latents": [noise(1, 16, 1, 16, 16)]},
    ),
    "WAN21_HuMo": Family(
        WAN | {"model_type": "humo", "in_dim": 36}, TINY_WAN, extras={"audio_embed": (1, 2, 8, 5, 1280)}
    ),
    "WAN22_Animate": Family(
        WAN | {"model_type": "animate", "in_dim": 36},
        TINY_WAN | {"num_layers": 5},
        extras={"face_video_pixels": (1, 3, 1, 512, 512), "pose_video_latent": (1, 16, 1, 16, 16)},
        values=vision(1280),
        narrow={32: 4, 64: 4, 128: 4, 256: 8, 512: 16},  # Faces are as large as they must be.
        narrow_parts=tuple(
            f"comfy.ldm.wan.model_animate.{part}" for part in ("ConvLayer", "ResBlock", "EqualConv2d", "EqualLinear")
        ),
    ),
    "WAN21_FlowRVS": Family(WAN | {"model_type": "flow_rvs"}, TINY_WAN),
    "WAN21_SCAIL": Family(
        WAN | {"model_type": "scail", "in_dim": 20},
        TINY_WAN,
        extras={"pose_video_latent": HALF},
        values=vision(1280) | {"reference_latents": [noise(1, 16, 1, 16, 16)]},
    ),
    "WAN21_SCAIL2": Family(
        WAN | {"model_type": "scail2", "in_dim": 20},
        TINY_WAN,
        extras={"pose_video_latent": HALF, "driving_mask_28ch": (1, 2, 28, 8, 8)},
        values=vision(1280) | {"reference_latents": [noise(1, 16, 1, 16, 16)]},
    ),
    "WAN22_WanDancer": Family(
        WAN | {"model_type": "wandancer", "in_dim": 36},
        TINY_WAN | {"audio_inject_layers": [0, 2]},
        extras={"audio_embed": (1, 8, 35)},
        values=vision(1280),
    ),
    "Kandinsky5": Family(KANDINSKY_VIDEO, TINY_KANDINSKY, extras=POOLED),
    "SeedVR2": Family(SEEDVR2, TINY_SEEDVR2, (1, 8, 5120), extras={"condition": (1, 17, 2, 16, 16)}),
    "CogVideoX_T2V": Family(COGVIDEO, TINY_COGVIDEO),
    "CogVideoX_I2V": Family(COGVIDEO | {"in_channels": 32}, TINY_COGVIDEO),
    "CogVideoX_Inpaint": Family(COGVIDEO | {"in_channels": 48}, TINY_COGVIDEO),
    "StableAudio": Family(STEREO1, TINY_STEREO, context=(1, 8, 768), conditioners=(SECONDS_START, SECONDS_TOTAL)),
    "StableAudio3": Family(STEREO3, TINY_STEREO, context=(1, 8, 768), conditioners=(SECONDS_TOTAL,)),
    "ACEStep": Family(ACE, TINY_ACE, values={"conditioning_lyrics": torch.arange(8)[None]}),
    "ACEStep15": Family({"audio_model": "ace1.5"}, TINY_ACE15, extras={"conditioning_lyrics": (1, 4, 64)}),
    "Hunyuan3Dv2": Family(SHAPES | {"depth": 16, "depth_single_blocks": 32}, TINY_SHAPES),
    "Hunyuan3Dv2mini": Family(SHAPES | {"depth": 8, "depth_single_blocks": 16}, TINY_SHAPES),
    "Hunyuan3Dv2_1": Family({"image_model": "hunyuan3d2_1", "guidance_cond_proj_dim": None}, TINY_SHAPES21),
    "TripoSplat": Family({"image_model": "triposplat"}, TINY_SPLAT, latent=((1, 64, 16), (1, 1, 5))),
}
