"""A tiny FLUX with random weights, a LoRA for it, and the host's own sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import folder_paths
import pytest
import torch
from reads import Reads
from sampling import LORA, MB, MODEL, sample
from weightstream.nodes import devices
from weightstream.nodes.loader import load_streamed
from weightstream.streaming import VirtualMemory

import nodes as host_nodes
from tools.checkpoints import write_flux, write_flux_lora


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


@pytest.fixture(scope="session")
def native(models: Path) -> Any:
    """The same model through the host's own loader."""
    with torch.inference_mode():
        model = host_nodes.UNETLoader().load_unet(MODEL, "default")[0]
    sample(model)  # The host's first sampling in a process may differ from all of its later ones.
    return model
