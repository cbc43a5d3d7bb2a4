"""The demo: the same picture by ComfyUI's own loader and by the streamed one, compared byte for byte.

Random weights in the shapes of a real FLUX and a CLIP-L text encoder go into a temporary folder; a headless ComfyUI
with this pack runs one API prompt with each loader (same seed, same sampler, a LoRA on both). A report says what was
streamed, from where, and what it cost. The last line of standard output is JSON. Exit code 1: the claim does not hold.

``dev.py demo`` runs this in the right interpreter, with ``COMFYUI_PATH`` set.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).absolute().parent
# Said here because embedded interpreters do not put a script's folder on the path.
sys.path.insert(0, str(TOOLS))

from host import HeadlessHost, HostError  # noqa: E402

MIB = 1 << 20
OURS = "WeightStreamModelLoader"
THEIRS = "UNETLoader"
VIRTUAL_VARIABLE = "WEIGHTSTREAM_VIRTUAL"
BENCHMARK = "flux-1024-streamed"

UNET, LORA, CLIP = "demo-flux.safetensors", "demo-lora.safetensors", "demo-clip-l.safetensors"
SEED = 20250607
STEPS = 4


class DemoError(Exception):
    """The demo cannot run here. Its text says why and what to do."""


@dataclass(frozen=True)
class Size:
    """One size of the demo. ``gpu_limit_gb``: what the model may take of a GPU, so that it has to stream."""

    name: str
    shapes: str
    pixels: int
    gpu_limit_gb: float
    clip_loader: str
    clip_type: str
    disk_bytes: float


SIZES = {
    "tiny": Size("tiny", "tiny", 256, 0.012, "CLIPLoader", "stable_diffusion", 0.4e9),
    # Type "sd3" with CLIP-L alone pads the conditioning to the width that FLUX-dev expects; no 10 GB T5 is needed.
    "full": Size("full", "dev", 1024, 8.0, "DualCLIPLoader", "sd3", 26e9),
}
# The tiny model is 38 MB in a CPU host's float32: with this budget it has to stream there.
VIRTUAL_DEVICES = "1x24MB"


@dataclass(frozen=True)
class Machine:
    """Where the demo runs, and how the host is started there."""

    gpu: str | None
    torch_version: str

    @property
    def cpu(self) -> bool:
        return self.gpu is None

    @property
    def virtual(self) -> str:
        return os.environ.get(VIRTUAL_VARIABLE) or (VIRTUAL_DEVICES if self.cpu else "")

    def __str__(self) -> str:
        device = self.gpu or "no GPU"
        return device + (f", virtual devices {self.virtual}" if self.virtual else "")


@dataclass(frozen=True)
class Latent:
    """A saved latent: what the file says of it, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes = field(repr=False)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()[:12]


@dataclass(frozen=True)
class Run:
    """One prompt that ran: its latent and the time from queueing to the end."""

    latent: Latent
    seconds: float


def say(text: str) -> None:
    print(text, flush=True)


def find_machine() -> Machine:
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return Machine(gpu, torch.__version__)


def check_possible(size: Size, machine: Machine, folder: Path) -> None:
    """Refuse before anything large is written."""
    if size.name == "full" and machine.cpu:
        raise DemoError(
            "--size full needs an NVIDIA GPU that torch can use, and there is none. Try it without --size full."
        )
    free = shutil.disk_usage(folder).free
    if free < size.disk_bytes:
        needed, left = size.disk_bytes / 1e9, free / 1e9
        raise DemoError(f"{folder} has {left:.1f} GB free, the demo's models need {needed:.1f} GB: use --folder DIR.")


# --- the models and the prompt ---------------------------------------------------------------------------------------


def write_models(host: HeadlessHost, size: Size) -> None:
    """Write the files where the host looks for them; those of an earlier run in the same folder are used again."""
    from checkpoints import write_clip_l, write_flux, write_flux_lora

    unet, lora = host.models("diffusion_models") / UNET, host.models("loras") / LORA
    clip = host.models("text_encoders") / CLIP
    for path, write in (
        (unet, lambda path: write_flux(path, size=size.shapes, seed=1)),
        (lora, lambda path: write_flux_lora(path, size=size.shapes, rank=8, seed=2)),
        (clip, lambda path: write_clip_l(path, seed=3)),
    ):
        if not path.exists():
            # Renamed when whole: a run that was stopped half-way leaves no short file behind.
            part = path.with_suffix(".part")
            write(part)
            os.replace(part, path)
    say(f"  models        FLUX {size.shapes} ({megabytes(unet.stat().st_size)}), CLIP-L, a LoRA; random weights")


