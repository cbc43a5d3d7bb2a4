"""Text encoders as ComfyUI runs them and through our settings: prints which results agree, as JSON.

    python encoders_program.py COMFYUI FOLDER [host flags]

FOLDER takes the files of the encoders. As host_program.py. With --cpu, and WEIGHTSTREAM_VIRTUAL set, it runs without a
GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODES = {"auto": "streamed", "stream": "streamed", "sync": "synchronous"}


def main() -> None:
    comfyui, folder, *flags = sys.argv[1:]
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "nodes")]
    import comfy_host

    comfy_host.start(Path(comfyui), flags)
    comfy_host.load_pack("WeightStreamOffloadSettings")
    import comfy.model_management as mm
    import torch
    from safetensors.torch import load_file
    from text_encoders import FAMILIES, PROMPTS, encode, load, random_patches, write_encoder
    from weightstream_pack.nodes.offload import Mode, OffloadSettings
    from weightstream_pack.nodes.settings import with_settings
    from weightstream_pack.nodes.text_encoder import with_patcher

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
            found = [tensor for text in PROMPTS for tensor in encode(clip, text)]
        return found

    def same(ones, others) -> bool:
        return len(ones) == len(others) > 0 and all(map(torch.equal, ones, others))

    agree: dict[str, bool] = {}
    devices = set()
    for name, family in FAMILIES.items():
        path = Path(folder) / f"{name}.safetensors"
        write_encoder(family, path)
        clip = load(family, path)
        devices.add(clip.patcher.load_device)
        expected, patched = said(clip, runs=2), said(patch(clip), runs=2)
        agree[f"{name}, the patch changes what is said"] = not same(expected, patched)
        limit = clip.patcher.model_size() * 2 // 3
        for mode, state in MODES.items():
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
    family, pickled = FAMILIES["t5"], Path(folder) / "t5.pt"
    torch.save(load_file(Path(folder) / "t5.safetensors"), pickled)
    clip = load(family, pickled)
    expected, patched = said(clip, runs=2), said(patch(clip), runs=2)
    ours = stream(clip, "stream", None)
    agree["shared"] = same(said(ours), expected) and same(said(patch(ours)), patched)
    agree["shared, streams"] = ours.patcher.status()["counters"]["streamed_bytes"] > 0
    agree["all on the device"] = devices == {mm.get_torch_device()}
    print(json.dumps({"device": mm.get_torch_device_name(mm.get_torch_device()), "agree": agree}))


if __name__ == "__main__":
    main()
