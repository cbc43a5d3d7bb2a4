"""The list of GPUs and the command that prints it, and the names by which users know devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from weightstream import streaming
from weightstream.streaming import ConfigError, Gpu, in_parts, parse_device, parse_gpus, parse_shares
from weightstream.streaming.machine.gpus import NO_LINK, Figures, Link, Nvml, as_table, list_gpus

ROOT = Path(streaming.__file__).parent.parent
LISTS = json.loads((Path(__file__).parents[2] / "web" / "gpu_lists.json").read_text("utf-8"))
MEMORY = 24 * 10**9
H200 = Gpu(
    0, "NVIDIA H200", "GPU-0af1", 150 * 10**9, 140 * 10**9, link=Link(5, 16), most_link=Link(5, 16), peers=(1, 2)
)


# A process imports torch, so one runs all command lines, each as ``python -m`` would.
COMMAND_LINES = """
import contextlib, io, json, os, runpy, sys

results = []
for virtual, arguments in json.loads(sys.argv[1]):
    os.environ["WEIGHTSTREAM_VIRTUAL"] = virtual
    sys.argv[1:] = arguments
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            runpy.run_module("streaming", run_name="__main__")
        except SystemExit as ended:
            results.append((ended.code, output.getvalue(), errors.getvalue()))
print(json.dumps(results))
"""


@pytest.mark.slow
def test_the_command_where_there_is_no_gpu() -> None:
    """In a process of its own that sees none."""
    lines = [
        ("2x24MB", ["gpus"]),
        ("2x24MB", ["gpus", "--json"]),
        ("", ["gpus"]),
        ("", ["gpus", "--json"]),
        ("two", ["gpus"]),
        ("", []),
        ("", ["everything"]),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", COMMAND_LINES, json.dumps(lines)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    table, listed, none, none_listed, unreadable, nothing, unknown = json.loads(ended.stdout)

    assert table[0] == 0
    titles, *rows = table[1].splitlines()
    assert titles.split() == ["GPU", "name", "total", "free", "link", "at", "most", "peers", "UUID"]
    assert [row.split()[0] for row in rows] == ["gpu:0", "gpu:1"]
    gpus = json.loads(listed[1])["gpus"]
    assert [gpu["device"] for gpu in gpus] == ["gpu:0", "gpu:1"]
    assert [gpu["peers"] for gpu in gpus] == [["gpu:1"], ["gpu:0"]]
    assert {gpu["free"] for gpu in gpus} == {24 << 20}
    assert {gpu["virtual"] for gpu in gpus} == {True}

    assert none[:2] == [0, "no GPU that torch can use through CUDA or ROCm\n"]
    assert (none_listed[0], json.loads(none_listed[1])) == (0, {"gpus": []})

    expected = "WEIGHTSTREAM_VIRTUAL='two': expected COUNTxBYTES with both above 0, such as 2x24MB\n"
    assert (unreadable[0], unreadable[2]) == (2, expected)
    assert (nothing[0], unknown[0]) == (2, 2)


def test_the_table() -> None:
    unknown = Gpu(1, "AMD Radeon")
    assert as_table([H200, unknown]).splitlines() == [
        "GPU    name         total    free     link       at most    peers         UUID",
        "gpu:0  NVIDIA H200  140 GiB  130 GiB  gen 5 x16  gen 5 x16  gpu:1, gpu:2  GPU-0af1",
        "gpu:1  AMD Radeon   -        -        -          -          -             -",
    ]
    assert "gen 3 x-" in as_table([replace(H200, link=Link(3))])


def test_plain_values() -> None:
    values = json.loads(json.dumps(H200.as_dict()))
    assert values == {
        "device": "gpu:0",
        "index": 0,
        "name": "NVIDIA H200",
        "uuid": "GPU-0af1",
        "total": 150 * 10**9,
        "free": 140 * 10**9,
        "link": {"generation": 5, "width": 16},
        "most_link": {"generation": 5, "width": 16},
        "peers": ["gpu:1", "gpu:2"],
        "virtual": False,
    }


class OnlyLibrary:
    """pynvml where torch is not installed: a GPU of which everything is known, and one that has been lost."""

    class NVMLError(Exception):
        """As in pynvml."""

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index:
            raise self.NVMLError("GPU is lost")
        return 70

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-a": 70}[uuid]

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return {70: b"NVIDIA GeForce RTX 4060"}[handle]

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return {70: "GPU-a"}[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=MEMORY, free=MEMORY // 2)

    def __getattr__(self, name: str) -> Any:
        return lambda handle: {"Generation": 4, "Width": 8}[name.rpartition("Link")[2]]


def test_without_torch_the_driver_lists_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Nvml(None).gpus() == []
    known, lost = Nvml(OnlyLibrary()).gpus()
    assert (known.device, known.name, known.uuid) == ("gpu:0", "NVIDIA GeForce RTX 4060", "GPU-a")
    assert (known.total, known.free, known.most_link) == (MEMORY, MEMORY // 2, Link(4, 8))
    assert lost == Gpu(1, "-")


class FakeLibrary:
    """pynvml for two GPUs of which one does not know its link. NVML numbers them the other way round."""

    class NVMLError(Exception):
        """As in pynvml."""

    def __init__(self) -> None:
        self.handles = {"GPU-b": 0, "GPU-a": 1}

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid not in self.handles:
            raise self.NVMLError("not found")
        return self.handles[uuid]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=MEMORY, free=(handle + 1) * 10**9)

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: int) -> int:
        return self._link(handle, 1)

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: int) -> int:
        return self._link(handle, 8)

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: int) -> int:
        return self._link(handle, 4)

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: int) -> int:
        return self._link(handle, 16)

    def _link(self, handle: int, value: int) -> int:
        if handle == 0:
            raise self.NVMLError("not supported")
        return value


def test_nvml_knows_gpus_by_their_uuid() -> None:
    nvml = Nvml(FakeLibrary())
    assert nvml.figures("GPU-a") == Figures(MEMORY, 2 * 10**9, Link(1, 8), Link(4, 16))
    assert nvml.figures("GPU-b") == Figures(MEMORY, 1 * 10**9, NO_LINK, NO_LINK)
    assert nvml.figures("GPU-c") == nvml.figures(None) == Nvml(None).figures("GPU-a") == Figures()


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A torch that sees two GPUs of which one reaches the other; gives the GPUs that were asked for their memory."""
    asked: list[int] = []

    def memory(index: int) -> tuple[int, int]:
        asked.append(index)
        return 5 * 10**9, 8 * 10**9

    properties = [SimpleNamespace(name="A", uuid="a", total_memory=8 * 10**9)]
    properties.append(SimpleNamespace(name="B", total_memory=8 * 10**9))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: one < other)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    return asked


