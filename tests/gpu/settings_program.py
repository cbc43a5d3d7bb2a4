"""A MODEL of ComfyUI's own loader gives the same latents as it is and through our settings (programs.py)."""

from __future__ import annotations

import gc

import programs

MODES = {"auto": "streamed", "stream": "streamed", "sync": "synchronous"}
STRENGTHS = (0.0, 0.7, -0.4, 0.0)


def cases(found: programs.Found) -> None:
    import comfy.model_management as mm
    import comfy.sd
    import torch
    from safetensors.torch import load_file
    from sampling import MB, MODEL, sample, with_lora

    import nodes as host_nodes

    programs.write_flux_files(found.folder, "diffusion_models", "loras")
    node, agree = programs.node("WeightStreamOffloadSettings"), found.agree
    modes, repeats, repeats_shared = (["auto"], 1, 2) if found.small else (list(MODES), 2, 3)

    def settings(model, mode: str, limit: int = 0):
        with torch.inference_mode():
            return node.execute(model, mode=mode, vram_limit_gb=limit / 1024**3).args[0]

    def latents(model, runs: int = 1):
        """By strength of the LoRA; of several runs the last, with the weights settled on the card."""
        latest = {}
        for strength in STRENGTHS:
            for _ in range(runs):
                latest[strength] = sample(with_lora(model, strength) if strength else model)
        return latest

    with torch.inference_mode():
        theirs = host_nodes.UNETLoader().load_unet(MODEL, "default")[0]
    expected = latents(theirs, runs=2)
    agree["the lora changes the latents"] = not torch.equal(expected[0.0], expected[0.7])
    for mode in modes:
        # A MODEL that comes in with patches, and one that gets them behind the node.
        model = settings(theirs, mode, 13 * MB)
        for run in range(repeats):
            for strength, latent in latents(model).items():
                agree[f"{mode}, lora {strength}, run {run}"] = torch.equal(latent, expected[strength])
        status = model.status()
        agree[f"{mode}, is {MODES[mode]}"] = status["mode"] == MODES[mode]
        agree[f"{mode}, streams"] = status["counters"]["streamed_bytes"] > 0
        agree[f"{mode}, within its limit"] = status["device_peak_bytes"] <= 13 * MB
        if mode == "stream":  # The others may keep none either, where streaming costs no time.
            agree[f"{mode}, keeps no block"] = status["resident_bytes"] == 0
        before = settings(with_lora(theirs, 0.7), mode, 13 * MB)
        agree[f"{mode}, patched before"] = torch.equal(sample(before), expected[0.7])
        agree[f"{mode}, the one that came in"] = torch.equal(sample(theirs), expected[0.0])
        mm.unload_all_models()
        agree[f"{mode}, memory given back"] = model.status()["device_bytes"] == 0
        off = settings(model, "off")
        agree[f"{mode}, off is another patcher"] = not hasattr(off, "streamer")
        agree[f"{mode}, off"] = torch.equal(latents(off, runs=2)[0.7], expected[0.7])
    # A file that cannot be mapped: its weights are shared, by modules that the host has run.
    pickled = found.folder / "tiny-flux.pt"
    torch.save(load_file(found.folder / MODEL), pickled)
    with torch.inference_mode():
        theirs = comfy.sd.load_diffusion_model(str(pickled))
    for run in range(repeats_shared):
        agree[f"shared, theirs, run {run}"] = torch.equal(latents(theirs)[0.7], expected[0.7])
        model = settings(with_lora(theirs, 0.7) if run else theirs, "auto", 13 * MB)
        agree[f"shared, run {run}"] = torch.equal(latents(model)[0.0], expected[0.7 if run else 0.0])
        agree[f"shared, streams, run {run}"] = model.status()["mode"] == "streamed"
        if run == 1:
            del theirs, model  # And all memory that was theirs.
            gc.collect()
            with torch.inference_mode():
                theirs = comfy.sd.load_diffusion_model(str(pickled))


if __name__ == "__main__":
    programs.alone(cases)
