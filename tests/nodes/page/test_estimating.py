"""What a model will do before it runs, as the route tells it, against the command line and against what runs then."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import folder_paths
import pytest
import torch
from sampling import MB, MODEL, sample, settle
from servers import TINY, free
from weightstream.nodes.model import measured, offload
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.page import estimating
from weightstream.nodes.page.estimating import RefusedError, Wanted, describe_estimate, rate_of
from weightstream.nodes.page.status import full_status
from weightstream.nodes.page.usage import DeviceUsage, HostUsage, Sample
from weightstream.streaming import HostMemory, Link, VirtualMemory, VramReader, format_bytes
from weightstream.streaming.command_line import main
from weightstream.streaming.estimating.cutting import cut
from weightstream.streaming.estimating.estimate import measured_by
from weightstream.streaming.estimating.tensors import read_tensors
from weightstream.streaming.machine.gpus import NO_LINK, Nvml

from tools import demo
from tools.checkpoints import FLUX_SIZES, encode_header, flux_tensors
from tools.host import HeadlessHost

GIB = 1 << 30
ROUTE = "/weightstream/v1/estimate"
FLUX = "estimated-flux.safetensors"
CARD = DeviceUsage("gpu:0", "NVIDIA GeForce RTX 4060", False, 8 * GIB, 7 * GIB, 0, 0, 0, 0, 0)
Load = Callable[..., StreamedModelPatcher]
Card = Callable[..., None]


@pytest.fixture(autouse=True)
def nothing_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_compute", {})
    monkeypatch.setattr(measured, "_bandwidth", {})


@pytest.fixture
def flux(models: Path) -> Iterator[Path]:
    """FLUX.1-dev as its header says it; its weights are not there."""
    path = models / FLUX
    path.write_bytes(encode_header(flux_tensors(FLUX_SIZES["dev"])))
    folder_paths.filename_list_cache.clear()
    yield path
    path.unlink()
    folder_paths.filename_list_cache.clear()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """Puts a card into this machine, and RAM."""

    def put(vram: float = 8, ram: float = 32, link: Link = NO_LINK) -> None:
        usage = replace(CARD, total=int(vram * GIB))
        monkeypatch.setattr(estimating, "_gpu", lambda _reader: (usage, link))
        monkeypatch.setattr(estimating, "group_memory", lambda: None)
        monkeypatch.setattr(estimating, "spare_ram", lambda: int(ram * GIB) // 2)
        monkeypatch.setattr(estimating.mm, "get_total_memory", lambda _device: int(ram * GIB))

    return put


def estimate(name: str, **query: str) -> dict[str, Any]:
    return describe_estimate(Wanted.of({"name": name, **query}))


def as_command(path: Path, told: Mapping[str, Any]) -> list[str]:
    """The command line for the machine that the route tells of."""
    words = {"vram": told["vram"] / GIB, "reserve": told["reserve"] / GIB, "ram": told["ram"] / GIB}
    words |= {"link": told["rate"] / 1e9, "compute": told["compute_seconds"]}
    words["limit"] = None if told["limit"] is None else told["limit"] / GIB
    return ["plan", str(path), *(f"--{word}={value!r}" for word, value in words.items() if value is not None)]


@pytest.mark.parametrize(("vram", "ram"), [(8, 32), (8, 16), (12, 64), (2, 32), (48, 64)])
@pytest.mark.parametrize(("compute", "limit"), [(None, 0), (0.4, 0), (None, 0.5), (0.4, 4), (None, 20)])
def test_the_route_and_the_command_say_the_same(
    flux: Path,
    card: Card,
    vram: float,
    ram: float,
    compute: float | None,
    limit: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    card(vram, ram, Link(4, 8))
    if compute is not None:
        measured._compute[FLUX, "gpu:0"] = compute
    told = estimate(FLUX, vram_limit_gb=str(limit))
    assert main(as_command(flux, told)) == 0
    said = capsys.readouterr().out
    assert f"{FLUX}: {format_bytes(told['file_bytes'])} (" in said
    assert f"  {told['blocks']} blocks (" in said
    assert f"{format_bytes(told['missing_bytes'])} of it are not there" in said
    expected = []
    if told["least_limit"] is not None:
        expected = [f"the limit is too low: {told['least_limit'] / GIB:g} GiB are the least"]
    elif not told["fits"]:
        expected = [f"too little: {told['least_vram'] / GIB:g} GiB are the least"]
    elif not told["streamed_bytes"]:
        expected = [f"nothing streams: all of it stays in VRAM ({format_bytes(told['device_bytes'])})"]
    else:
        streamed = format_bytes(told["streamed_bytes"])
        expected = [
            f"streams {streamed}, from {told['streamed_blocks']} of {told['blocks']} blocks; "
            f"{format_bytes(told['stays'])} stay in VRAM, beside "
            f"{format_bytes(told['device_bytes'] - told['stays'])} of staging",
            f"{streamed} page-locked",
            f"at most {format_bytes(told['pinnable'])}",
            f"{told['bus_seconds']:.2g} s of each step at 12.6016 GB/s",
            f"about {told['packed_bus_seconds']:.2g} s with packed weights",
            f"where a step computes for {told['bus_seconds']:.2g} s or more"
            if compute is None
            else f"{told['step_seconds']:.2g} s predicted ({compute} s of compute)",
        ]
        assert told["stays"] + told["streamed_bytes"] == told["model_bytes"]
        if told["from_file"]:
            expected.append(f"{format_bytes(told['from_file'])} of each step come from the file")
        assert told["from_disk"] == ("at the disk's speed" in said)
        assert (told["step_seconds"] is None) == (compute is None)
    assert [line for line in expected if line not in said] == []


def test_a_limit_and_fp8_of_the_loader_count(flux: Path, card: Card) -> None:
    card(24)
    plain, limited = estimate(FLUX), estimate(FLUX, vram_limit_gb="4")
    assert plain["streamed_bytes"] < limited["streamed_bytes"]
    assert 3.5 * GIB < limited["device_bytes"] <= 4 * GIB
    assert estimate(FLUX, vram_limit_gb="99") == {**plain, "limit": 99 * GIB}
    small = estimate(FLUX, weight_dtype="fp8_e4m3fn")
    assert small["model_bytes"] == pytest.approx(plain["model_bytes"] / 2)
    assert small["file_bytes"] == plain["file_bytes"]
    assert small["packed_bus_seconds"] is None
    assert small["streamed_bytes"] == 0


def test_what_async_offload_settings_decide_counts(flux: Path, card: Card) -> None:
    card(12, ram=64)
    plain = estimate(FLUX)
    left = estimate(FLUX, reserve_vram_gb="3")
    assert (left["reserve"], plain["reserve"]) == (5.5 * GIB, 2.5 * GIB)
    assert plain["stays"] - left["stays"] == pytest.approx(3 * GIB, rel=0.05)
    locked = estimate(FLUX, pinned_limit_gb="4")
    assert (locked["pinnable"], locked["from_file"]) == (4 * GIB, locked["streamed_bytes"] - 4 * GIB)
    assert estimate(FLUX, pinned_limit_gb="999") == {**plain, "pinned_limit": 999 * GIB}
    nothing = estimate(FLUX, mode="stream")
    assert nothing["streamed_blocks"] == nothing["blocks"]
    assert nothing["device_bytes"] < plain["device_bytes"] / 4
    assert estimate(FLUX, mode="auto") == plain
    with pytest.raises(RefusedError, match="reserve_vram_gb must be a number"):
        estimate(FLUX, reserve_vram_gb="-1")


def test_page_locking_counts_as_settings_and_the_command_line_have_it(
    flux: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(12, ram=64)
    plain = estimate(FLUX)
    off = estimate(FLUX, pin_memory="off", pinned_limit_gb="4")
    assert (off["pinned_limit"], off["pinnable"], off["from_file"]) == (0, 0, off["streamed_bytes"])
    assert (off["packed_bus_seconds"], off["packed_step_seconds"]) == (None, None), "only page-locked memory is packed"
    assert (plain["pinned_limit"], plain["from_file"], plain["packed_bus_seconds"] is None) == (None, 0, False)
    assert estimate(FLUX, pin_memory="auto") == plain
    monkeypatch.setattr(offload.args, "disable_pinned_memory", True)
    assert estimate(FLUX) == {**off, "limit": None}
    assert estimate(FLUX, pin_memory="on") == plain


def test_nothing_is_packed_where_settings_say_so_and_synchronous_copies_hide_nothing(
    flux: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(8)
    measured._compute[FLUX, "gpu:0"] = 0.2
    plain, raw, waiting = (estimate(FLUX, **query) for query in ({}, {"packing": "off"}, {"mode": "sync"}))
    assert plain["packed_bus_seconds"] < plain["bus_seconds"]
    assert plain["packed_step_seconds"] < plain["step_seconds"]
    nothing = {"packed_bus_seconds": None, "packed_step_seconds": None}
    assert raw == {**plain, **nothing}
    assert estimate(FLUX, packing="on") == plain
    assert waiting.items() >= {**nothing, "step_seconds": 0.2 + waiting["bus_seconds"]}.items()
    assert waiting["stays"] > plain["stays"], "they take less staging"
    monkeypatch.setattr(offload.args, "disable_async_offload", True)
    assert estimate(FLUX) == waiting
    assert (waiting["overlaps"], plain["overlaps"]) == (False, True)
    for name, choices in (
        ("mode", "auto, stream, sync, off"),
        ("packing", "auto, on, off"),
        ("pin_memory", "auto, on"),
    ):
        with pytest.raises(RefusedError, match=f"{name} must be one of {choices}"):
            estimate(FLUX, **{name: "fast"})


def test_the_least_limit_is_said_and_is_enough(flux: Path, card: Card) -> None:
    card(8)
    told = estimate(FLUX, vram_limit_gb="0.5")
    assert not told["fits"]
    assert told["least_vram"] == estimate(FLUX)["least_vram"] < 4 * GIB
    least = told["least_limit"] / GIB
    assert 0.5 < least < 1
    assert estimate(FLUX, vram_limit_gb=f"{least:.1f}")["fits"]
    assert not estimate(FLUX, vram_limit_gb=f"{least - 0.15:.2f}")["fits"]


def test_on_a_card_that_is_too_small_the_limit_is_not_to_blame(flux: Path, card: Card) -> None:
    card(2)
    for limit in ("20", "0.5"):
        told = estimate(FLUX, vram_limit_gb=limit)
        assert (told["fits"], told["least_limit"]) == (False, None)
        assert 3 * GIB < told["least_vram"] < 4 * GIB


def test_ram_is_that_of_the_group_and_what_is_page_locked_is_free_for_it(
    flux: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(8, 64)
    monkeypatch.setattr(estimating.pins, "locked", 5 * GIB)
    told = estimate(FLUX)
    assert (told["ram"], told["ram_available"]) == (64 * GIB, 37 * GIB)
    monkeypatch.setattr(estimating, "group_memory", lambda: HostMemory(16 * GIB, 12 * GIB))
    inside = estimate(FLUX)
    assert inside["ram"] == 16 * GIB
    assert inside["pinnable"] < told["pinnable"]
    assert inside["from_file"] > 0
    monkeypatch.setattr(estimating, "group_memory", lambda: HostMemory(128 * GIB, 12 * GIB))
    assert estimate(FLUX)["ram"] == 64 * GIB, "a group may have a limit above what there is"


@pytest.mark.parametrize("odd", [0.0, -1.0, float("nan"), float("inf")])
def test_what_was_measured_of_nothing_is_not_taken_for_a_measurement(flux: Path, card: Card, odd: float) -> None:
    card(8, link=Link(4, 16))
    plain = estimate(FLUX)
    measured._bandwidth["gpu:0"] = measured._compute[FLUX, "gpu:0"] = odd
    assert estimate(FLUX) == plain
    assert (plain["rate_source"], plain["compute_seconds"]) == ("link", None)


def test_the_rate_is_measured_or_that_of_the_link() -> None:
    assert rate_of(31e9, Link(4, 8)) == (31e9, "measured")
    assert rate_of(None, Link(4, 16)) == (pytest.approx(25.2e9, rel=0.01), "link")
    assert rate_of(None, NO_LINK) == (25e9, "assumed")


def test_the_gpu_is_the_host_s_and_its_link_is_that_of_card_and_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle card runs its link as generation 1; its lanes are those of the slot."""
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    other = replace(CARD, device="gpu:1")
    monkeypatch.setattr(estimating, "visible_gpus", lambda: {"gpu:0": first, "gpu:1": second})
    monkeypatch.setattr(estimating.mm, "get_torch_device", lambda: second)
    monkeypatch.setattr(
        estimating.sampler, "sample", lambda _reader: Sample(0.0, (CARD, other), HostUsage(0, 0, 0, None))
    )
    monkeypatch.setattr(estimating, "best_links", lambda indices: [Link(4, 16) for _ in indices])
    for width, lanes in ((8, 8), (None, 16)):
        monkeypatch.setattr(VramReader, "links", lambda _self, _index, width=width: (Link(1, width), Link(5, 16)))
        assert estimating._gpu(VramReader(Nvml(None))) == (other, Link(4, lanes))