def test_cuda_is_asked_for_the_memory_of_those_that_nvml_does_not_know(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = FakeLibrary()
    library.nvmlInit = library.nvmlShutdown = lambda: None
    monkeypatch.setitem(sys.modules, "pynvml", library)
    first, second = list_gpus()
    assert first == Gpu(0, "A", "GPU-a", MEMORY, 2 * 10**9, Link(1, 8), Link(4, 16), peers=(1,))
    assert second == Gpu(1, "B", None, 8 * 10**9, 5 * 10**9)
    assert two_gpus == [1]


@pytest.mark.parametrize("installed", [False, True], ids=["not installed", "no driver"])
def test_without_nvml_cuda_is_asked(two_gpus: list[int], monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    library = FakeLibrary()
    library.nvmlInit = lambda: library._link(0, 0)
    monkeypatch.setitem(sys.modules, "pynvml", library if installed else None)
    assert [gpu.free for gpu in list_gpus()] == [5 * 10**9] * 2
    assert two_gpus == [0, 1]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("lost"), False),
    ],
)
def test_a_gpu_too_full_for_a_context_is_listed(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch, error: RuntimeError, full: bool
) -> None:
    def fail(index: int) -> Any:
        raise error

    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    if full:
        assert [(gpu.free, gpu.total) for gpu in list_gpus()] == [(None, 8 * 10**9)] * 2
    else:
        with pytest.raises(RuntimeError, match="lost"):
            list_gpus()


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("gpu:0", "gpu:0"),
        ("cuda:1", "gpu:1"),
        ("3", "gpu:3"),
        (" GPU : 12 ", "gpu:12"),
        ("gpu:007", "gpu:7"),
        ("CPU", "cpu"),
        (" Default", "default"),
    ],
)
def test_one_device(text: str, name: str) -> None:
    assert parse_device(text) == name


