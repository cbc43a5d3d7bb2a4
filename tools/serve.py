"""ComfyUI with this pack and small models, for the browser.

A base folder of its own holds models with random weights (those of the demo, and a VAE), the example workflows of the
pack, and one workflow that runs at once. On a machine without a GPU two virtual devices stand in for one. The address
of the page is printed when it answers; the host's log follows. Ctrl-C ends it.

``dev.py serve`` runs this in the right interpreter, with ``COMFYUI_PATH`` set.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

TOOLS = Path(__file__).absolute().parent
# Said here because embedded interpreters do not put a script's folder on the path.
sys.path.insert(0, str(TOOLS))

from checkpoints import TensorSpec, linear, write_checkpoint  # noqa: E402
from demo import (  # noqa: E402
    CLIP,
    LORA,
    OURS,
    SIZES,
    UNET,
    VIRTUAL_VARIABLE,
    DemoError,
    check_pack_loaded,
    comfyui_path,
    find_machine,
    say,
    working_folder,
    write_models,
)
from examples import as_text, report, text  # noqa: E402
from host import PACK_NAME, HeadlessHost, HostError, check_port  # noqa: E402
from workflow import Node, Workflow  # noqa: E402

VAE = "demo-vae.safetensors"
# Two, so that GPU Placement has something to choose from; the tiny FLUX (38 MB there) has to stream on either.
VIRTUAL_DEVICES = "2x24MB"
# The page opens a template by an address without spaces, and lists a workflow by its file's name.
TEMPLATE = "WeightStream_demo"
SAVED = "WeightStream demo.json"
POLL_S = 0.2

DEMO = Workflow(
    TEMPLATE,
    "## WeightStream demo\n\n"
    "A FLUX with random weights (19 MB), a LoRA, a text encoder, a small VAE: the picture is noise. Press **Run**.\n\n"
    "**Streamed Model Loader** says on the node what streams and what stays; **GPU Placement** puts the MODEL on all "
    "GPUs and shows them; **Streaming Report** tells of the run.\n\n"
    "More workflows, for real models: *Templates*, then *Extensions*, then *weightstream*.",
    {
        "clip": Node("CLIPLoader", 1, {"clip_name": CLIP, "type": "stable_diffusion"}),
        "vae": Node("VAELoader", 1, {"vae_name": VAE}),
        # Below the others, as it grows with what it says. With a limit, so that a part of it streams on any GPU.
        "model": Node(OURS, 1, {"unet_name": UNET, "vram_limit_gb": SIZES["tiny"].gpu_limit_gb}),
        "placement": Node(
            "WeightStreamGPUPlacement",
            2,
            {"devices": ""},
            {"model": ("model", 0), "clip": ("clip", 0), "vae": ("vae", 0)},
        ),
        "lora": Node("LoraLoaderModelOnly", 3, {"lora_name": LORA, "strength_model": 0.8}, {"model": ("placement", 0)}),
        "text": text(3, ("placement", 1), "a river of small lanterns at dusk", "Prompt"),
        "latent": Node("EmptySD3LatentImage", 3, {"width": 256, "height": 256}),
        "sampler": Node(
            "KSampler",
            4,
            {"seed": 20250607, "steps": 8, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"},
            {"model": ("lora", 0), "positive": ("text", 0), "negative": ("text", 0), "latent_image": ("latent", 0)},
        ),
        "decoded": Node("VAEDecode", 4, {}, {"samples": ("sampler", 0), "vae": ("placement", 2)}),
        "save": Node("PreviewImage", 5, {}, {"images": ("decoded", 0)}),
        # By itself: it grows with what it tells, and so does the picture.
        "report": report(6, "lora", "sampler"),
    },
)


def small_vae_tensors(channels: int = 16, width: int = 64) -> list[TensorSpec]:
    """The shapes of a TAESD, the smallest VAE that the host knows: layers by their places, blocks of three."""

    def conv(name: str, inputs: int, outputs: int, bias: bool = True) -> list[TensorSpec]:
        return linear(name, inputs, outputs, bias, kernel=(3, 3))

    encoder, decoder = "taesd_encoder", "taesd_decoder"
    blocks = {encoder: (1, 3, 4, 5, 7, 8, 9, 11, 12, 13), decoder: (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)}
    specs = conv(f"{encoder}.0", 3, width) + conv(f"{encoder}.14", width, channels)
    specs += conv(f"{decoder}.1", channels, width) + conv(f"{decoder}.19", width, 3)
    for side, scaling in ((encoder, (2, 6, 10)), (decoder, (7, 12, 17))):
        for place in scaling:
            specs += conv(f"{side}.{place}", width, width, bias=False)
        for place in blocks[side]:
            for layer in (0, 2, 4):
                specs += conv(f"{side}.{place}.conv.{layer}", width, width)
    return specs


def write_files(host: HeadlessHost) -> None:
    """The models; those of an earlier run in the same folder are used again."""
    write_models(host, SIZES["tiny"])
    write_vae(host)


def write_vae(host: HeadlessHost) -> None:
    path = host.models("vae") / VAE
    if not path.exists():
        part = path.with_suffix(".part")
        write_checkpoint(part, small_vae_tensors(), seed=4)
        os.replace(part, path)


def write_workflow(host: HeadlessHost) -> None:
    """The demo's workflow: in the page's list of saved workflows, and as a template that an address opens."""
    content = as_text(DEMO, host.get("/object_info"))
    saved = host.base / "user" / "default" / "workflows" / SAVED
    template = host.base / "custom_nodes" / PACK_NAME / "example_workflows" / f"{TEMPLATE}.json"
    for path in (saved, template):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")


def write_settings(host: HeadlessHost) -> None:
    """Keeps the page's first-run templates from covering the workflow; what the user has set stays."""
    path = host.base / "user" / "default" / "comfy.settings.json"
    settings = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"Comfy.TutorialCompleted": True, **settings}, indent=4), "utf-8")


