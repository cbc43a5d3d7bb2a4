"""Prompts in a row in one ComfyUI, at random from a seed: every latent is the host's, and nothing is left behind.

    python soak.py COMFYUI MODELS PROMPTS SEED [host flags]

MODELS is an empty folder for tiny checkpoints. A process of its own: what other tests have loaded would count. Runs on
a GPU where the host finds one, else on the virtual devices of WEIGHTSTREAM_VIRTUAL. Prints what it saw, as JSON in the
last line.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MB = 1 << 20
NAMES = ("one", "two", "three")
STRENGTHS = (0.0, 0.7, -0.4)
SEEDS = (3, 4)
# Models that a workflow keeps loaded.
CACHED = 3
# The longest time until somebody presses a button; a prompt takes about a third of it.
IMPATIENCE_SECONDS = 0.3
# Runs of layers in one prompt, about.
LAYER_RUNS = 150
# Prompts after which everything is let go of, and counted.
ROUND = 10
# Longer than threads need to see that nobody wants them.
SETTLING_SECONDS = 10.0


class Prompt(NamedTuple):
    """What a user asks for. ``stop``: how it is interrupted, and when; None runs to the end."""

    name: str
    strength: float
    seed: int
    ours: bool
    limit_mb: int
    stop: tuple[str, float] | None


class Held(NamedTuple):
    """What a process holds when no model is loaded."""

    device_bytes: int
    pinned_bytes: int
    locked_bytes: int
    models: int
    threads: int
    files: int


def draw(chance: random.Random, limits: tuple[int, ...]) -> Prompt:
    stops = {
        "never": None,
        "raised": ("raised", chance.randrange(LAYER_RUNS)),
        "asked": ("asked", chance.randrange(LAYER_RUNS)),
        "pressed": ("pressed", chance.uniform(0, IMPATIENCE_SECONDS)),
    }
    return Prompt(
        chance.choice(NAMES),
        chance.choice(STRENGTHS),
        chance.choice(SEEDS),
        chance.random() < 0.8,
        chance.choice(limits),
        stops[chance.choices([*stops], [6, 1, 1, 1])[0]],
    )


class Soak:
    """A host with models, and a user who wants pictures.

    Args:
        models: folder of the checkpoints.
        seed: of all chance.
        node: our loader.

    Attributes:
        rss: resident memory of the process after each count, with the number of prompts before it.
        prompts: how they ended, and how often so.
        deeds: what was done to models in between.
    """

    def __init__(self, models: Path, seed: int, node: Any) -> None:
        import weightstream_pack.nodes.devices as devices
        import weightstream_pack.nodes.status as status

        self._models, self._seed, self._node = models, seed, node
        self._devices, self._status = devices, status
        self._chance = random.Random(seed)
        self._cache: dict[tuple, Any] = {}
        self._where = f"seed {seed}, before the first prompt"
        self.rss: list[tuple[int, int]] = []
        self.prompts: Counter[str] = Counter()
        self.deeds: Counter[str] = Counter()
        # The model takes 19 MB on a GPU, and 38 MB where the host computes in float32.
        self._limits = (0, 14, 20, 33) if devices.virtual_devices() else (0, 9, 13, 16)
        self._expected = {key: latent for name in NAMES for key, latent in self._references(name)}
        self._run(Prompt(NAMES[0], STRENGTHS[1], SEEDS[0], True, self._limits[1], None))  # All that is made but once.
        self._free_everything()
        self._held = self._settled(lambda held: not (held.models or held.pinned_bytes or held.locked_bytes))

    def run(self, prompts: int) -> None:
        for number in range(1, prompts + 1):
            prompt = draw(self._chance, self._limits)
            self._where = f"seed {self._seed}, prompt {number} {prompt}"
            self._ask_for(prompt)
            if number % ROUND == 0 or number == prompts:
                self._free_everything()
                self._count(number)
            else:
                self._tidy()

    # -- prompts -------------------------------------------------------------------------------------------------

    def _references(self, name: str) -> Iterator[tuple[tuple, Any]]:
        """The host's own latents. The first with new weights may differ from all later ones (docs/design.md)."""
        from sampling import sample

        model = self._load_by_host(name)
        for strength in STRENGTHS:
            patched = self._with_lora(model, name, strength)
            sample(patched)
            for seed in SEEDS:
                yield (name, strength, seed), sample(patched, seed)

    def _ask_for(self, prompt: Prompt) -> None:
        import comfy.model_management as mm
        import torch

        mm.cleanup_models_gc()
        try:
            latent = self._run(prompt)
        except mm.InterruptProcessingException:
            assert prompt.stop is not None, f"{self._where}: nobody has interrupted it"
            self.prompts[f"interrupted ({prompt.stop[0]})"] += 1
            return
        except Exception as error:
            raise AssertionError(f"{self._where}: {type(error).__name__}: {error}") from error
        finally:
            mm.interrupt_current_processing(False)
        self.prompts["ours" if prompt.ours else "host's"] += 1
        expected = self._expected[prompt[:3]]
        differs = (latent - expected).abs().max()
        assert torch.equal(latent, expected), f"{self._where}: the latent is not the host's, by {differs}"

    def _run(self, prompt: Prompt) -> Any:
        from sampling import sample

        with _interrupted_by_user(prompt.stop):
            model = self._with_lora(self._model(prompt), prompt.name, prompt.strength)
            with _interrupted_in_a_layer(model, prompt.stop):
                return sample(model, prompt.seed)

    def _model(self, prompt: Prompt) -> Any:
        """From the cache where it is there; it keeps a few."""
        key = (prompt.name, prompt.ours, prompt.limit_mb)
        model = self._cache.pop(key, None)
        if model is None:
            load = self._load_by_us if prompt.ours else self._load_by_host
            model = load(prompt.name, prompt.limit_mb)
        self._cache[key] = model
        while len(self._cache) > CACHED:
            del self._cache[next(iter(self._cache))]
        return model

    def _load_by_us(self, name: str, limit_mb: int) -> Any:
        import torch

        with torch.inference_mode():
            output = self._node.execute(f"{name}.safetensors", "default", limit_mb / 1024)
        return output.args[0]

    def _load_by_host(self, name: str, limit_mb: int = 0) -> Any:
        import comfy.sd
        import torch

        with torch.inference_mode():
            return comfy.sd.load_diffusion_model(str(self._models / f"{name}.safetensors"), model_options={})

    def _with_lora(self, model: Any, name: str, strength: float) -> Any:
        import comfy.sd
        import comfy.utils
        import torch

        if not strength:
            return model
        with torch.inference_mode():
            lora = comfy.utils.load_torch_file(str(self._models / f"{name}-lora.safetensors"))
            return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]

    # -- between prompts -----------------------------------------------------------------------------------------

    def _tidy(self) -> None:
        """What users and other nodes do to models, or nothing."""
        import comfy.model_management as mm

        deed = self._chance.choices(["nothing", "unload", "forget one", "press", "free"], [6, 1, 1, 1, 1])[0]
        self.deeds[deed] += 1
        if deed == "unload":
            mm.unload_all_models()
        elif deed == "forget one" and self._cache:
            del self._cache[self._chance.choice([*self._cache])]
        elif deed == "press":
            device = mm.get_torch_device()
            mm.free_memory(mm.get_free_memory(device) + self._chance.randrange(1, 12) * MB, device)
        elif deed == "free":
            self._free_everything()

    def _free_everything(self) -> None:
        """The button "Free model and node cache"."""
        import comfy.model_management as mm

        mm.unload_all_models()
        self._cache.clear()
        gc.collect()
        mm.soft_empty_cache()

    def _count(self, number: int) -> None:
        """Nothing is held beyond what was held at first."""
        held = self._settled(lambda held: all(now <= first for now, first in zip(held, self._held, strict=True)))
        for kind, now, first in zip(Held._fields, held, self._held, strict=True):
            assert now <= first, f"{self._where}: {kind} was {first} and is {now} (all: {held}; {_thread_names()})"
        self.rss.append((number, _resident_memory()))

    def _settled(self, is_good: Callable[[Held], bool]) -> Held:
        """What is held, once threads that nobody waits for have ended."""
        give_up = time.monotonic() + SETTLING_SECONDS
        while not is_good(held := self._holds()) and time.monotonic() < give_up:
            time.sleep(0.02)
        return held

    def _holds(self) -> Held:
        import comfy.model_management as mm
        import psutil
        import torch

        process, pins = psutil.Process(), self._devices.pins
        on_gpu = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
        return Held(
            on_gpu + sum(memory.allocated for memory in self._devices.virtual_devices()),
            pins.used + int(mm.TOTAL_PINNED_MEMORY),
            pins.locked,
            len(self._status.status()["models"]),
            # Drivers and systems have threads of their own, which come and go.
            process.num_threads() if sys.platform == "linux" and not on_gpu else threading.active_count(),
            process.num_fds() if hasattr(process, "num_fds") else len(process.open_files()),
        )


