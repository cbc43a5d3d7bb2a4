"""Our loader's latents at several limits, with and without LoRA, are those of ComfyUI's own (programs.py)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import programs

STRENGTHS = (0.0, 0.7, -0.4, 0.0)
# About 50 ms of a GPU, in which the host has launched a step of a model this small.
LATE_CYCLES = 100_000_000


def cases(found: programs.Found) -> None:
    import comfy.hooks
    import comfy.model_management as mm
    import comfy.sd
    import torch
    from sampling import MB, MODEL, sample, sample_with_hook, with_lora

    programs.write_flux_files(found.folder, "diffusion_models", "loras")
    node, path = programs.node("WeightStreamModelLoader"), str(found.folder / MODEL)
    # A CPU computes in float32: the same model has twice the bytes there.
    limits, unit, repeats = ((16, 0), 2, 1) if found.small else ((9, 13, 16, 0), 1, 3)
    agree = found.agree

    def patched(model, strength: float):
        return with_lora(model, strength) if strength else model

    def load(limit_mb: float, weight_dtype: str = "default"):
        with torch.inference_mode():
            output = node.execute(unet_name=MODEL, weight_dtype=weight_dtype, vram_limit_gb=unit * limit_mb / 1024)
        return output.args[0]

    def expect(**options):
        """The host's latents by LoRA strength: each its second, with the weights settled on the card."""
        with torch.inference_mode():
            theirs = comfy.sd.load_diffusion_model(path, model_options=options)
        latents = {}
        for strength in dict.fromkeys(STRENGTHS):
            model = patched(theirs, strength)
            sample(model)
            latents[strength] = sample(model)
        return latents

    expected = expect()
    for limit in limits:
        ours = load(limit)
        for strength in STRENGTHS:
            for _ in range(repeats):
                latent = sample(patched(ours, strength))
                found.check(f"limit {limit} MB, lora {strength}", torch.equal(latent, expected[strength]))
        status = ours.status()
        agree[f"limit {limit} MB, no miss"] = status["counters"]["misses"] == 0
        agree[f"limit {limit} MB, mode"] = status["mode"] == ("streamed" if limit else "resident")
        if limit == 16:
            # As for another model that needs all but a little. A model this small may keep nothing that it could give
            # up alone, and goes as a whole then. What other processes take and give back meanwhile is not seen.
            before, free = ours.loaded_size(), mm.get_free_memory(ours.load_device)
            with mock.patch.object(mm, "get_free_memory", functools.partial(free_as_before, free)):
                mm.free_memory(free + 2 * MB, ours.load_device)
            agree["gave way under pressure"] = before - ours.loaded_size() >= 2 * MB
            agree["after pressure"] = torch.equal(sample(ours), expected[0.0])
        mm.unload_all_models()
        agree[f"limit {limit} MB, memory given back"] = ours.status()["device_bytes"] == 0
        agree[f"limit {limit} MB, after unloading"] = torch.equal(sample(ours), expected[0.0])
        del ours
    # The host runs these without dynamic VRAM, also where it has it.
    with torch.inference_mode():
        theirs, ours = comfy.sd.load_diffusion_model(path), load(13)
    mode = comfy.hooks.EnumHookMode.MinVram
    for name, strength in (("plain", 0.0), ("LoRA", 0.7)):
        clones = [patched(model.clone(disable_dynamic=True), strength) for model in (theirs, ours)]
        agree[f"{name} without dynamic VRAM"] = torch.equal(*map(sample, clones))
        hooked = [sample_with_hook(patched(model, strength), mode) for model in (theirs, ours)]
        agree[f"{name} with hooks"] = torch.equal(*hooked)
        agree[f"{name} behind hooks"] = torch.equal(sample(patched(ours, strength)), sample(patched(theirs, strength)))
    for mode in comfy.hooks.EnumHookMode:
        expected_with_hooks = sample_with_hook(theirs, mode)
        with late(ours.model.diffusion_model.double_blocks[0]):
            for _ in range(repeats):
                found.check(
                    f"late with hooks, {mode.name}", torch.equal(sample_with_hook(ours, mode), expected_with_hooks)
                )
    expected = expect(dtype=torch.float8_e4m3fn)
    for limit in (7, 0):
        ours = load(limit, "fp8_e4m3fn")
        for strength, latent in expected.items():
            agree[f"fp8, limit {limit} MB, lora {strength}"] = torch.equal(sample(patched(ours, strength)), latent)


@contextlib.contextmanager
def late(block) -> Iterator[None]:
    """While this lasts the GPU is a step behind the host, from ``block`` on: copies come when the host has gone on."""
    import torch

    def hold_back(*_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda._sleep(LATE_CYCLES)

    handle = block.register_forward_pre_hook(hold_back)
    try:
        yield
    finally:
        handle.remove()


def free_as_before(free: int, _device: object = None, torch_free_too: bool = False) -> int | tuple[int, int]:
    """As the host says it: with what torch keeps of it, or without."""
    return (free, 0) if torch_free_too else free


if __name__ == "__main__":
    programs.alone(cases)
