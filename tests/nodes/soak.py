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
import importlib
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from soak_prompts import FILES, LIMITS, MODES, SEEDS, STRENGTHS, WAYS, Prompt, draw

if TYPE_CHECKING:
    from soak_workflow import Workflow

ROOT = Path(__file__).resolve().parents[2]
MB = 1 << 20
# Prompts after which everything is let go of, and counted.
ROUND = 10
# Longer than threads need to see that nobody wants them.
SETTLING_SECONDS = 10.0


class Held(NamedTuple):
    """What a process holds when no model is loaded."""

    device_bytes: int
    pinned_bytes: int
    locked_bytes: int
    models: int
    threads: int
    files: int


class Soak:
    """A host with models, and a user who wants pictures.

    Args:
        workflow: gives the models.
        seed: of all chance.

    Attributes:
        rss: resident memory of the process after each count, with the number of prompts before it.
        prompts: how they ended, and how often so.
        packed: prompts behind which weights stream packed.
        deeds: what was done to models in between.
    """

    def __init__(self, workflow: Workflow, seed: int) -> None:
        import weightstream_pack.nodes.host.devices as devices
        import weightstream_pack.nodes.model.streamed_model as streamed_model

        self._workflow, self._seed = workflow, seed
        self._devices, self._models = devices, streamed_model.streamed_models
        self._chance = random.Random(seed)
        self._where = f"seed {seed}, before the first prompt"
        self.rss: list[tuple[int, int]] = []
        self.prompts: Counter[str] = Counter()
        self.packed = 0
        self.deeds: Counter[str] = Counter()
        self._model_bytes: dict[str, int] = {}
        self._expected = {key: latent for name in FILES for key, latent in self._references(name)}
        for name, way in (*((name, "settings") for name in FILES), *((next(iter(FILES)), way) for way in WAYS)):
            self._run(Prompt(name, STRENGTHS[1], SEEDS[0], way, LIMITS[1], MODES[0], "on", True, None))
        assert self.packed, "what is made but once to pack weights is not there yet"
        self.packed = 0
        self._free_everything()
        self._held = self._settled(lambda held: not (held.models or held.pinned_bytes or held.locked_bytes))

    def run(self, prompts: int) -> None:
        for number in range(1, prompts + 1):
            prompt = draw(self._chance)
            self._where = f"seed {self._seed}, prompt {number} {prompt}"
            self._ask_for(prompt)
            if number % ROUND == 0 or number == prompts:
                self._free_everything()
                self._count(number)
            else:
                self._tidy()

    # -- prompts -------------------------------------------------------------------------------------------------

    def _references(self, name: str) -> Iterator[tuple[tuple, Any]]:
        """The host's own latents. The first with new weights may differ from all later ones (docs/same-picture.md)."""
        from sampling import sample

        for strength in STRENGTHS:
            nodes = Prompt(name, strength, 0, "host's", 0, "", "", True, None).nodes(0)
            patched = self._workflow.output(*nodes)
            self._model_bytes[name] = patched.model_size()
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
        self.prompts[prompt.way] += 1
        expected = self._expected[prompt[:3]]
        differs = (latent - expected).abs().max()
        assert torch.equal(latent, expected), f"{self._where}: the latent is not the host's, by {differs}"

    def _run(self, prompt: Prompt) -> Any:
        from sampling import sample

        with _interrupted_by_user(prompt.stop):
            model = self._workflow.output(*prompt.nodes(self._model_bytes[prompt.name]))
            with _interrupted_in_a_layer(model, prompt.stop):
                if model.is_dynamic():
                    sample(model, prompt.seed)  # The first may differ.
                latent = sample(model, prompt.seed)
            plans = [streamer.plan for streamer in getattr(model, "streamers", ())]
            self.packed += any(plan is not None and plan.packed for plan in plans)
            return latent

    # -- between prompts -----------------------------------------------------------------------------------------

    def _tidy(self) -> None:
        """What users and other nodes do to models, or nothing. Nodes run in inference mode, and buttons outside of it.

        ComfyUI 0.30 alone, too, cannot run a quantised model of its own loader again that was unloaded outside of
        inference mode while its weights stayed where they are, as on a CPU ("Cannot set version_counter").
        """
        import comfy.model_management as mm
        import torch

        deed = self._chance.choices(["nothing", "unload", "forget one", "press", "free"], [6, 1, 1, 1, 1])[0]
        self.deeds[deed] += 1
        cache = self._workflow.cache
        if deed == "unload":
            for nodes in [nodes for nodes in cache if nodes[0] == ("host's", "quantised")]:
                del cache[nodes]
            mm.unload_all_models()
        elif deed == "forget one" and cache:
            del cache[self._chance.choice([*cache])]
        elif deed == "press":
            device = mm.get_torch_device()
            with torch.inference_mode():
                mm.free_memory(mm.get_free_memory(device) + self._chance.randrange(1, 12) * MB, device)
        elif deed == "free":
            self._free_everything()

    def _free_everything(self) -> None:
        """The button "Free model and node cache"."""
        import comfy.model_management as mm

        mm.unload_all_models()
        self._workflow.cache.clear()
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
        pages = importlib.import_module("...streaming.devices.cuda_pages", self._devices.__package__)
        on_gpu = torch.cuda.memory_allocated() + pages.page_counts(0).used if torch.cuda.is_initialized() else 0
        return Held(
            on_gpu + sum(memory.allocated for memory in self._devices.virtual_devices()),
            pins.used + int(mm.TOTAL_PINNED_MEMORY),
            pins.locked,
            len(self._models()),
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


def main() -> None:
    comfyui, models, prompts, seed, *flags = sys.argv[1:]
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "nodes")]
    import comfy_host

    comfy_host.start(Path(comfyui), flags)
    comfy_host.load_pack("WeightStreamOffloadSettings")
    import folder_paths
    import torch
    from soak_workflow import Workflow, write_files

    write_files(Path(models))
    folder_paths.add_model_folder_path("diffusion_models", models)
    soak = Soak(Workflow(Path(models)), int(seed))
    began = time.monotonic()
    soak.run(int(prompts))
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "virtual"
    seconds = round(time.monotonic() - began, 1)
    seen = {
        "device": device,
        "seconds": seconds,
        "prompts": soak.prompts,
        "packed": soak.packed,
        "deeds": soak.deeds,
        "rss": soak.rss,
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
