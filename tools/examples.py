"""The workflows of ``example_workflows/``, and the one of ``dev.py serve``.

    python tools/examples.py

writes ``example_workflows/*.json`` anew, from the schemas of the ComfyUI in ``COMFYUI_PATH``. A test holds the files to
what this makes. Models have their published names; the page offers to download those that are missing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).absolute().parent
# Said here because embedded interpreters do not put a script's folder on the path.
sys.path.insert(0, str(TOOLS))

from host import PACK_ROOT, HeadlessHost  # noqa: E402
from release import version_of  # noqa: E402
from workflow import Model, Node, ObjectInfo, Workflow, build  # noqa: E402

FOLDER = PACK_ROOT / "example_workflows"
HUB = "https://huggingface.co"


def _model(directory: str, where: str) -> Model:
    """A file by its place on the hub: ``owner/repository/path``."""
    owner, repository, path = where.split("/", 2)
    return Model(Path(path).name, directory, f"{HUB}/{owner}/{repository}/resolve/main/{path}")


FLUX = _model("diffusion_models", "Comfy-Org/flux1-dev/flux1-dev.safetensors")
FLUX_LORA = _model("loras", "ByteDance/Hyper-SD/Hyper-FLUX.1-dev-8steps-lora.safetensors")
CLIP_L = _model("text_encoders", "comfyanonymous/flux_text_encoders/clip_l.safetensors")
T5 = _model("text_encoders", "comfyanonymous/flux_text_encoders/t5xxl_fp16.safetensors")
FLUX_VAE = _model("vae", "Comfy-Org/Lumina_Image_2.0_Repackaged/split_files/vae/ae.safetensors")

QWEN_FILES = "Comfy-Org/Qwen-Image_ComfyUI/split_files"
QWEN = _model("diffusion_models", f"{QWEN_FILES}/diffusion_models/qwen_image_bf16.safetensors")
QWEN_ENCODER = _model("text_encoders", f"{QWEN_FILES}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors")
QWEN_VAE = _model("vae", f"{QWEN_FILES}/vae/qwen_image_vae.safetensors")

WAN_FILES = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged/split_files"
WAN_HIGH = _model("diffusion_models", f"{WAN_FILES}/diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors")
WAN_LOW = _model("diffusion_models", f"{WAN_FILES}/diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors")
WAN_LORA_HIGH = _model("loras", f"{WAN_FILES}/loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors")
WAN_LORA_LOW = _model("loras", f"{WAN_FILES}/loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors")
WAN_ENCODER = _model(
    "text_encoders",
    "Comfy-Org/Wan_2.1_ComfyUI_repackaged/split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
)
WAN_VAE = _model("vae", f"{WAN_FILES}/vae/wan_2.1_vae.safetensors")


def streamed(column: int, model: Model, **values: Any) -> Node:
    return Node("WeightStreamModelLoader", column, {"unet_name": model.name, **values}, models=(model,))


def vae(column: int, model: Model) -> Node:
    return Node("VAELoader", column, {"vae_name": model.name}, models=(model,))


def lora(column: int, model: Model, source: str, strength: float = 1.0, bypassed: bool = False) -> Node:
    values = {"lora_name": model.name, "strength_model": strength}
    links = {"model": (source, 0)}
    return Node("LoraLoaderModelOnly", column, values, links, bypassed=bypassed, models=(model,))


def text(column: int, clip: tuple[str, int], words: str, title: str) -> Node:
    return Node("CLIPTextEncode", column, {"text": words}, {"clip": clip}, title=f"CLIP Text Encode ({title})")


def report(column: int, model: str, sampler: str) -> Node:
    return Node("WeightStreamReport", column, {}, {"model": (model, 0), "trigger": (sampler, 0)})


def note(what: str, *models: Model) -> str:
    """``what``, and where the files go."""
    files = "\n".join(f"- `models/{model.directory}`: [{model.name}]({model.url})" for model in models)
    return f"{what}\n\n**Files**\n\n{files}"


def flux_begin() -> dict[str, Node]:
    """Model, text encoders and VAE."""
    return {"model": streamed(1, FLUX), "clip": flux_clip(1), "vae": vae(1, FLUX_VAE)}


def flux_end(model: tuple[str, int], clip: tuple[str, int], decoder: tuple[str, int], first: int) -> dict[str, Node]:
    """From the prompt to the picture, as FLUX.1-dev wants it."""
    words = "A lighthouse on a cliff above a calm sea, early morning, thin fog between the rocks"
    links = {"model": model, "positive": ("guidance", 0), "negative": ("negative", 0), "latent_image": ("latent", 0)}
    values = {"seed": 20250607, "steps": 20, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    return {
        "positive": text(first, clip, words, "Prompt"),
        "guidance": Node("FluxGuidance", first, {"guidance": 3.5}, {"conditioning": ("positive", 0)}),
        "negative": Node("ConditioningZeroOut", first, {}, {"conditioning": ("positive", 0)}),
        "latent": Node("EmptySD3LatentImage", first, {"width": 1024, "height": 1024}),
        "sampler": Node("KSampler", first + 1, values, links),
        "decoded": Node("VAEDecode", first + 1, {}, {"samples": ("sampler", 0), "vae": decoder}),
        "save": Node("SaveImage", first + 2, {"filename_prefix": "WeightStream"}, {"images": ("decoded", 0)}),
    }


def flux_placed(values: dict[str, Any]) -> dict[str, Node]:
    """All of it, with GPU Placement behind the loaders."""
    links = {"model": ("model", 0), "clip": ("clip", 0), "vae": ("vae", 0)}
    return {
        **flux_begin(),
        "placement": Node("WeightStreamGPUPlacement", 2, values, links),
        **flux_end(("placement", 0), ("placement", 1), ("placement", 2), 3),
    }


def flux_clip(column: int) -> Node:
    values = {"clip_name1": CLIP_L.name, "clip_name2": T5.name, "type": "flux"}
    return Node("DualCLIPLoader", column, values, models=(CLIP_L, T5))


FLUX_ONE_GPU = Workflow(
    "flux1-dev_one_small_gpu",
    note(
        "## FLUX.1-dev on one small GPU\n\n"
        "**Streamed Model Loader** keeps in VRAM what fits; the rest (of 23.8 GB) streams from RAM while the GPU "
        "computes. After the second step the node says how long a step takes, and what limits it; **Streaming Report** "
        "tells of the whole run.\n\n"
        "`vram_limit_gb` = 0 uses what ComfyUI offers. Set it to leave room for something else.\n\n"
        "The LoRA is bypassed: with it (Ctrl+B on the node) 8 steps are enough. It is computed once, when the model "
        "is loaded, and costs nothing per step.",
        FLUX,
        FLUX_LORA,
        CLIP_L,
        T5,
        FLUX_VAE,
    ),
    {
        **flux_begin(),
        "lora": lora(2, FLUX_LORA, "model", 0.125, bypassed=True),
        **flux_end(("lora", 0), ("clip", 0), ("vae", 0), 2),
        "report": report(4, "lora", "sampler"),
    },
)

FLUX_ENCODER = Workflow(
    "flux1-dev_encoder_on_gpu1",
    note(
        "## The text encoder on the second GPU\n\n"
        "**GPU Placement** puts the text encoder (T5, 9.8 GB) on `gpu:1`, and the MODEL on `gpu:0`. So neither has to "
        "leave its GPU for the other, and a new prompt costs no loading.\n\n"
        "On a machine with one GPU the workflow runs too, and the node says what is used instead. "
        "`python -m streaming gpus`, in the pack's folder, lists the GPUs.",
        FLUX,
        CLIP_L,
        T5,
        FLUX_VAE,
    ),
    flux_placed({"devices": "gpu:0", "clip_device": "gpu:1"}),
)

FLUX_PARALLEL = Workflow(
    "flux1-dev_two_gpus_parallel",
    note(
        "## FLUX.1-dev on two GPUs at the same time\n\n"
        "**GPU Placement** with `split` = parallel gives each GPU the whole MODEL (23.8 GB). What does not fit in a "
        "GPU's VRAM streams over its own link, from one copy in RAM. Each GPU computes half of the picture's tokens, "
        "and they exchange what attention needs: GPUs should reach each other's memory (NVLink).\n\n"
        "The first step is computed both ways. If a single bit differs, one GPU makes the picture, and the node says "
        "so. With one GPU the workflow runs too.",
        FLUX,
        CLIP_L,
        T5,
        FLUX_VAE,
    ),
    flux_placed({"devices": "gpu:0,gpu:1", "split": "parallel"}),
)

QWEN_TWO_GPUS = Workflow(
    "qwen-image_two_gpus",
    note(
        "## Qwen-Image on two GPUs\n\n"
        "**GPU Placement** gives the blocks of the MODEL (40.9 GB) to `gpu:0` and `gpu:1`. What fits stays in their "
        "VRAM; what does not is streamed by each GPU over its own link, while the other one computes.\n\n"
        "`split` = auto divides by free memory and speed. With `devices` empty all GPUs are used. On a machine with "
        "one GPU the workflow runs too: the MODEL streams to it, and the node says so.",
        QWEN,
        QWEN_ENCODER,
        QWEN_VAE,
    ),
    {
        "model": streamed(1, QWEN),
        "clip": Node("CLIPLoader", 1, {"clip_name": QWEN_ENCODER.name, "type": "qwen_image"}, models=(QWEN_ENCODER,)),
        "vae": vae(1, QWEN_VAE),
        "placement": Node(
            "WeightStreamGPUPlacement",
            2,
            {"devices": "gpu:0,gpu:1"},
            {"model": ("model", 0), "clip": ("clip", 0), "vae": ("vae", 0)},
        ),
        "shift": Node("ModelSamplingAuraFlow", 2, {"shift": 3.1}, {"model": ("placement", 0)}),
        "positive": text(
            3, ("placement", 1), 'A small bookshop at night, its sign says "Open late", rain on the street', "Prompt"
        ),
        "negative": text(3, ("placement", 1), "", "Negative Prompt"),
        "latent": Node("EmptySD3LatentImage", 3, {"width": 1328, "height": 1328}),
        "sampler": Node(
            "KSampler",
            4,
            {"seed": 20250607, "steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple"},
            {
                "model": ("shift", 0),
                "positive": ("positive", 0),
                "negative": ("negative", 0),
                "latent_image": ("latent", 0),
            },
        ),
        "decoded": Node("VAEDecode", 4, {}, {"samples": ("sampler", 0), "vae": ("placement", 2)}),
        "save": Node("SaveImage", 5, {"filename_prefix": "WeightStream"}, {"images": ("decoded", 0)}),
    },
)


def wan_sampler(column: int, model: str, latent: str, first: int, last: int) -> Node:
    begins = first == 0
    return Node(
        "KSamplerAdvanced",
        column,
        {
            "add_noise": "enable" if begins else "disable",
            "noise_seed": 20250607 if begins else 0,
            "steps": 4,
            "cfg": 1.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "start_at_step": first,
            "end_at_step": last,
            "return_with_leftover_noise": "enable" if begins else "disable",
        },
        {
            "model": (model, 0),
            "positive": ("positive", 0),
            "negative": ("negative", 0),
            "latent_image": (latent, 0),
        },
        title=f"KSampler ({'high' if begins else 'low'} noise)",
    )


WAN_LORA = Workflow(
    "wan2.2-14b_lora",
    note(
        "## Wan 2.2 14B with a LoRA\n\n"
        "Two models of 14 GB, one after the other, each through **Streamed Model Loader**. The LoRAs (4 steps) are "
        "computed once for each model, when it is loaded.\n\n"
        "**Async Offload Settings** streams the text encoder (6.7 GB) as well: it passes the MODEL on, with the "
        "settings that it shows, and gives back a CLIP that streams. It takes the MODEL and CLIP of any other loader "
        "too.",
        WAN_HIGH,
        WAN_LOW,
        WAN_LORA_HIGH,
        WAN_LORA_LOW,
        WAN_ENCODER,
        WAN_VAE,
    ),
    {
        "high": streamed(1, WAN_HIGH),
        "low": streamed(1, WAN_LOW),
        "clip": Node("CLIPLoader", 1, {"clip_name": WAN_ENCODER.name, "type": "wan"}, models=(WAN_ENCODER,)),
        "vae": vae(1, WAN_VAE),
        "settings": Node("WeightStreamOffloadSettings", 2, {}, {"model": ("high", 0), "clip": ("clip", 0)}),
        "lora_high": lora(3, WAN_LORA_HIGH, "settings"),
        "shift_high": Node("ModelSamplingSD3", 3, {"shift": 5.0}, {"model": ("lora_high", 0)}),
        "lora_low": lora(3, WAN_LORA_LOW, "low"),
        "shift_low": Node("ModelSamplingSD3", 3, {"shift": 5.0}, {"model": ("lora_low", 0)}),
        "positive": text(
            4, ("settings", 1), "A paper boat drifts along a stream through a sunlit forest, slow camera", "Prompt"
        ),
        "negative": text(4, ("settings", 1), "blurred, static, overexposed, low quality", "Negative Prompt"),
        "latent": Node("EmptyHunyuanLatentVideo", 4, {"width": 640, "height": 640, "length": 81}),
        "first": wan_sampler(5, "shift_high", "latent", 0, 2),
        "second": wan_sampler(5, "shift_low", "first", 2, 4),
        "decoded": Node("VAEDecode", 6, {}, {"samples": ("second", 0), "vae": ("vae", 0)}),
        "video": Node("CreateVideo", 6, {"fps": 16.0}, {"images": ("decoded", 0)}),
        "save": Node("SaveVideo", 6, {"filename_prefix": "video/WeightStream"}, {"video": ("video", 0)}),
    },
)

EXAMPLES = (FLUX_ONE_GPU, FLUX_ENCODER, FLUX_PARALLEL, QWEN_TWO_GPUS, WAN_LORA)


def as_text(workflow: Workflow, info: ObjectInfo) -> str:
    version = version_of((PACK_ROOT / "pyproject.toml").read_text("utf-8"))
    return json.dumps(build(workflow, info, version), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as base, HeadlessHost(os.environ["COMFYUI_PATH"], base, cpu=True) as host:
        info = host.get("/object_info")
    FOLDER.mkdir(exist_ok=True)
    for workflow in EXAMPLES:
        (FOLDER / f"{workflow.name}.json").write_text(as_text(workflow, info), "utf-8")


if __name__ == "__main__":
    main()