def test_what_has_run_is_predicted_once_it_is_gone(streamed: Load) -> None:
    model = streamed(24 * MB)
    before = estimate(MODEL)
    assert (before["loaded"], before["step_seconds"], before["rate_source"]) == (False, None, "assumed")
    settle(model)
    now = model.streamer.snapshot()
    assert estimate(MODEL)["loaded"]
    path = Path(folder_paths.get_full_path("diffusion_models", MODEL))
    model_bytes = cut(read_tensors(path)).outline.model_bytes
    assert measured_by(full_status(), path, model_bytes) == now.compute_seconds, "the command finds it in the status"
    assert measured_by(full_status(), path, 3 * model_bytes) is None
    mm.unload_all_models()
    told = estimate(MODEL)
    assert (told["loaded"], told["rate_source"]) == (False, "measured")
    assert told["compute_seconds"] == pytest.approx(now.compute_seconds)
    assert told["rate"] == pytest.approx(now.bandwidth_bytes_per_second)
    assert told["step_seconds"] >= told["compute_seconds"] * (1 - 1e-9)
    assert (told["vram"], told["reserve"]) == (24 * MB, 0)


def test_what_the_host_has_loaded_itself_is_loaded(native: Any, virtual_device: Callable[[int], VirtualMemory]) -> None:
    virtual_device(24 * MB)
    mm.unload_all_models()
    assert not estimate(MODEL)["loaded"]
    sample(native)
    assert estimate(MODEL)["loaded"]