def address(host: HeadlessHost) -> str:
    """Of the page, with the demo's workflow open."""
    return f"{host.url}/?{urllib.parse.urlencode({'template': TEMPLATE, 'source': PACK_NAME})}"


def follow(host: HeadlessHost) -> None:
    """Pass the host's log on for as long as it runs."""
    with open(host.log_path, encoding="utf-8", errors="replace") as log:
        while host.running:
            if part := log.read():
                print(part, end="", flush=True)
            time.sleep(POLL_S)
        print(log.read(), end="", flush=True)


def serve(args: argparse.Namespace) -> int:
    check_port(args.port)
    comfyui, machine = comfyui_path(), find_machine()
    virtual = machine.virtual and (os.environ.get(VIRTUAL_VARIABLE) or VIRTUAL_DEVICES)
    with working_folder(args.folder) as folder:
        say(f"WeightStream server; models, outputs and settings in {folder}")
        host = HeadlessHost(
            comfyui,
            folder,
            cpu=machine.cpu,
            arguments=args.host_arguments,
            environ={VIRTUAL_VARIABLE: virtual or None},
            page=True,
            port=args.port,
        )
        host.prepare()
        write_files(host)
        write_settings(host)
        with host:
            check_pack_loaded(host, OURS)
            write_workflow(host)
            say(f"  device        {machine.gpu or f'no GPU; virtual devices {virtual}'}")
            say(f"  workflow      {SAVED}, in the list of workflows")
            say(f"  page          {host.url}")
            say(f"  with the demo {address(host)}")
            say("  Ctrl-C ends it.")
            follow(host)
    raise HostError("ComfyUI has ended by itself; its log is above")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dev.py serve", description="ComfyUI with this pack, small models and workflows, for the browser."
    )
    parser.add_argument("--folder", type=Path, help="keep models, outputs and settings there, and use them again")
    parser.add_argument("--port", type=int, default=0, help="default: one that is free")
    parser.epilog = "What follows -- goes to ComfyUI's main.py."
    # Here and not in argparse, whose treatment of -- differs between versions of Python.
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.host_arguments = list(argv[end + 1 :])
    return args


def main(argv: Sequence[str]) -> int:
    # Whoever stops a server from a script sends this; the host and the folder shall go then too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return serve(parse(argv))
    except (DemoError, HostError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            say("stopped")
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
