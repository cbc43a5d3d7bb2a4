"""A MODEL whose blocks lie on two GPUs gives the latents of one (programs.py).

It fills a GPU meanwhile, so nothing else may run there.
"""

from __future__ import annotations

import subprocess
import sys

import programs

STRENGTHS = (0.0, 0.7, -0.4, 0.0)
REPEATS = 8
# How much of the model each device may hold: it streams to both, or fits.
LIMITS = (38, 46, 0)
ORDERS = ("gpu:0,gpu:1", "gpu:1,gpu:0")
# In the smallest form.
FEW_STRENGTHS = (0.0, 0.7)


def cases(found: programs.Found) -> None:
    import comfy.hooks
    import comfy.model_management as mm
    import comfy.sd
    import torch
    from sampling import MB, MODEL, sample, sample_with_hook, with_lora
    from weightstream.nodes.loader import load_streamed
    from weightstream.nodes.model import parts

    programs.write_flux_files(found.folder, "diffusion_models", "loras")
    node, agree = programs.node("WeightStreamGPUPlacement"), found.agree
    limits, orders, strengths, repeats = LIMITS, ORDERS, STRENGTHS, REPEATS
    if found.small:
        limits, orders, strengths, repeats = LIMITS[1:2], ORDERS, FEW_STRENGTHS, 1

    def split(model, **inputs):
        with torch.inference_mode():
            return node.execute(model, **inputs).args[0]

    def where(model):
        """A run's latents, and on which devices the layers of blocks have computed."""
        seen = []
        handles = []
        for block, _ in model.streamed.placed:
            layer = next(module for module in block.modules() if isinstance(module, torch.nn.Linear))
            handles.append(layer.register_forward_hook(lambda _l, _i, output: seen.append(output.device)))
        latent = sample(model, steps=1)
        for handle in handles:
            handle.remove()
        return latent, seen

    def agrees(case: str, ones, others) -> None:
        found.check(case, torch.equal(ones, others))

    def take_all(gpu: int) -> subprocess.Popen:
        """Another process that holds all memory of a GPU that is free."""
        code = f"import sys; sys.path.insert(0, {str(programs.HERE)!r}); import fill_gpu; fill_gpu.main({gpu})"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline().strip() == "full"
        return process

    current_gpu = torch.cuda.current_device
    path = str(found.folder / MODEL)
    with torch.inference_mode():
        native = comfy.sd.load_diffusion_model(path)
    expected = {}
    for _ in range(2):  # The second is with the weights settled on the card.
        for strength in strengths:
            expected[strength] = sample(with_lora(native, strength) if strength else native)
        one_step = sample(native, steps=1)
        hooked = {mode: sample_with_hook(native, mode) for mode in comfy.hooks.EnumHookMode}
    agree["links verified"] = all(
        parts.links.is_sound(torch.device("cuda", one), torch.device("cuda", other))
        for one in range(torch.cuda.device_count())
        for other in range(torch.cuda.device_count())
        if one != other
    )

    for limit in limits:
        with torch.inference_mode():
            streamed = load_streamed(path, {}, vram_limit=native.model_size() * limit // 100 or None)
        for devices in orders:
            case = f"limit {limit} %, {devices}"
            # With auto the first GPU may run all blocks, and the other bring weights: then there is no other part.
            gives_way = devices == "gpu:1,gpu:0" and limit == 46
            model = split(streamed, devices=devices, split="auto" if limit and not gives_way else "equal")
            sample(model)  # A GPU's first may differ from all of its later ones.
            for _ in range(repeats):
                for strength in strengths:
                    latent = sample(with_lora(model, strength) if strength else model)
                    agrees(f"{case}, lora {strength}", latent, expected[strength])
            latent, seen = where(model)
            agrees(f"{case}, one step", latent, one_step)
            wanted = [torch.empty(0, device=device).device for _, device in model.streamed.placed]
            agree[f"{case}, computed where it should"] = seen == wanted
            for mode, latents in hooked.items():
                agrees(f"{case}, hook {mode.name}", sample_with_hook(model, mode), latents)
            modes = {streamer.snapshot().mode for streamer in model.streamers}
            agree[f"{case}, mode"] = ("streamed" in modes) is bool(limit) or torch.device("cpu") in wanted
            if gives_way:
                part = model.parts[0]
                before = part.loaded_size()
                freed = part.partially_unload(part.offload_device, 2 * MB)
                agree[f"{case}, gave way"] = before - part.loaded_size() == freed > 0
                agrees(f"{case}, after giving way", sample(model), expected[0.0])

                def interrupt(*_):
                    raise mm.InterruptProcessingException

                handle = model.streamed.placed[3][0].register_forward_pre_hook(interrupt)
                try:
                    sample(model)
                    agree[f"{case}, interrupted"] = False
                except mm.InterruptProcessingException:
                    handle.remove()
                agree[f"{case}, the GPU that is current"] = not torch.cuda.is_initialized() or current_gpu() == 0
                agrees(f"{case}, after an interrupt", sample(model), expected[0.0])
            misses = sum(streamer.counters.misses for streamer in model.streamers)
            agree[f"{case}, no miss"] = misses == 0 or limit == 46
            programs.unload_all()
            agree[f"{case}, memory given back"] = not any(streamer.device_bytes for streamer in model.streamers)
            agrees(f"{case}, after unloading", sample(model), expected[0.0])
            del model
    if torch.cuda.is_available():
        with torch.inference_mode():
            streamed = load_streamed(path, {})
        for moment in ("between prompts", "in mid-run"):
            model = split(streamed, devices="gpu:0,gpu:1", split="equal")
            agrees(f"filled {moment}, before", sample(model), expected[0.0])
            holders = []

            def fill(*_, holders=holders):
                if not holders:
                    torch.cuda.empty_cache()
                    holders.append(take_all(1))

            if moment == "between prompts":
                mm.unload_all_models()
                mm.soft_empty_cache()
                fill()
            else:
                handle = model.streamed.placed[1][0].register_forward_pre_hook(fill)  # A step has begun.
            agrees(f"filled {moment}", sample(model), expected[0.0])
            agrees(f"filled {moment}, again", sample(model), expected[0.0])
            if moment == "between prompts":  # In mid-run what is there may be enough.
                agree[f"filled {moment}, nothing is there"] = model.parts[0].loaded_size() == 0
            holders[0].kill()
            holders[0].wait()
            if moment == "in mid-run":
                handle.remove()
            for _ in range(3):
                agrees(f"filled {moment}, free again", sample(model), expected[0.0])
            agree[f"filled {moment}, it is used again"] = model.parts[0].loaded_size() > 0
            mm.unload_all_models()
    # A MODEL of the host's own loader.
    model = split(native, devices="gpu:0,gpu:1", split="ratio", ratio="60,40")
    for strength in strengths:
        for _ in range(2):
            latent = sample(with_lora(model, strength) if strength else model)
        agrees(f"the host's own, lora {strength}", latent, expected[strength])
    agrees("the one that came in", sample(native), expected[0.0])


if __name__ == "__main__":
    programs.alone(cases)
