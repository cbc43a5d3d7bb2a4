"""ComfyUI on a GPU, our loader and its own in one process: prints which latents agree, as JSON in the last line.

    python host_program.py COMFYUI MODELS [host flags]

MODELS holds tiny-flux.safetensors and tiny-lora.safetensors. A process of its own, since the host reads its command
line once and the rest of the tests run it with --cpu.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    comfyui, models, *flags = sys.argv[1:]
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "nodes")]
    import comfy_host

    comfy_host.start(Path(comfyui), flags)
    import comfy.hooks
    import comfy.model_management as mm
    import comfy.sd
    import comfy.utils
    import folder_paths
    import torch
    from sampling import LORA, MODEL, sample, sample_with_hook

    for kind in ("diffusion_models", "loras"):
        folder_paths.add_model_folder_path(kind, models)
    node = comfy_host.load_pack("WeightStreamModelLoader")
    lora = comfy.utils.load_torch_file(str(Path(models) / LORA))

    def patched(model, strength: float):
        with torch.inference_mode():
            return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]

    def load(limit_mb: float, weight_dtype: str = "default"):
        with torch.inference_mode():
            output = node.execute(unet_name=MODEL, weight_dtype=weight_dtype, vram_limit_gb=limit_mb / 1024)
        return output.args[0]

    def expect(**options):
        """The host's latents by LoRA strength: each its second, with the weights settled on the card."""
        with torch.inference_mode():
            theirs = comfy.sd.load_diffusion_model(str(Path(models) / MODEL), model_options=options)
        latents = {}
        for strength in (0.0, 0.7, -0.4):
            model = patched(theirs, strength) if strength else theirs
            sample(model)
            latents[strength] = sample(model)
        return latents

    agree: dict[str, bool] = {}
    expected = expect()
    for limit in (9, 13, 16, 0):
        ours = load(limit)
        for strength in (0.0, 0.7, -0.4, 0.0):
            key = f"limit {limit} MB, lora {strength}"
            for _ in range(3):
                latent = sample(patched(ours, strength) if strength else ours)
                agree[key] = agree.get(key, True) and torch.equal(latent, expected[strength])
        status = ours.status()
        agree[f"limit {limit} MB, no miss"] = status["counters"]["misses"] == 0
        agree[f"limit {limit} MB, mode"] = status["mode"] == ("streamed" if limit else "resident")
        if limit == 16:
            # As for another model that needs all but a little. A model this small may keep nothing that it could give
            # up alone, and goes as a whole then.
            before = ours.loaded_size()
            mm.free_memory(mm.get_free_memory(ours.load_device) + 2 * 2**20, ours.load_device)
            agree["gave way under pressure"] = before - ours.loaded_size() >= 2 * 2**20
            agree["after pressure"] = torch.equal(sample(ours), expected[0.0])
        mm.unload_all_models()
        agree[f"limit {limit} MB, memory given back"] = ours.status()["device_bytes"] == 0
        agree[f"limit {limit} MB, after unloading"] = torch.equal(sample(ours), expected[0.0])
        del ours
    # The host runs these without dynamic VRAM, also where it has it.
    with torch.inference_mode():
        theirs, ours = comfy.sd.load_diffusion_model(str(Path(models) / MODEL)), load(13)
    mode = comfy.hooks.EnumHookMode.MinVram
    cases = {"plain": lambda model: model, "LoRA": lambda model: patched(model, 0.7)}
    for name, dressed in cases.items():
        clones = [dressed(model.clone(disable_dynamic=True)) for model in (theirs, ours)]
        agree[f"{name} without dynamic VRAM"] = torch.equal(*map(sample, clones))
        hooked = [sample_with_hook(dressed(model), mode) for model in (theirs, ours)]
        agree[f"{name} with hooks"] = torch.equal(*hooked)
        agree[f"{name} behind hooks"] = torch.equal(sample(dressed(ours)), sample(dressed(theirs)))
    expected = expect(dtype=torch.float8_e4m3fn)
    for limit in (7, 0):
        ours = load(limit, "fp8_e4m3fn")
        for strength, latent in expected.items():
            agree[f"fp8, limit {limit} MB, lora {strength}"] = torch.equal(
                sample(patched(ours, strength) if strength else ours), latent
            )
    print(json.dumps({"device": torch.cuda.get_device_name(), "agree": agree}))


if __name__ == "__main__":
    main()