def api_prompt(size: Size, loader: str, seed: int, limit_gb: float = 0.0) -> dict[str, Any]:
    """The API prompt; only the loader's ``class_type`` and its own extra input differ between the two sides."""
    clip = {"clip_name": CLIP} if size.clip_loader == "CLIPLoader" else {"clip_name1": CLIP, "clip_name2": CLIP}
    model: dict[str, Any] = {"unet_name": UNET, "weight_dtype": "default"}
    if limit_gb:
        model["vram_limit_gb"] = limit_gb
    sampler = {"seed": seed, "steps": STEPS, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {"model": ["lora", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["latent", 0]}
    latent = {"width": size.pixels, "height": size.pixels, "batch_size": 1}
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "model": (loader, model),
        "lora": ("LoraLoaderModelOnly", {"model": ["model", 0], "lora_name": LORA, "strength_model": 0.8}),
        "clip": (size.clip_loader, {**clip, "type": size.clip_type}),
        "text": ("CLIPTextEncode", {"clip": ["clip", 0], "text": "a river of small lanterns at dusk"}),
        "latent": ("EmptySD3LatentImage", latent),
        "sampler": ("KSampler", {**links, **sampler}),
        "save": ("SaveLatent", {"samples": ["sampler", 0], "filename_prefix": f"demo/{loader}"}),
    }
    return {node_id: {"class_type": kind, "inputs": inputs} for node_id, (kind, inputs) in nodes.items()}


def read_latent(path: Path) -> Latent:
    """The tensor in a saved latent. The file around it differs in any case: it holds the prompt."""
    raw = path.read_bytes()
    (header_bytes,) = struct.unpack("<Q", raw[:8])
    entry = json.loads(raw[8 : 8 + header_bytes])["latent_tensor"]
    start, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
    return Latent(entry["dtype"], tuple(entry["shape"]), raw[start:end])


def sample(host: HeadlessHost, prompt: Mapping[str, Any]) -> Run:
    start = time.perf_counter()
    entry = host.run(prompt, timeout_s=1800)
    seconds = time.perf_counter() - start
    return Run(read_latent(host.output_file(entry["outputs"]["save"]["latents"][0])), seconds)


# --- both sides ------------------------------------------------------------------------------------------------------


def check_pack_loaded(host: HeadlessHost, loader: str) -> None:
    if not host.get(f"/object_info/{loader}"):
        raise DemoError(f"ComfyUI started, but without the node {loader}; the end of its log:\n{host.log_tail()}")


def run_both(host: HeadlessHost, size: Size, loader: str, limit_gb: float) -> tuple[Run, Run]:
    # The host's first sampling in a process differs from all its later ones: one is thrown away before the reference.
    sample(host, api_prompt(size, THEIRS, SEED + 1))
    reference = sample(host, api_prompt(size, THEIRS, SEED))
    say(f"  ComfyUI       its own loader: {reference.seconds:.2f} s for the second prompt")
    # As warm as the reference: the prompt before it has loaded the model, and measured what the plan needs.
    first = sample(host, api_prompt(size, loader, SEED + 1, limit_gb))
    streamed = sample(host, api_prompt(size, loader, SEED, limit_gb))
    say(f"  WeightStream  the streamed loader: {streamed.seconds:.2f} s; the first, which loads: {first.seconds:.2f} s")
    return reference, streamed


def read_status(host: HeadlessHost) -> dict[str, Any]:
    return host.get("/weightstream/v1/status")


# --- the report ------------------------------------------------------------------------------------------------------


def megabytes(count: float) -> str:
    return f"{count / MIB:.1f} MiB" if count < 1000 * MIB else f"{count / (1024 * MIB):.2f} GiB"


def total(status: Mapping[str, Any], counter: str) -> float:
    return sum(model["counters"].get(counter, 0) for model in status["models"])


def report_result(reference: Run, streamed: Run) -> bool:
    identical = reference.latent == streamed.latent
    shape = "x".join(map(str, streamed.latent.shape))
    if identical:
        say(f"  result        bit-identical: {shape} {streamed.latent.dtype}, sha256 {streamed.latent.digest}")
    else:
        say(
            f"  result        DIFFERENT: sha256 {reference.latent.digest} by ComfyUI, {streamed.latent.digest} streamed"
        )
    return identical


def report_model(model: Mapping[str, Any]) -> None:
    counters = model["counters"]
    say(f"  plan          {model['explain']}")
    if model["note"]:
        say(f"  note          {model['note']}")
    say(
        f"  streamed      {megabytes(counters['streamed_bytes'])} in {counters['copies']} copies, "
        f"{counters['steps']} steps; {megabytes(model['pinned_bytes'])} page-locked, "
        f"{megabytes(model['staged_bytes'])} a step staged from elsewhere"
    )
    say(
        f"  order         {counters['hits']} hits, {counters['misses']} misses; "
        f"{counters['stalls']} stalls, {1000 * counters['stall_seconds']:.1f} ms waited"
    )
    budget = model["device_budget_bytes"]
    limit = f", {megabytes(budget)} allowed" if budget else ""
    say(
        f"  memory        {model['device']}: {megabytes(model['device_bytes'])} now, "
        f"{megabytes(model['device_peak_bytes'])} at most{limit}"
    )


def summary(identical: bool, status: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bit_identical": identical,
        **{key: int(total(status, key)) for key in ("streamed_bytes", "steps", "misses")},
    }


def holds(result: Mapping[str, Any]) -> bool:
    """Whether the demo showed what it claims; says what is missing."""
    problems = []
    if not result["bit_identical"]:
        problems.append("the two latents differ")
    if not result["streamed_bytes"]:
        problems.append("nothing was streamed")
    if result["misses"]:
        problems.append(f"{result['misses']} blocks were fetched only at the moment of need")
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    return not problems


# --- step times ------------------------------------------------------------------------------------------------------


def measure_steps(folder: Path, comfyui: Path) -> dict[str, float]:
    """All resident, streamed, and the floor: seconds per step, from the benchmark of the same shapes."""
    out = folder / "steps"
    script = TOOLS.parent / "benchmarks" / "run.py"
    say(f"  step times    measuring by benchmarks/run.py {BENCHMARK}")
    command = [sys.executable, os.fspath(script), BENCHMARK, "--contenders", "resident,h2d,weightstream"]
    command += ["--out", os.fspath(out), "--work", os.fspath(folder / "checkpoints"), "--comfyui", os.fspath(comfyui)]
    # Its own output goes to standard error: the last line here has to stay the result.
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if code != 0:
        raise DemoError(f"benchmarks/run.py {BENCHMARK} failed with exit code {code}; see above.")
    measured = json.loads((out / f"{BENCHMARK}.json").read_text("utf-8"))
    times = {
        "resident_step_s": measured.get("resident_step_s"),
        "streamed_step_s": measured["runs"].get("weightstream", {}).get("step_s"),
        "floor_s": measured.get("floor_s"),
    }
    if lacking := [name for name, value in times.items() if value is None]:
        raise DemoError(f"benchmarks/run.py {BENCHMARK} did not measure {', '.join(lacking)}; see above.")
    return times


def report_steps(times: Mapping[str, float]) -> None:
    ratio = times["streamed_step_s"] / times["floor_s"]
    say(f"  all resident  {times['resident_step_s']:.3f} s per step")
    say(f"  streamed      {times['streamed_step_s']:.3f} s per step, {ratio:.3f} of the floor")
    say(f"  floor         {times['floor_s']:.3f} s per step: the larger of computing and copying alone")


# --- the command -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def working_folder(given: Path | None) -> Iterator[Path]:
    """The folder given, which is kept, or one that goes away."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.absolute()
        return
    # Windows may hold a mapped file for a moment longer than its process lives.
    with tempfile.TemporaryDirectory(prefix="weightstream-demo-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def comfyui_path() -> Path:
    if not (given := os.environ.get("COMFYUI_PATH")):
        raise DemoError("COMFYUI_PATH is not set: start the demo by `python dev.py demo`, which finds a ComfyUI.")
    return Path(given)


def demo(args: argparse.Namespace) -> int:
    size, comfyui, machine = SIZES[args.size], comfyui_path(), find_machine()
    limit_gb = args.vram_limit_gb if args.vram_limit_gb is not None else (0.0 if machine.virtual else size.gpu_limit_gb)
    with working_folder(args.folder) as folder:
        check_possible(size, machine, folder)
        say(f"WeightStream demo, {size.name}: {STEPS} steps at {size.pixels}x{size.pixels}, LoRA 0.8")
        environ = {VIRTUAL_VARIABLE: machine.virtual or None}
        host = HeadlessHost(comfyui, folder / size.name, cpu=machine.cpu, arguments=args.host_argument, environ=environ)
        host.prepare()
        write_models(host, size)
        with host:
            version = host.get("/system_stats")["system"]["comfyui_version"]
            say(f"  host          ComfyUI {version}, torch {machine.torch_version}; {machine}")
            check_pack_loaded(host, args.loader)
            reference, streamed = run_both(host, size, args.loader, limit_gb)
            identical = report_result(reference, streamed)
            status = read_status(host)
        for model in status["models"]:
            report_model(model)
        result = summary(identical, status)
        if size.name == "full":
            if args.folder is None:
                # The benchmark writes a checkpoint of its own; the disk need not hold both.
                shutil.rmtree(host.base / "models")
            times = measure_steps(folder, comfyui)
            report_steps(times)
            result |= times
    ok = holds(result)
    say(json.dumps(result))
    return 0 if ok else 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dev.py demo", description="ComfyUI's own loader and the streamed one, compared."
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--folder", type=Path, help="keep the models and outputs there, and use them again")
    parser.add_argument("--vram-limit-gb", type=float, help="what the streamed model may take on the device")
    parser.add_argument("--host-argument", action="append", default=[], metavar="ARG", help="one more for main.py")
    parser.add_argument("--loader", default=OURS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    try:
        return demo(parse(argv))
    except (DemoError, HostError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
