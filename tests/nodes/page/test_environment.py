"""What a report tells of the process, and of what nodes set."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sampling import MB, sample
from told import entry_of
from weightstream.nodes.model.offload import Mode
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.page.environment import shown_options
from weightstream.nodes.page.status import full_status
from weightstream.streaming import VramReader
from weightstream.streaming.machine.gpus import Nvml


class Library:
    NVMLError = RuntimeError

    @staticmethod
    def nvmlSystemGetDriverVersion() -> bytes:
        return b"580.95.05"


def test_the_status_has_what_a_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["main.py", "--lowvram", "--output-directory", "/home/ann/out"])
    told = full_status(VramReader(Nvml(Library())))["environment"]
    assert list(told) == ["Python", "torch", "CUDA", "driver", "system", "page", "options"]
    assert (told["Python"], told["torch"]) == (platform.python_version(), torch.__version__)
    assert (told["driver"], told["options"]) == ("580.95.05", "--lowvram --output-directory")
    assert told["page"][0].isdigit()
    assert full_status(VramReader(Nvml(None)))["environment"]["driver"] == "unknown"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("--reserve-vram 1.5 --cuda-device 0,1 --port=8188", "--reserve-vram 1.5 --cuda-device 0,1 --port 8188"),
        ("--listen 192.168.1.7 --base-directory=/home/ann --lowvram", "--listen --base-directory --lowvram"),
        ("C:\\Users\\ann ann-laptop", ""),
    ],
)
def test_of_the_command_line_only_options_and_numbers_are_shown(words: str, shown: str) -> None:
    assert " ".join(shown_options(words.split())) == shown


def test_what_nodes_set_stands_with_the_model(streamed: Callable[..., StreamedModelPatcher]) -> None:
    model = streamed(64 * MB, vram_limit=20 * MB)
    model.settings = replace(model.settings, mode=Mode.STREAM)
    assert entry_of(model)["settings"] == {}, "no patcher has loaded it yet"
    sample(model)
    assert entry_of(model)["settings"] == {"mode": "stream", "vram_limit": 20 * MB}