@pytest.mark.parametrize(
    "text", ["", "gpu", "gpu:", "gpu:-1", "gpu:x", "gpu:99999", "cuda", "mps:0", "gpu:0,gpu:1", "gpu:²"]
)
def test_what_is_no_device(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_device(text, "clip_device")
    assert str(caught.value) == f"clip_device={text!r}: expected default, cpu, or a GPU such as gpu:0"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("  ", ()),
        ("default", ()),
        ("gpu:1", ("gpu:1",)),
        ("gpu:1,gpu:0", ("gpu:1", "gpu:0")),
        (" GPU:1 ,\tgpu: 0 ", ("gpu:1", "gpu:0")),
        ("cuda:1,0", ("gpu:1", "gpu:0")),
    ],
)
def test_several_gpus(text: str, names: tuple[str, ...]) -> None:
    assert parse_gpus(text) == names


@pytest.mark.parametrize("case", LISTS, ids=lambda case: ascii(case["text"]))
def test_lists_of_gpus_are_read_as_in_the_page(case: dict[str, Any]) -> None:
    """The page's own tests have the same table."""
    if case["gpus"] is None:
        with pytest.raises(ConfigError):
            parse_gpus(case["text"])
    else:
        assert parse_gpus(case["text"]) == tuple(case["gpus"])


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("gpu:0,cpu", "'cpu' is no GPU"),
        ("gpu:0,default", "'default' is no GPU"),
        ("gpu:0,", "'' is no GPU"),
        ("gpu:0 gpu:1", "'gpu:0 gpu:1' is no GPU"),
        ("0,one", "'one' is no GPU"),
        ("cuda:0,0", "gpu:0 is there twice"),
        ("gpu:0,gpu:00", "gpu:0 is there twice"),
    ],
)
def test_what_is_no_list_of_gpus(text: str, wrong: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_gpus(text, "WEIGHTSTREAM_GPUS")
    assert str(caught.value).startswith(f"WEIGHTSTREAM_GPUS={text!r}: {wrong}")


@pytest.mark.parametrize("text", ["60,40", " 60% , 40 %", "0.6,.4", "3,2."])
def test_shares(text: str) -> None:
    assert parse_shares(text) == pytest.approx((0.6, 0.4))


@pytest.mark.parametrize("text", ["", "60,", "60,0", "60,-40", "60;40", "1e3,1", "nan,1", "60,40,inf"])
def test_what_are_no_shares(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a number above 0 for each device, such as 60,40"):
        parse_shares(text)


def test_shares_of_some_are_parts_of_one_again() -> None:
    assert in_parts((0.5, 0.25)) == pytest.approx((2 / 3, 1 / 3))


class Slot:
    """NVML of a card for PCIe 5.0 x16 in a slot of 4.0 with four lanes, idle."""

    NVMLError = RuntimeError

    def __init__(self, knows_cards: bool) -> None:
        if knows_cards:
            self.nvmlDeviceGetGpuMaxPcieLinkGeneration = lambda handle: 5

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: str) -> int:
        return 1

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: str) -> int:
        return 4

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: str) -> int:
        return 4

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: str) -> int:
        return 16


@pytest.mark.parametrize(("knows_cards", "best"), [(True, Link(5, 16)), (False, Link(4, 16))])
def test_the_best_link_of_a_card_is_not_that_of_its_slot(knows_cards: bool, best: Link) -> None:
    assert Nvml(Slot(knows_cards)).links("GPU-a") == (Link(1, 4), best)
    assert Nvml(None).links("GPU-a") == (NO_LINK, NO_LINK)
