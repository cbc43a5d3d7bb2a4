"""Text encoders say the same as ComfyUI runs them and through our settings (programs.py)."""

from __future__ import annotations

import programs

MODES = {"auto": "streamed", "stream": "streamed", "sync": "synchronous"}


def cases(found: programs.Found) -> None:
    import comfy.model_management as mm
    import torch
    from safetensors.torch import load_file
    from text_encoders import FAMILIES, PROMPTS, encode, load, random_patches, write_encoder
    from weightstream.nodes.model.offload import Mode, OffloadSettings
    from weightstream.nodes.model.text_encoder import with_patcher
    from weightstream.nodes.settings import with_settings

    def stream(clip, mode: str, limit: int | None):
        with torch.inference_mode():
            settings = OffloadSettings(mode=Mode(mode), vram_limit=limit)
            return with_patcher(clip, with_settings(clip.patcher, settings))

    def patch(clip):
        patched = clip.clone()
        patched.add_patches(random_patches(clip), 0.7)
        return patched

    def said(clip, runs: int = 1):
        """What the encoder says of all prompts; of several runs the last, with the weights settled on the card."""
        for _ in range(runs):
            latest = [tensor for text in PROMPTS for tensor in encode(clip, text)]
        return latest

    def same(ones, others) -> bool:
        return len(ones) == len(others) > 0 and all(map(torch.equal, ones, others))

    agree, devices = found.agree, set()
    modes = MODES if not found.small else {"auto": MODES["auto"]}
    names = ["qwen"] if found.small else [*FAMILIES]
    for name in names:
        family, path = FAMILIES[name], found.folder / f"{name}.safetensors"
        write_encoder(family, path)
        clip = load(family, path)
        devices.add(clip.patcher.load_device)
        expected, patched = said(clip, runs=2), said(patch(clip), runs=2)
        agree[f"{name}, the patch changes what is said"] = not same(expected, patched)
        limit = clip.patcher.model_size() * 2 // 3
        for mode, state in modes.items():
            ours = stream(clip, mode, limit)
            for run in range(2):
                agree[f"{name}, {mode}, run {run}"] = same(said(ours), expected)
                agree[f"{name}, {mode}, patched, run {run}"] = same(said(patch(ours)), patched)
            agree[f"{name}, {mode}, patched before"] = same(said(stream(patch(clip), mode, limit)), patched)
            agree[f"{name}, {mode}, is ours"] = hasattr(ours.patcher, "status")
            if not agree[f"{name}, {mode}, is ours"]:
                continue
            status = ours.patcher.status()
            agree[f"{name}, {mode}, is {state}"] = status["mode"] == state
            agree[f"{name}, {mode}, streams"] = status["counters"]["streamed_bytes"] > 0
            agree[f"{name}, {mode}, within its limit"] = status["device_peak_bytes"] <= limit
            agree[f"{name}, {mode}, the one that came in"] = same(said(clip), expected)
            mm.unload_all_models()
            agree[f"{name}, {mode}, memory given back"] = ours.patcher.status()["device_bytes"] == 0
    # From a file that cannot be mapped: its weights are shared, by modules that the host has run.
    family, pickled = FAMILIES[names[0]], found.folder / f"{names[0]}.pt"
    torch.save(load_file(found.folder / f"{names[0]}.safetensors"), pickled)
    clip = load(family, pickled)
    expected, patched = said(clip, runs=2), said(patch(clip), runs=2)
    ours = stream(clip, "stream", None)
    agree["shared"] = same(said(ours), expected) and same(said(patch(ours)), patched)
    agree["shared, streams"] = ours.patcher.status()["counters"]["streamed_bytes"] > 0
    agree["all on the device"] = devices == {mm.get_torch_device()}


if __name__ == "__main__":
    programs.alone(cases)
