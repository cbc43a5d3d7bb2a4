"""Every family with its blocks on two GPUs in turn gives the latents of one (programs.py).

FAMILIES=2/4 takes the second quarter of them. It needs two GPUs, or WEIGHTSTREAM_VIRTUAL=2x100MB.
"""

from __future__ import annotations

import os
import sys

import programs

# In the smallest form.
FEW = ("Flux", "Lumina2")


def cases(found: programs.Found) -> None:
    import comfy.model_management as mm
    import torch
    from comfy.model_patcher import ModelPatcher
    from families import FAMILIES
    from family_models import build_tiny, sample
    from weightstream.nodes.host.devices import make_backend
    from weightstream.nodes.host.gpus import visible_gpus
    from weightstream.nodes.model.offload import OffloadSettings
    from weightstream.nodes.model.parts import split_blocks
    from weightstream.nodes.model.patcher import StreamedModelPatcher
    from weightstream.nodes.model.streamed_model import ATTRIBUTE, StreamedModel, model_dtype
    from weightstream.nodes.tell.progress import LoadingBar
    from weightstream.streaming import Streamer, StreamingConfig, UnsupportedModelError, cut_model

    cpu, gpus = torch.device("cpu"), list(visible_gpus().values())[:2]

    def over_two(name: str, model: torch.nn.Module) -> StreamedModelPatcher:
        """On two devices with little more room than what streams needs, so that blocks take turns."""
        blocks = cut_model(model, model_dtype, minimum_share=0)
        streamer = Streamer(model.diffusion_model, blocks, make_backend(gpus[0]), StreamingConfig())
        setattr(model, ATTRIBUTE, StreamedModel(name, streamer, None, LoadingBar(None)))
        patcher = StreamedModelPatcher(model, gpus[0], cpu, streamer.model_bytes)
        patcher.settings = OffloadSettings(vram_limit=streamer.minimum_bytes)
        split_blocks(patcher, gpus, [1.0, 1.0])
        return patcher

    agree, notes = found.agree, {}
    found.facts["notes"] = notes
    part, parts = map(int, os.environ.get("FAMILIES", "1/1").split("/"))
    for name in FEW if found.small else list(FAMILIES)[part - 1 :: parts]:
        family = FAMILIES[name]
        native = ModelPatcher(build_tiny(name, family), gpus[0], cpu)
        sample(native, family)
        expected = sample(native, family)
        if not torch.equal(sample(native, family), expected):
            notes[name] = "ComfyUI's own latents differ from run to run"
            continue
        mm.unload_all_models()
        del native
        try:
            model = over_two(name, build_tiny(name, family))
            sample(model, family)
            agree[name] = all(torch.equal(sample(model, family), expected) for _ in range(2))
            agree[f"{name}, both"] = [streamer.counters.steps > 0 for streamer in model.streamers] == [True, True]
        except UnsupportedModelError as error:
            notes[name] = str(error)
        except Exception as error:
            agree[f"{name}: {type(error).__name__}: {str(error)[:300]}"] = False
        mm.unload_all_models()
        print(name, agree.get(name), file=sys.stderr, flush=True)


if __name__ == "__main__":
    programs.alone(cases)
