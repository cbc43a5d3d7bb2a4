"""Quantised weights give the same latents through ComfyUI's own loader and through ours (programs.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs

STRENGTHS = (0.0, 0.7, -0.4, 0.0)
# In the smallest form.
FEW_FORMATS = ("fp8", "int8-rotated")
FEW_STRENGTHS = (0.0, 0.7)


def cases(found: programs.Found) -> None:
    import comfy.model_management as mm
    import torch
    from sampling import MB, sample, with_lora

    import nodes as host_nodes

    programs.write_flux_files(found.folder, "diffusion_models", "loras")
    loader, agree = programs.node("WeightStreamModelLoader"), found.agree
    strengths, repeats = (FEW_STRENGTHS, 1) if found.small else (STRENGTHS, 2)

    def by_us(file: str, limit: int):
        with torch.inference_mode():
            return loader.execute(unet_name=file, weight_dtype="default", vram_limit_gb=limit / 1024**3).args[0]

    def expect(file: str):
        """The host's latents by LoRA strength: each its second, with the weights settled on the card."""
        with torch.inference_mode():
            theirs = host_nodes.UNETLoader().load_unet(file, "default")[0]
        latents = {}
        for strength in dict.fromkeys(strengths):
            model = with_lora(theirs, strength) if strength else theirs
            sample(model)
            latents[strength] = sample(model)
        mm.unload_all_models()
        return latents

    refused: dict[str, str] = {}
    for name, file in write_files(found.folder, found.small).items():
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
            for strength in strengths:
                for _ in range(repeats):
                    latent = sample(with_lora(ours, strength) if strength else ours)
                    found.check(f"{case}, lora {strength}", torch.equal(latent, expected[strength]))
            status = ours.status()
            agree[f"{case}, mode"] = status["mode"] == ("streamed" if limit else "resident")
            agree[f"{case}, no miss"] = status["counters"]["misses"] == 0
            mm.unload_all_models()
            agree[f"{case}, memory given back"] = ours.status()["device_bytes"] == 0
            del ours
    agree["all formats but one run"] = len(refused) <= 1
    found.facts["refused by the host"] = refused


def write_files(folder: Path, few: bool) -> dict[str, str]:
    """The names of files of the tiny FLUX in each format, made of the plain one in ``folder``."""
    from quantised import FORMATS, write_quantised, write_scaled_fp8
    from sampling import MODEL

    files = {name: f"tiny-flux-{name}.safetensors" for name in (FEW_FORMATS if few else FORMATS)}
    for name, file in files.items():
        write_quantised(folder / MODEL, folder / file, FORMATS[name])
    if not few:
        files["scaled-fp8"] = "tiny-flux-scaled-fp8.safetensors"
        write_scaled_fp8(folder / MODEL, folder / files["scaled-fp8"])
    return files


def error_of(run: Callable[..., Any], *arguments: Any) -> str:
    try:
        run(*arguments)
    except Exception as error:  # Whatever the kernels raise.
        return str(error)
    return ""


if __name__ == "__main__":
    programs.alone(cases)
