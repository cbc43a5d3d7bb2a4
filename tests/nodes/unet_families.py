"""UNets, Stable Cascade's among them."""

from __future__ import annotations

from family import POOLED, Family

UNET = {
    "use_checkpoint": False,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
SD2 = UNET | {"use_linear_in_transformer": True, "context_dim": 1024}
UPSCALER = SD2 | {
    "in_channels": 7,
    "model_channels": 256,
    "channel_mult": [1, 2, 2, 4],
    "transformer_depth": [0, 0, 1, 1, 1, 1, 1, 1],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
}
SDXL = UNET | {
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "use_linear_in_transformer": True,
    "context_dim": 2048,
}
KOALA = SDXL | {"num_res_blocks": [1, 1, 1]}
VIDEO_UNET = SD2 | {
    "in_channels": 8,
    "num_classes": "sequential",
    "use_temporal_attention": True,
    "use_temporal_resblock": True,
    "video_kernel_size": [3, 1, 1],
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "merge_factor": 0.0,
}

TINY_UNET = {"model_channels": 32, "context_dim": 64, "channel_mult": [1, 1, 2, 2]}
TINY_HEADS = TINY_UNET | {"num_head_channels": 16}
# One block on each level instead of two like it.
SHORT = {
    "num_res_blocks": [1, 1, 1, 1],
    "transformer_depth": [1, 1, 1, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 0, 0],
}
SHORT_HEADS = TINY_HEADS | SHORT
TINY_XL = TINY_HEADS | {"adm_in_channels": 1536 + 64, "channel_mult": [1, 1, 2]}
SHALLOW_XL = {
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
}
SHORT_XL = {
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [0, 1, 2],
    "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 1, 1, 2, 2],
}

UNETS = {
    "SD15": Family(UNET, TINY_UNET),
    "SD15_instructpix2pix": Family(UNET | {"in_channels": 8}, TINY_UNET | SHORT),
    "Stable_Zero123": Family(
        UNET | {"in_channels": 8},
        {"model_channels": 32} | SHORT,
        context=(1, 1, 772),
        weights={"cc_projection.weight": (768, 772), "cc_projection.bias": (768,)},
    ),
    "SD20": Family(SD2, TINY_HEADS),
    "SD21UnclipL": Family(SD2 | {"num_classes": "sequential", "adm_in_channels": 1536}, SHORT_HEADS),
    "SD21UnclipH": Family(SD2 | {"num_classes": "sequential", "adm_in_channels": 2048}, SHORT_HEADS),
    "LotusD": Family(SD2 | {"num_classes": "sequential", "adm_in_channels": 4}, SHORT_HEADS),
    "SD_X4Upscaler": Family(UPSCALER, TINY_UNET | {"num_heads": 2}),
    "SDXL": Family(SDXL, TINY_XL | SHALLOW_XL, extras=POOLED),
    "SDXL_instructpix2pix": Family(SDXL | {"in_channels": 8}, TINY_XL | SHORT_XL, extras=POOLED),
    "SDXLRefiner": Family(
        SDXL
        | {
            "model_channels": 384,
            "adm_in_channels": 2560,
            "context_dim": 1280,
            "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [1, 2, 4, 4],
            "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
            "transformer_depth_middle": 4,
            "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
        },
        TINY_HEADS
        | {
            "adm_in_channels": 1280 + 64,
            "num_res_blocks": [1, 1, 1, 1],
            "transformer_depth": [0, 2, 2, 0],
            "transformer_depth_middle": 2,
            "transformer_depth_output": [0, 0, 2, 2, 2, 2, 0, 0],
        },
        extras=POOLED,
    ),
    "SSD1B": Family(
        SDXL
        | {
            "transformer_depth": [0, 0, 2, 2, 4, 4],
            "transformer_depth_middle": -1,
            "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
        },
        TINY_XL | {"transformer_depth": [0, 0, 1, 1, 2, 2], "transformer_depth_output": [0, 0, 0, 1, 1, 2, 3, 2, 2]},
        extras=POOLED,
    ),
    "Segmind_Vega": Family(
        SDXL
        | {
            "transformer_depth": [0, 0, 1, 1, 2, 2],
            "transformer_depth_middle": -1,
            "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
        },
        TINY_XL,
        extras=POOLED,
    ),
    "KOALA_700M": Family(
        KOALA
        | {
            "transformer_depth": [0, 2, 5],
            "transformer_depth_middle": -2,
            "transformer_depth_output": [0, 0, 2, 2, 5, 5],
        },
        TINY_XL | {"transformer_depth": [0, 1, 2], "transformer_depth_output": [0, 0, 1, 1, 2, 2]},
        extras=POOLED,
    ),
    "KOALA_1B": Family(
        KOALA
        | {
            "transformer_depth": [0, 2, 6],
            "transformer_depth_middle": 6,
            "transformer_depth_output": [0, 0, 2, 2, 6, 6],
        },
        TINY_XL | SHORT_XL,
        extras=POOLED,
    ),
    "SVD_img2vid": Family(VIDEO_UNET | {"adm_in_channels": 768}, SHORT_HEADS, latent=((2, 4, 16, 16),)),
    "SV3D_u": Family(VIDEO_UNET | {"adm_in_channels": 256}, SHORT_HEADS, latent=((2, 4, 16, 16),)),
    "SV3D_p": Family(VIDEO_UNET | {"adm_in_channels": 1280}, SHORT_HEADS, latent=((2, 4, 16, 16),)),
    "Stable_Cascade_C": Family(
        {"stable_cascade_stage": "c"},
        {"c_cond": 64, "c_hidden": [64, 64], "nhead": [2, 2], "blocks": [[2, 3], [3, 2]], "c_clip_text": 64}
        | {"c_clip_text_pooled": 64},
        extras=POOLED,
    ),
    "Stable_Cascade_B": Family(
        {
            "stable_cascade_stage": "b",
            "c_hidden": [320, 640, 1280, 1280],
            "nhead": [-1, -1, 20, 20],
            "blocks": [[2, 6, 28, 6], [6, 28, 6, 2]],
            "block_repeat": [[1, 1, 1, 1], [3, 3, 2, 2]],
        },
        {"c_hidden": [16, 32, 64, 64], "nhead": [-1, -1, 2, 2], "c_cond": 64, "c_clip": 64}
        | {"blocks": [[1, 2, 3, 2], [2, 3, 2, 1]]},
        extras={"pooled_output": (1, 1, 64)},
        latent=((1, 4, 64, 64),),
    ),
}
