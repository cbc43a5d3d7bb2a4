"""Every family with its blocks on two GPUs in turn: prints which latents agree with those of one, as JSON.

    python families_program.py COMFYUI FOLDER [host flags]

The last line. FOLDER is not used; FAMILIES=2/4 takes the second quarter of them. As host_program.py; it needs two GPUs.
With --cpu, and WEIGHTSTREAM_VIRTUAL=2x100MB, it runs without any.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    comfyui, _, *flags = sys.argv[1:]
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "nodes")]
    import comfy_host

    comfy_host.start(Path(comfyui), flags)
    comfy_host.load_pack("WeightStreamGPUPlacement", "weightstream")  # As the modules of the test suite know it.
    import comfy.model_management as mm
    import torch
    from comfy.model_patcher import ModelPatcher
    from families import FAMILIES
    from family_models import build_tiny, sample
    from weightstream.nodes.devices import make_backend
    from weightstream.nodes.gpus import visible_gpus
    from weightstream.nodes.offload import OffloadSettings
    from weightstream.nodes.parts import split_blocks
    from weightstream.nodes.patcher import StreamedModelPatcher
    from weightstream.nodes.streamed_model import ATTRIBUTE, StreamedModel, model_dtype
    from weightstream.streaming import Streamer, StreamingConfig, UnsupportedModelError, split_model

    cpu, gpus = torch.device("cpu"), list(visible_gpus().values())[:2]

    def over_two(name: str, model: torch.nn.Module) -> StreamedModelPatcher:
        """On two devices with little more room than what streams needs, so that blocks take turns."""
        blocks = split_model(model, model_dtype, minimum_share=0)
        streamer = Streamer(model.diffusion_model, blocks, make_backend(gpus[0]), StreamingConfig())
        setattr(model, ATTRIBUTE, StreamedModel(name, streamer, None, lambda progress: None))
        patcher = StreamedModelPatcher(model, gpus[0], cpu, streamer.model_bytes)
        patcher.settings = OffloadSettings(vram_limit=streamer.minimum_bytes)
        split_blocks(patcher, gpus, [1.0, 1.0])
        return patcher

    agree: dict[str, bool] = {}
    notes: dict[str, str] = {}
    part, parts = map(int, os.environ.get("FAMILIES", "1/1").split("/"))
    for name, family in list(FAMILIES.items())[part - 1 :: parts]:
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
    print(json.dumps({"device": mm.get_torch_device_name(gpus[0]), "agree": agree, "notes": notes}))


if __name__ == "__main__":
    main()
