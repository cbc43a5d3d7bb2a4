"""A tiny FLUX with random weights, a LoRA for it, and the host's own sampler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from in_half import LoadInHalf
from placing import Machine
from reads import Reads
from sampling import LORA, MB, MODEL, Patched, sample, with_lora
from text_encoders import FAMILIES, load, write_encoder
from vaes import VAE, write_vae
from weightstream.nodes import gpu_placement
from weightstream.nodes.host import devices, hosts
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.offload import Mode
from weightstream.nodes.tell import messages
from weightstream.streaming import UnsupportedModelError, VirtualMemory
from weightstream.streaming.config import PackingMode

import nodes as host_nodes
from tools.checkpoints import write_flux, write_flux_lora

# What a host that keeps records does in a forward that is compiled as a whole (it asks for its thread), and torch says.
ASKS_IN_A_GRAPH = "ignore:Dynamo does not know how to trace the builtin:UserWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if hosts.release(hosts.VERSION) >= hosts.RECORDS_SINCE:
        for item in items:
            item.add_marker(pytest.mark.filterwarnings(ASKS_IN_A_GRAPH))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_flux(folder / MODEL)
    write_flux_lora(folder / LORA)
    for kind in ("diffusion_models", "loras"):
        folder_paths.add_model_folder_path(kind, str(folder))
    return folder


@pytest.fixture(autouse=True)
def fresh_host() -> Iterator[None]:
    """No model of one test is loaded in the next."""
    yield
    mm.unload_all_models()
    mm.current_loaded_models.clear()  # On devices that tests make up, which the host passes over.
    mm.cleanup_models_gc()


@pytest.fixture(autouse=True)
def no_interrupt_is_left() -> Iterator[None]:
    yield
    left = mm.processing_interrupted()
    mm.interrupt_current_processing(False)
    assert not left


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tensors so small that more threads would cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture
def virtual_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], VirtualMemory]:
    """Replaces the process's virtual devices by one of the given bytes."""

    def replace(budget: int) -> VirtualMemory:
        memory = VirtualMemory(budget)
        devices.read_environment()
        monkeypatch.setattr(devices._virtual, "devices", (memory,))
        return memory

    return replace


@pytest.fixture
def streamed(models: Path, virtual_device: Callable[[int], VirtualMemory]) -> Callable[..., Any]:
    """Loads the tiny FLUX for streaming to a virtual device of its own."""

    def load(budget: int = 24 * MB, **options: Any) -> Any:
        virtual_device(budget)
        with torch.inference_mode():
            return load_streamed(str(models / MODEL), {}, **options)

    return load


@pytest.fixture
def streamed_in_half(models: Path, virtual_device: Callable[[int], VirtualMemory]) -> LoadInHalf:
    """Loads the tiny FLUX in bfloat16, which streams everything, packed where that is asked for."""

    def load(packing: PackingMode = PackingMode.ON, name: str = MODEL, **settings: Any) -> Any:
        virtual_device(64 * MB)
        with torch.inference_mode():
            found = load_streamed(str(models / name), {"dtype": torch.bfloat16}, vram_limit=12 * MB)
        found.settings = replace(found.settings, packing=packing, mode=Mode.STREAM, **settings)
        return found

    return load


@pytest.fixture(scope="session")
def native_in_half(models: Path) -> Any:
    """The same model through the host's own loader."""
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(models / MODEL), {"dtype": torch.bfloat16})
    sample(model)  # The host's first sampling may differ from all of its later ones.
    return model


@pytest.fixture(scope="session")
def plain_in_half(native_in_half: Any) -> torch.Tensor:
    """What :func:`sample` gives with it, and so with ours."""
    return sample(native_in_half)


@pytest.fixture(scope="session")
def native(models: Path) -> Any:
    """The same model through the host's own loader."""
    with torch.inference_mode():
        model = host_nodes.UNETLoader().load_unet(MODEL, "default")[0]
    sample(model)  # The host's first sampling in a process may differ from all of its later ones.
    return model


@pytest.fixture(scope="session")
def plain(native: Any) -> Iterator[torch.Tensor]:
    """What :func:`sample` gives with the host's own MODEL, and so with ours; also when all tests have run."""
    latent = sample(native)
    yield latent.clone()
    assert torch.equal(sample(native), latent), "the host's own MODEL, or the host, is not what it was"


@pytest.fixture(scope="session")
def plain_with_lora(native: Any) -> Patched:
    """The same with a LoRA of some strength."""
    return functools.cache(lambda strength: sample(with_lora(native, strength)))


# -- for placement -----------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Gives this machine as many virtual devices as are asked for."""

    def have(count: int, budget: int = 24 * MB) -> tuple[VirtualMemory, ...]:
        devices.read_environment()
        memories = tuple(VirtualMemory(budget, f"gpu:{index}") for index in range(count))
        monkeypatch.setattr(devices._virtual, "devices", memories)
        return memories

    monkeypatch.delenv("WEIGHTSTREAM_GPUS", raising=False)
    return have


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the node has said."""
    texts: list[str] = []
    announce = messages.announce

    def listen(name: str, text: str, *rest: Any, **options: Any) -> None:
        if name == gpu_placement.NAME:
            texts.append(text)
        announce(name, text, *rest, **options)

    monkeypatch.setattr(messages, "announce", listen)
    return texts


@pytest.fixture
def asked_to_split(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """No model can be split; what was asked for."""
    asked: list[tuple] = []

    def refuse(model: Any, *arguments: Any) -> Any:
        asked.append(arguments)
        raise UnsupportedModelError("it is made of one piece")

    monkeypatch.setattr(gpu_placement, "split_over", refuse)
    return asked


@pytest.fixture
def loaded(models: Path, machine: Machine) -> Iterator[Any]:
    """The tiny FLUX, streamed, on a machine with two GPUs."""
    machine(2)
    with torch.inference_mode():
        yield load_streamed(str(models / MODEL), {})


@pytest.fixture
def foreign(models: Path) -> ModelPatcher:
    """The same from the host's own loader."""
    with torch.inference_mode():
        return host_nodes.UNETLoader().load_unet(MODEL, "default")[0]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoders") / "qwen.safetensors"
    write_encoder(FAMILIES["qwen"], path)
    return path


@pytest.fixture
def clip(encoder: Path) -> comfy.sd.CLIP:
    return load(FAMILIES["qwen"], encoder)


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    folder_paths.add_model_folder_path("vae", str(folder))
    write_vae(folder / VAE)
    return folder / VAE


@pytest.fixture
def vae(vae_file: Path) -> comfy.sd.VAE:
    with torch.inference_mode():
        return host_nodes.VAELoader().load_vae(VAE)[0]