def _resident_memory() -> int:
    """What of the process is in memory, less what its allocator keeps for later."""
    import psutil

    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # Another C library than glibc.
            ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def _thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


@contextmanager
def _interrupted_by_user(stop: tuple[str, float] | None) -> Iterator[None]:
    """Somebody presses the button, at any moment: also while a model is loaded, or when all is done."""
    import comfy.model_management as mm

    if stop is None or stop[0] != "pressed":
        yield
        return
    user = threading.Timer(stop[1], mm.interrupt_current_processing)
    user.start()
    try:
        yield
    finally:
        user.cancel()
        user.join()


@contextmanager
def _interrupted_in_a_layer(model: Any, stop: tuple[str, float] | None) -> Iterator[None]:
    """After so many runs of layers the interrupt is asked for, or raised right there, as other nodes do."""
    import comfy.model_management as mm

    if stop is None or stop[0] == "pressed":
        yield
        return
    left = int(stop[1])

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0 and stop[0] == "raised":
            raise mm.InterruptProcessingException
        if left == 0:
            mm.interrupt_current_processing()

    layers = [module for module in model.model.diffusion_model.modules() if not [*module.children()]]
    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def write_models(folder: Path) -> None:
    """Three FLUX, each with a LoRA: two of one shape, and one of another."""
    from tools.checkpoints import FLUX_SIZES, FluxSize, flux_lora_tensors, flux_tensors, write_checkpoint

    tiny = FLUX_SIZES["tiny"]
    other = FluxSize(tiny.hidden, 3, 3, tiny.context, tiny.pooled, tiny.guidance)
    for seed, (name, size) in enumerate(zip(NAMES, (tiny, tiny, other), strict=True)):
        write_checkpoint(folder / f"{name}.safetensors", flux_tensors(size), seed)
        write_checkpoint(folder / f"{name}-lora.safetensors", flux_lora_tensors(size, 8), seed)


def main() -> None:
    comfyui, models, prompts, seed, *flags = sys.argv[1:]
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "nodes")]
    import comfy_host

    comfy_host.start(Path(comfyui), flags)
    import folder_paths
    import torch

    write_models(Path(models))
    folder_paths.add_model_folder_path("diffusion_models", models)
    soak = Soak(Path(models), int(seed), comfy_host.load_pack("WeightStreamModelLoader"))
    began = time.monotonic()
    soak.run(int(prompts))
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "virtual"
    seconds = round(time.monotonic() - began, 1)
    seen = {"device": device, "seconds": seconds, "prompts": soak.prompts, "deeds": soak.deeds, "rss": soak.rss}
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
