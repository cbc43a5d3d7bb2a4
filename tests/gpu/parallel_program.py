"""A MODEL that two GPUs compute at the same time gives the latents of one (programs.py).

Whether a GPU's kernels give the same bits for half of the tokens depends on the shapes, and tiny ones may differ: then
the work goes on on one GPU, and the latents are the same nevertheless. What has worked in parallel is told of, and for
the shapes that people use the benchmarks tell it.
"""

from __future__ import annotations

import programs

STRENGTHS = (0.0, 0.7, -0.4, 0.0)
REPEATS = 8
# How much of the model each device may hold: it streams to both, or fits.
LIMITS = (46, 0)
FEW_STRENGTHS = (0.0, 0.7)


def cases(found: programs.Found) -> None:
    import comfy.hooks
    import comfy.model_management as mm
    import comfy.sd
    import torch
    from failing import failing
    from prompts import conditioning, guided, latent
    from sampling import MODEL, sample_with_hook, with_lora
    from weightstream.nodes.loader import load_streamed
    from weightstream.nodes.parallel.verified import verdicts

    programs.write_flux_files(found.folder, "diffusion_models", "loras")
    node, agree = programs.node("WeightStreamGPUPlacement"), found.agree
    strengths, repeats, limits, side = STRENGTHS, REPEATS, LIMITS, 64
    if found.small:
        strengths, repeats, limits, side = FEW_STRENGTHS, 1, LIMITS[:1], 16

    def one_prompt(model):
        return guided(model, cfg=1.0, positive=conditioning(1, 64), image=latent(side))

    def two_prompts(model):
        return guided(model, positive=conditioning(1, 64), negative=conditioning(2, 48), image=latent(side))

    runs = {"one prompt": one_prompt, "two prompts": two_prompts}
    path = str(found.folder / MODEL)
    with torch.inference_mode():
        native = comfy.sd.load_diffusion_model(path)
    expected = {}
    for _ in range(2):  # The second is with the weights settled on the card.
        for name, run in runs.items():
            for strength in strengths:
                expected[name, strength] = run(with_lora(native, strength) if strength else native)
        hooked = {mode: sample_with_hook(native, mode) for mode in comfy.hooks.EnumHookMode}
    programs.unload_all()

    worked = found.facts["in parallel"] = {}
    for limit in limits:
        with torch.inference_mode():
            streamed = load_streamed(path, {}, vram_limit=native.model_size() * limit // 100 or None)
            model = node.execute(streamed, devices="gpu:0,gpu:1", split="parallel").args[0]
        copies = model.get_additional_models_with_key("multigpu")
        agree[f"limit {limit} %, a copy on the other GPU"] = [str(one.load_device) for one in copies] == (
            ["cpu:1"] if found.small else ["cuda:1"]
        )
        for name, run in runs.items():
            case = f"limit {limit} %, {name}"
            run(model)  # A GPU's first may differ from all of its later ones.
            verdicts.clear()
            for _ in range(repeats):
                for strength in strengths:
                    output = run(with_lora(model, strength) if strength else model)
                    found.check(f"{case}, lora {strength}", torch.equal(output, expected[name, strength]))
            worked[case] = model.streamed.alone or "yes"

            def interrupt(*_):
                raise mm.InterruptProcessingException

            block = copies[0].model.diffusion_model.double_blocks[0]
            handle = block.register_forward_pre_hook(interrupt)
            try:
                run(model)
                agree[f"{case}, interrupted"] = bool(model.streamed.alone)
            except mm.InterruptProcessingException:
                agree[f"{case}, interrupted"] = True
            handle.remove()
            found.check(f"{case}, after an interrupt", torch.equal(run(model), expected[name, 0.0]))
            with failing(block, 1):
                output = run(model)
            found.check(f"{case}, out of memory on the other GPU", torch.equal(output, expected[name, 0.0]))
            found.check(f"{case}, after that", torch.equal(run(model), expected[name, 0.0]))
        for mode, latents in hooked.items():
            found.check(f"limit {limit} %, hook {mode.name}", torch.equal(sample_with_hook(model, mode), latents))
        programs.unload_all()
        memory = [one.streamer.device_bytes for one in (model, *copies)]
        agree[f"limit {limit} %, memory given back"] = not any(memory)
        del model, copies
    with torch.inference_mode():
        model = node.execute(native, devices="gpu:0,gpu:1", split="parallel").args[0]
    for name, run in runs.items():
        found.check(f"the host's own, {name}", torch.equal(run(model), expected[name, 0.0]))


if __name__ == "__main__":
    programs.alone(cases)