def test_without_a_gpu_there_is_no_estimate(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimating, "visible_gpus", dict)
    with pytest.raises(RefusedError, match="there is no GPU") as refused:
        estimate(MODEL)
    assert refused.value.code == 409


# --- the route -------------------------------------------------------------------------------------------------------


def get(host: HeadlessHost, **query: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", host.port, timeout=30)
    connection.request("GET", f"{ROUTE}?{urllib.parse.urlencode(query)}")
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    return answer.status, body


@pytest.fixture
def damaged(two_gpus: HeadlessHost) -> Iterator[str]:
    path = two_gpus.models("diffusion_models") / "damaged.safetensors"
    path.write_bytes(b"\x09\0\0\0\0\0\0\0{")
    yield path.name
    path.unlink()


def test_the_route_tells_of_a_file_until_it_is_loaded(two_gpus: HeadlessHost) -> None:
    free(two_gpus)
    code, told = get(two_gpus, folder="diffusion_models", name=demo.UNET)
    assert (code, told["name"], told["device"], told["loaded"]) == (200, demo.UNET, "gpu:0", False)
    assert told["missing_bytes"] == 0
    again = get(two_gpus, name=demo.UNET)[1]
    assert {**again, "ram_available": told["ram_available"]} == told, "both folders, as Streamed Model Loader looks"
    demo.sample(two_gpus, demo.api_prompt(TINY, demo.OURS, 11))
    assert get(two_gpus, name=demo.UNET)[1]["loaded"]
    free(two_gpus)


def test_the_route_refuses_by_name(two_gpus: HeadlessHost, damaged: str) -> None:
    folder = "diffusion_models"
    assert get(two_gpus, folder=folder, name="none.safetensors") == (
        404,
        {"error": "none.safetensors: there is no such file in diffusion_models"},
    )
    beside = two_gpus.models("loras") / demo.LORA
    assert beside.is_file()
    for name in ("", f"../loras/{demo.LORA}", str(beside), f"./{demo.UNET}", f"x/../{demo.UNET}", "\0"):
        assert get(two_gpus, folder=folder, name=name)[0] == 404
    assert get(two_gpus, folder="loras", name=demo.LORA)[0] == 400
    for limit in ("-1", "nan", "inf", "x"):
        assert get(two_gpus, name=demo.UNET, vram_limit_gb=limit)[0] == 400
    code, answer = get(two_gpus, folder=folder, name=damaged)
    assert code == 422
    assert answer["error"] == f"{damaged}: its header cannot be read; the file ends within it"
