from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tools.checkpoints import write_flux, write_flux_lora

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

Differences = Callable[[str, list[str]], list[str]]

FLAGS = {"static": ["--disable-dynamic-vram"], "dynamic": [], "one-stream": ["--async-offload", "1"]}


@pytest.fixture(autouse=True)
def models(tmp_path: Path) -> None:
    write_flux(tmp_path / "tiny-flux.safetensors")
    write_flux_lora(tmp_path / "tiny-lora.safetensors")


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_latents_are_the_hosts_at_every_limit_with_and_without_lora(differences: Differences, flags: list[str]) -> None:
    assert differences("host_program.py", flags) == []


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_a_model_of_the_hosts_loader_through_the_settings(differences: Differences, flags: list[str]) -> None:
    assert differences("settings_program.py", flags) == []


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_quantised_weights_with_and_without_lora(differences: Differences, flags: list[str]) -> None:
    assert differences("quantised_program.py", flags) == []


@pytest.mark.parametrize("flags", [FLAGS["dynamic"]], ids=["dynamic"])
def test_steps_whose_allocations_the_host_records(differences: Differences, flags: list[str]) -> None:
    assert differences("recordings_program.py", flags) == []
