"""A MODEL, a CLIP and a VAE give the same on each device through our placement (programs.py)."""

from __future__ import annotations

import programs

# In the smallest form.
FEW_KINDS = ("wan",)


def cases(found: programs.Found) -> None:
    import comfy.sd
    import comfy.utils
    import torch
    from sampling import MODEL, sample
    from text_encoders import FAMILIES, PROMPTS, encode, load, write_encoder
    from vaes import KINDS, VAE, decode, load_vae, results, write_kind, write_vae
    from weightstream.nodes.host.gpus import visible_gpus
    from weightstream.nodes.loader import load_streamed

    import nodes as host_nodes

    programs.write_flux_files(found.folder, "diffusion_models", "vae")
    node, agree = programs.node("WeightStreamGPUPlacement"), found.agree

    def place(model, **inputs):
        with torch.inference_mode():
            return node.execute(model, **inputs).args

    def where(module, run):
        """What ``run`` gives, and the devices on which the layers of ``module`` have computed meanwhile."""
        seen = set()
        kinds = torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d
        layers = [layer for layer in module.modules() if isinstance(layer, kinds)]
        handles = [layer.register_forward_hook(lambda _l, _i, output: seen.add(output.device)) for layer in layers]
        result = run()
        for handle in handles:
            handle.remove()
        return result, seen

    def same(ones, others) -> bool:
        return len(ones) == len(others) > 0 and all(map(torch.equal, ones, others))

    path = str(found.folder / MODEL)
    write_encoder(FAMILIES["qwen"], found.folder / "qwen.safetensors")
    write_vae(found.folder / VAE)
    with torch.inference_mode():
        streamed = load_streamed(path, {}, vram_limit=16 * 2**20)
        native = comfy.sd.load_diffusion_model(path)
        vae = host_nodes.VAELoader().load_vae(VAE)[0]
    clip = load(FAMILIES["qwen"], found.folder / "qwen.safetensors")
    for _ in range(2):  # The second is with the weights settled on the card.
        latents, said, image = sample(native), encode(clip, PROMPTS[1]), decode(vae)

    for name, device in visible_gpus().items():
        there = {torch.empty(0, device=device).device}  # Of a virtual device torch makes no difference.
        for kind, model in (("streamed", streamed), ("native", native)):
            moved = place(model, devices=name)[0]
            sample(moved)  # As above: a GPU's first may differ from all of its later ones.
            for run in range(2):
                result, seen = where(moved.model, lambda moved=moved: sample(moved))
                agree[f"{kind} MODEL on {name}, run {run}"] = torch.equal(result, latents)
                agree[f"{kind} MODEL on {name}, computed there, run {run}"] = seen == there
        agree[f"streamed MODEL on {name}, streams"] = place(streamed, devices=name)[0].status()["mode"] == "streamed"
        moved_clip = place(native, devices=name, clip=clip, clip_device=name)[1]
        result, seen = where(moved_clip.cond_stage_model, lambda moved=moved_clip: encode(moved, PROMPTS[1]))
        agree[f"CLIP on {name}"] = same(result, said)
        agree[f"CLIP on {name}, computed there"] = seen == there
        moved_vae = place(native, devices=name, vae=vae, vae_device=name)[2]
        result, seen = where(moved_vae.first_stage_model, lambda moved=moved_vae: decode(moved))
        agree[f"VAE on {name}"] = torch.equal(result, image)
        agree[f"VAE on {name}, computed there"] = seen == there
    _, clip_on_cpu, vae_on_cpu = place(native, devices="gpu:0", clip=clip, clip_device="cpu", vae=vae, vae_device="cpu")
    cpu = {torch.device("cpu")}
    agree["CLIP on cpu"] = where(clip_on_cpu.cond_stage_model, lambda: encode(clip_on_cpu, PROMPTS[1]))[1] == cpu
    agree["VAE on cpu"] = where(vae_on_cpu.first_stage_model, lambda: decode(vae_on_cpu))[1] == cpu
    agree["the ones that came in"] = (
        torch.equal(sample(native), latents)
        and torch.equal(sample(streamed), latents)
        and same(encode(clip, PROMPTS[1]), said)
        and torch.equal(decode(vae), image)
    )
    cpu_device = torch.device("cpu")
    for kind in FEW_KINDS if found.small else KINDS:
        file = found.folder / f"{kind}-vae.safetensors"
        write_kind(kind, file)
        first = load_vae(file.name)
        expected = [results(first, kind) for _ in range(2)][-1]  # As above.
        for name in [*visible_gpus(), "cpu"]:
            device = cpu_device if name == "cpu" else visible_gpus()[name]
            moved_vae = place(native, devices="gpu:0", vae=first, vae_device=name)[2]
            results(moved_vae, kind)
            result, seen = where(moved_vae.first_stage_model, lambda moved=moved_vae, kind=kind: results(moved, kind))
            agree[f"{kind} VAE on {name}, computed there"] = seen == {torch.empty(0, device=device).device}
            if name == "cpu":
                tensors = comfy.utils.load_torch_file(str(file))
                wanted = results(comfy.sd.VAE(tensors, cpu_device), kind)
            else:
                wanted = expected
            for what, tensor in result.items():
                agree[f"{kind} VAE on {name}, {what}"] = torch.equal(tensor, wanted[what])
                agree[f"{kind} VAE on {name}, {what}, is finite"] = bool(tensor.isfinite().all())


if __name__ == "__main__":
    programs.alone(cases)
