"""Quantised weights through ComfyUI's own loader and through ours: prints which latents agree, as JSON.

    python quantised_program.py COMFYUI MODELS [host flags]

As host_program.py; the quantised files are made of the plain one. With --cpu, and WEIGHTSTREAM_VIRTUAL set, it runs
without a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STRENGTHS = (0.0, 0.7, -0.4, 0.0)


def main() -> None:
    comfyui, models, *flags = sys.argv[1:]
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "nodes")]
    import comfy_host

    comfy_host.start(Path(comfyui), flags)
    loader = comfy_host.load_pack("WeightStreamModelLoader")
    import comfy.model_management as mm
    import folder_paths
    import torch
    from quantised import FORMATS, write_quantised, write_scaled_fp8
    from sampling import MB, MODEL, sample, with_lora

    import nodes as host_nodes

    for kind in ("diffusion_models", "loras"):
        folder_paths.add_model_folder_path(kind, models)
    plain, files = Path(models) / MODEL, {}
    for name, form in FORMATS.items():
        files[name] = f"tiny-flux-{name}.safetensors"
        write_quantised(plain, plain.with_name(files[name]), form)
    files["scaled-fp8"] = "tiny-flux-scaled-fp8.safetensors"
    write_scaled_fp8(plain, plain.with_name(files["scaled-fp8"]))

    def by_us(file: str, limit: int):
        with torch.inference_mode():
            return loader.execute(unet_name=file, weight_dtype="default", vram_limit_gb=limit / 1024**3).args[0]

    def expect(file: str):
        """The host's latents by LoRA strength: each its second, with the weights settled on the card."""
        with torch.inference_mode():
            theirs = host_nodes.UNETLoader().load_unet(file, "default")[0]
        found = {}
        for strength in STRENGTHS:
            model = with_lora(theirs, strength) if strength else theirs
            sample(model)
            found[strength] = sample(model)
        mm.unload_all_models()
        return found

    def error_of(run, *arguments) -> str:
        try:
            run(*arguments)
        except Exception as error:  # Whatever the kernels raise.
            return str(error)
        return ""

    agree: dict[str, bool] = {}
    refused: dict[str, str] = {}
    for name, file in files.items():
        try:
            expected = expect(file)
        except ValueError as error:
            # torch 2.11 multiplies no two e5m2 matrices on a GPU, which is what the host asks of it: ours fails alike.
            refused[name] = str(error)
            ours = by_us(file, 0)
            agree[f"{name}, the host's error"] = error_of(sample, ours) == str(error)
            mm.unload_all_models()
            agree[f"{name}, memory given back"] = ours.status()["device_bytes"] == 0
            continue
        agree[f"{name}, the lora changes the latents"] = not torch.equal(expected[0.0], expected[0.7])
        least = by_us(file, 0).streamer.minimum_bytes
        for limit in (least + MB // 4, 0):
            ours = by_us(file, limit)
            case = f"{name}, {'streamed' if limit else 'resident'}"
            for strength in STRENGTHS:
                for _ in range(2):
                    latent = sample(with_lora(ours, strength) if strength else ours)
                    key = f"{case}, lora {strength}"
                    agree[key] = agree.get(key, True) and torch.equal(latent, expected[strength])
            status = ours.status()
            agree[f"{case}, mode"] = status["mode"] == ("streamed" if limit else "resident")
            agree[f"{case}, no miss"] = status["counters"]["misses"] == 0
            mm.unload_all_models()
            agree[f"{case}, memory given back"] = ours.status()["device_bytes"] == 0
            del ours
    agree["all formats but one run"] = len(refused) <= 1
    device = mm.get_torch_device_name(mm.get_torch_device())
    print(json.dumps({"device": device, "agree": agree, "refused by the host": refused}))


if __name__ == "__main__":
    main()
