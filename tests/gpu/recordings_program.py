"""Steps in which ComfyUI records allocations ("Comfy compiler", 0.35 and newer), natively and streamed (programs.py).

Says how many breaks and rogue allocations each had. A host without records runs the same steps without them.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import programs

# FLUX is recorded by hooks where the host does not do it; the others are those whose forward the host records itself.
FAMILIES = ("Flux", "MiniMaxH3", "LTXAV")
RUNS = 3


class Counts(logging.Handler):
    """Adds up what the host says of its records when it ends them."""

    def __init__(self) -> None:
        super().__init__()
        self.breaks = self.rogues = 0

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"graph breaks: (\d+), rogues: (\d+)", record.getMessage()):
            self.breaks += int(found[1])
            self.rogues += int(found[2])

    def take(self) -> list[int]:
        taken = [self.breaks, self.rogues]
        self.breaks = self.rogues = 0
        return taken


@contextmanager
def counted() -> Iterator[Counts]:
    """Counts what the host says meanwhile."""
    counts, root = Counts(), logging.getLogger()
    level = root.level
    root.addHandler(counts)
    root.setLevel(logging.INFO)
    try:
        yield counts
    finally:
        root.removeHandler(counts)
        root.setLevel(level)


def cases(found: programs.Found) -> None:
    with counted() as counts:
        compare(found, counts)


def compare(found: programs.Found, counts: Counts) -> None:
    import comfy.memory_management
    import comfy.model_management as mm
    import comfy.model_prefetch
    import comfy_host
    import torch
    from comfy.model_patcher import ModelPatcher
    from families import FAMILIES as KNOWN
    from family_models import build_tiny, sample
    from weightstream.nodes.host.devices import make_backend
    from weightstream.nodes.model.offload import OffloadSettings
    from weightstream.nodes.model.patcher import StreamedModelPatcher
    from weightstream.nodes.model.streamed_model import ATTRIBUTE, StreamedModel, model_dtype
    from weightstream.nodes.tell.progress import LoadingBar
    from weightstream.streaming import Streamer, StreamingConfig, cut_model

    gpu, cpu = mm.get_torch_device(), torch.device("cpu")
    records = gpu.type == "cuda" and hasattr(comfy.model_prefetch, "malloc_graph_begin")

    def record(model: Any) -> list[Any]:
        """Hooks that record FLUX's blocks, on a host that keeps records and not of FLUX."""
        inner = model.model.diffusion_model
        source = Path(sys.modules[type(inner).__module__].__file__).read_text("utf-8")
        if not records or not hasattr(inner, "pe_embedder") or "malloc_graph" in source:
            return []
        return [
            inner.pe_embedder.register_forward_hook(lambda *_: comfy.model_prefetch.malloc_graph_begin(gpu)),
            inner.final_layer.register_forward_pre_hook(lambda *_: comfy.model_prefetch.malloc_graph_end()),
        ]

    def run(model: Any, family: Any) -> tuple[list[torch.Tensor], list[int]]:
        """Latents of some prompts, each ended as the executor ends a node, and the counts of the last one."""
        hooks, latents, last = record(model), [], [0, 0]
        try:
            for _ in range(RUNS):
                counts.take()
                latents.append(sample(model, family))
                comfy_host.end_of_node()
                last = counts.take()
        finally:
            for hook in hooks:
                hook.remove()
        return latents, last

    def build(name: str, family: Any) -> torch.nn.Module:
        """With dynamic VRAM on, layers of the host have no weights until a file is loaded."""
        comfy.memory_management.aimdo_enabled, enabled = False, comfy.memory_management.aimdo_enabled
        try:
            return build_tiny(name, family)
        finally:
            comfy.memory_management.aimdo_enabled = enabled

    def streamed(name: str, model: torch.nn.Module, share: float) -> StreamedModelPatcher:
        """With room for what streams needs, and a share of the rest."""
        blocks = cut_model(model, model_dtype, minimum_share=0)
        streamer = Streamer(model.diffusion_model, blocks, make_backend(gpu), StreamingConfig())
        setattr(model, ATTRIBUTE, StreamedModel(name, streamer, None, LoadingBar(None)))
        patcher = StreamedModelPatcher(model, gpu, cpu, streamer.model_bytes)
        least = streamer.minimum_bytes
        patcher.settings = OffloadSettings(vram_limit=int(least + share * (streamer.model_bytes - least)))
        return patcher

    def run_out_once(model: Any) -> list[str]:
        """Have the last block ask for more memory than there is, once, in the middle of a step."""
        hit: list[str] = []

        def ask(*_: Any) -> None:
            if hit:
                return
            hit.append("ran out")
            if gpu.type == "cuda":
                torch.empty(1 << 44, dtype=torch.uint8, device=gpu)
            raise torch.OutOfMemoryError("no room")

        list(model.streamer.blocks.blocks)[-1].module.register_forward_pre_hook(ask)
        return hit

    agree = found.agree
    seen: dict[str, dict[str, list[int]]] = {}
    found.facts |= {"records": records, "breaks_and_rogues": seen}
    for name in (each for each in FAMILIES if each in KNOWN):
        family = KNOWN[name]
        native = ModelPatcher(build(name, family), gpu, cpu)
        latents, theirs = run(native, family)
        expected = latents[-1]
        if not torch.equal(latents[-2], expected):
            agree[f"{name}: ComfyUI's own latents agree from run to run"] = False
        seen[name] = {"native": theirs}
        mm.unload_all_models()
        del native
        for way in ("plain", "verified", "out of memory"):
            with mock.patch.dict(os.environ, {"WEIGHTSTREAM_VERIFY": "1" if way == "verified" else ""}):
                model = streamed(name, build(name, family), 0.5 if way == "out of memory" else 0.1)
                hit = run_out_once(model) if way == "out of memory" else []
                latents, ours = run(model, family)
            seen[name][way] = ours
            agree[f"{name}, {way}"] = all(torch.equal(each, expected) for each in latents)
            agree[f"{name}, {way}: streamed"] = model.streamer.counters.streamed_bytes > 0
            agree[f"{name}, {way}: no more breaks and rogues than native"] = all(
                mine <= own for mine, own in zip(ours, theirs, strict=True)
            )
            if way == "out of memory":
                agree[f"{name}, {way}: it did"] = bool(hit)
            mm.unload_all_models()
            del model
            print(name, way, "native", theirs, "ours", ours, file=sys.stderr, flush=True)


if __name__ == "__main__":
    programs.alone(cases)
