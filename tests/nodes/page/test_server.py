"""The pack in a real ComfyUI server, used as a headless client uses it: API prompts and routes."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prompts import SETTINGS
from servers import TINY, free, started

from tools import demo
from tools.checkpoints import write_flux
from tools.host import HeadlessHost, PromptFailed, PromptInterrupted, PromptRejected

READY = "ready to stream"
# As it is saved on a machine with four GPUs.
PLACEMENT: dict[str, Any] = {
    "devices": "gpu:3,gpu:1,gpu:0,gpu:2",
    "split": "ratio",
    "ratio": "40,30,20,10",
    "clip_device": "gpu:7",
    "vae_device": "gpu:31",
    "on_missing": "fallback",
}
LINE_EVENT = "weightstream.line"
PLAN = re.compile(r"a step streamed in \d+ segments")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeadlessHost]:
    with started(tmp_path_factory.mktemp("host"), "1x24MB") as host:
        yield host


def prompt(seed: int, **model_inputs: Any) -> dict[str, Any]:
    result = copy.deepcopy(demo.api_prompt(TINY, demo.OURS, seed))
    result["model"]["inputs"].update(model_inputs)
    return result


def settings_prompt(seed: int, **changes: Any) -> dict[str, Any]:
    """The host's own loader, and our settings behind it."""
    result = demo.api_prompt(TINY, demo.THEIRS, seed)
    inputs = {"model": ["model", 0], **SETTINGS, **changes}
    result["settings"] = {"class_type": "WeightStreamOffloadSettings", "inputs": inputs}
    result["lora"]["inputs"]["model"] = ["settings", 0]
    return result


def placed_prompt(seed: int, **changes: Any) -> dict[str, Any]:
    """A MODEL and a CLIP that go through the placement."""
    result = demo.api_prompt(TINY, demo.OURS, seed)
    inputs = {"model": ["model", 0], "clip": ["clip", 0], **changes}
    result["placement"] = {"class_type": "WeightStreamGPUPlacement", "inputs": inputs}
    result["lora"]["inputs"]["model"] = ["placement", 0]
    result["text"]["inputs"]["clip"] = ["placement", 1]
    return result


def streamed_model(host: HeadlessHost) -> dict[str, Any]:
    (model,) = demo.read_status(host)["models"]
    return model


def used(device: dict[str, Any]) -> int:
    """Bytes of a device that somebody has."""
    return device["total"] - device["free"]


def test_the_node_is_there_with_its_inputs(host: HeadlessHost) -> None:
    info = host.get(f"/object_info/{demo.OURS}")[demo.OURS]
    theirs = host.get(f"/object_info/{demo.THEIRS}")[demo.THEIRS]
    assert info["category"] == "weightstream"
    assert info["display_name"] == "Streamed Model Loader"
    assert list(info["input"]["required"]) == list(theirs["input"]["required"])
    assert list(info["input"]["optional"]) == ["vram_limit_gb"]
    assert info["output"] == ["MODEL", "CLIP", "VAE"]


def test_a_prompt_converts_by_changing_the_class_type(host: HeadlessHost) -> None:
    theirs = demo.api_prompt(TINY, demo.THEIRS, 5)
    ours = copy.deepcopy(theirs)
    ours["model"]["class_type"] = demo.OURS
    demo.sample(host, demo.api_prompt(TINY, demo.THEIRS, 4))
    expected = demo.sample(host, theirs).latent
    assert demo.sample(host, ours).latent == expected
    assert streamed_model(host)["counters"]["misses"] == 0


def test_the_same_workflow_twice_loads_and_places_once(host: HeadlessHost) -> None:
    host.run(prompt(10))
    before = host.log
    first = streamed_model(host)
    host.run(prompt(11))
    after = host.log[len(before) :]
    assert READY in before
    assert READY not in after
    assert not PLAN.search(after)
    second = streamed_model(host)
    assert second["counters"]["steps"] == first["counters"]["steps"] + demo.STEPS
    assert second["counters"]["copies"] == first["counters"]["copies"] + demo.STEPS * second["segments"]


def test_one_log_line_says_the_plan(host: HeadlessHost) -> None:
    host.run(prompt(12))
    lines = [line for line in host.log.splitlines() if PLAN.search(line)]
    assert lines
    # What a step was measured to take stands there too, once the first has run.
    assert re.search(r"MiB on the device: .*; a step in \S+ s, .*; \S+ (Mi)?B from page-locked memory", lines[-1])


def test_the_node_shows_its_line_with_the_plan_behind_it(host: HeadlessHost) -> None:
    """As the page gets it: binary messages of type 3 (text) with the node's id in front, and an event with values."""
    lines: list[dict[str, object]] = []

    async def listen() -> list[tuple[str, str]]:
        address = f"{host.url.replace('http', 'ws')}/ws?clientId=listener"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            await asyncio.to_thread(host.run, prompt(30))
            texts = []
            with contextlib.suppress(asyncio.TimeoutError):
                while True:
                    message = await asyncio.wait_for(socket.receive(), timeout=1)
                    if message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == struct.pack(">I", 3):
                        (length,) = struct.unpack(">I", message.data[4:8])
                        node, text = message.data[8 : 8 + length], message.data[8 + length :]
                        texts.append((node.decode(), text.decode()))
                    elif message.type == aiohttp.WSMsgType.TEXT and json.loads(message.data)["type"] == LINE_EVENT:
                        lines.append(json.loads(message.data)["data"])
            return texts

    texts = asyncio.run(listen())
    assert [node for node, _ in texts] == ["model"] * len(texts)
    shown = {text for _, text in texts}
    assert {line["text"] for line in lines} <= shown
    assert all(line["node"] == "model" for line in lines)
    assert re.search(r"^\S+ s/step · (hardly any|\d+ %) waiting for the bus", str(lines[-1]["text"]))
    assert any(PLAN.search(detail) and "page-locked" in detail for detail in lines[-1]["details"])


def test_a_limit_below_one_block_fails_that_node_by_name(host: HeadlessHost) -> None:
    with pytest.raises(PromptFailed, match=r"too small for demo-flux\.safetensors") as caught:
        host.run(prompt(13, vram_limit_gb=0.001))
    assert caught.value.node_id == "model"
    host.run(prompt(14))


def test_a_truncated_file_fails_by_name_and_the_next_prompt_works(host: HeadlessHost) -> None:
    whole = (host.models("diffusion_models") / demo.UNET).read_bytes()
    (host.models("diffusion_models") / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PromptFailed, match=r"short\.safetensors: .* It is truncated; download it again") as caught:
        host.run(prompt(15, unet_name="short.safetensors"))
    assert caught.value.node_id == "model"
    host.run(prompt(16))


def test_free_gives_the_memory_back_and_the_next_prompt_streams_again(host: HeadlessHost) -> None:
    expected = demo.sample(host, prompt(17)).latent
    status = free(host)
    assert [used(device) for device in status["devices"]] == [0]
    assert demo.sample(host, prompt(17)).latent == expected


def test_an_interrupted_prompt_and_a_good_one_after_it(host: HeadlessHost) -> None:
    expected = demo.sample(host, prompt(18)).latent
    long = prompt(18)
    long["sampler"]["inputs"]["steps"] = 2000
    steps = streamed_model(host)["counters"]["steps"]
    prompt_id = host.submit(long)
    give_up = time.monotonic() + 60
    while streamed_model(host)["counters"]["steps"] < steps + 5 and time.monotonic() < give_up:
        time.sleep(0.02)
    host.interrupt()
    with pytest.raises(PromptInterrupted):
        host.wait(prompt_id, timeout_s=60)
    # The host's cache would answer a prompt that it has run.
    free(host)
    assert demo.sample(host, prompt(18)).latent == expected


def test_queued_prompts_of_two_models_that_do_not_fit_together(host: HeadlessHost) -> None:
    write_flux(host.models("diffusion_models") / "other.safetensors", seed=9)

    def of(model: str, loader: str, seed: int) -> dict[str, Any]:
        result = prompt(seed, unet_name=model)
        result["model"]["class_type"] = loader
        return result

    pairs = [(demo.UNET, 40), ("other.safetensors", 41), (demo.UNET, 42), ("other.safetensors", 43)]
    expected = [demo.sample(host, of(model, demo.THEIRS, seed)).latent for model, seed in pairs]
    assert expected[0] != expected[1]
    queued = [host.submit(of(model, demo.OURS, seed)) for model, seed in pairs]
    for prompt_id, latent in zip(queued, expected, strict=True):
        (saved,) = host.wait(prompt_id)["outputs"]["save"]["latents"]
        assert demo.read_latent(host.output_file(saved)) == latent
    (device,) = demo.read_status(host)["devices"]
    assert 0 < used(device) <= device["total"]


@pytest.mark.parametrize("mode", ["auto", "stream", "sync"])
def test_a_model_of_the_hosts_loader_streams_through_the_settings(host: HeadlessHost, mode: str) -> None:
    free(host)
    expected = demo.sample(host, demo.api_prompt(TINY, demo.THEIRS, 50)).latent
    assert demo.sample(host, settings_prompt(50, mode=mode)).latent == expected
    model = streamed_model(host)
    assert model["name"] == demo.UNET
    assert model["mode"] == ("synchronous" if mode == "sync" else "streamed")
    assert model["counters"]["steps"] == demo.STEPS
    assert model["counters"]["streamed_bytes"] > 0
    assert (model["resident_bytes"] == 0) is (mode == "stream")


def test_settings_that_are_off_leave_the_model_as_it_is(host: HeadlessHost) -> None:
    free(host)
    expected = demo.sample(host, demo.api_prompt(TINY, demo.THEIRS, 51)).latent
    assert demo.sample(host, settings_prompt(51, mode="off")).latent == expected
    assert demo.read_status(host)["models"] == []


def test_what_was_saved_before_there_was_packing_has_its_values_in_their_places(host: HeadlessHost) -> None:
    """A workflow's values are in the order of the widgets; an API prompt names them."""
    inputs = host.get("/object_info/WeightStreamOffloadSettings")["WeightStreamOffloadSettings"]["input"]
    assert [*inputs["required"]] == [name for name in SETTINGS if name != "packing"]
    assert [*inputs["optional"]] == ["model", "clip", "packing", "preset"]
    ours = settings_prompt(54)
    del ours["settings"]["inputs"]["packing"]
    free(host)
    host.run(ours)
    assert streamed_model(host)["mode"] == "streamed"


def test_settings_that_do_not_exist_are_refused(host: HeadlessHost) -> None:
    free(host)
    host.run(settings_prompt(52))
    counters = streamed_model(host)["counters"]
    for name, value, kind in (
        ("mode", "nonsense", "value_not_in_list"),
        ("pin_memory", "perhaps", "value_not_in_list"),
        ("packing", "zip", "value_not_in_list"),
        ("copy_streams", 99, "value_bigger_than_max"),
        ("prefetch_depth", -1, "value_smaller_than_min"),
        ("vram_limit_gb", "much", "invalid_input_type"),
    ):
        with pytest.raises(PromptRejected) as caught:
            host.submit(settings_prompt(53, **{name: value}))
        (error,) = caught.value.node_errors["settings"]["errors"]
        assert error["type"] == kind
        assert error["extra_info"]["input_name"] == name
    assert streamed_model(host)["counters"] == counters
    host.run(settings_prompt(53))
    assert streamed_model(host)["counters"]["steps"] == counters["steps"] + demo.STEPS


def test_a_text_encoder_streams_through_the_settings(tmp_path: Path) -> None:
    """A third of CLIP-L lies outside of its blocks, so that it needs more room than the small FLUX has here."""
    ours = settings_prompt(55, clip=["clip", 0])
    ours["text"]["inputs"]["clip"] = ["settings", 1]
    with started(tmp_path, "1x120MB") as host:
        expected = demo.sample(host, demo.api_prompt(TINY, demo.THEIRS, 55)).latent
        assert demo.sample(host, ours).latent == expected
        models = {model["name"]: model for model in demo.read_status(host)["models"]}
    assert models.keys() == {demo.UNET, demo.CLIP}
    encoder = models[demo.CLIP]
    assert encoder["counters"]["steps"] == 1
    assert encoder["counters"]["streamed_bytes"] > 0
    file = tmp_path / "models" / "text_encoders" / demo.CLIP
    assert encoder["device_peak_bytes"] <= encoder["device_budget_bytes"] < file.stat().st_size


def test_a_placement_of_four_gpus_runs_on_one(host: HeadlessHost) -> None:
    demo.sample(host, demo.api_prompt(TINY, demo.THEIRS, 60))
    expected = demo.sample(host, demo.api_prompt(TINY, demo.THEIRS, 61)).latent
    assert demo.sample(host, placed_prompt(61, **PLACEMENT)).latent == expected
    missing = "gpu:3, gpu:1, gpu:2, gpu:7, gpu:31 are not there (this machine has gpu:0)"
    assert f"GPU Placement: {missing}; MODEL on gpu:0; CLIP stays where its loader put it" in host.log
    assert demo.sample(host, placed_prompt(61)).latent == expected, "its inputs are optional"


def test_a_placement_that_must_not_fall_back_fails_by_name(host: HeadlessHost) -> None:
    with pytest.raises(PromptFailed, match=r"are not there \(this machine has gpu:0\); choose among these") as caught:
        host.run(placed_prompt(62, **{**PLACEMENT, "on_missing": "error"}))
    assert caught.value.node_id == "placement"


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"devices": "gpux"}, "custom_validation_failed", "'gpux' is no GPU; expected gpu:0, cuda:0 or 0, or a list"),
        ({"devices": "gpux"}, "custom_validation_failed", "(this machine has gpu:0)"),
        ({"clip_device": "gpu:x"}, "value_not_in_list", "'gpu:x' not in ['default', 'cpu', 'gpu:0'"),
        ({"on_missing": "ignore"}, "value_not_in_list", "'ignore' not in"),
    ],
)
def test_a_placement_that_cannot_be_right_is_refused(
    host: HeadlessHost, changes: dict[str, str], kind: str, text: str
) -> None:
    with pytest.raises(PromptRejected) as caught:
        host.submit(placed_prompt(63, **{**PLACEMENT, **changes}))
    errors = caught.value.node_errors["placement"]["errors"]
    assert [error["type"] for error in errors] == [kind], "once, and not for each input"
    assert text in errors[0]["details"]


def runs_on(host: HeadlessHost) -> None:
    """A model that was placed on four GPUs gives the host's own latent, and so does one on ``gpu:1`` alone."""
    demo.sample(host, demo.api_prompt(TINY, demo.THEIRS, 64))
    expected = demo.sample(host, demo.api_prompt(TINY, demo.THEIRS, 65)).latent
    assert demo.sample(host, placed_prompt(65, **PLACEMENT)).latent == expected
    assert demo.sample(host, placed_prompt(65, devices="gpu:1", clip_device="gpu:1")).latent == expected


def test_a_placement_of_four_gpus_runs_on_two(two_gpus: HeadlessHost) -> None:
    free(two_gpus)
    before = len(two_gpus.log)
    runs_on(two_gpus)
    assert used(demo.read_status(two_gpus)["devices"][1]) > 0
    said = two_gpus.log[before:]
    assert re.search(r"in (runs|turn): \d+ blocks .* on gpu:\d, \d+ blocks .* on gpu:\d", said)
    assert "GPU Placement: MODEL on gpu:1; CLIP on gpu:1" in said


def test_a_placement_of_four_gpus_runs_on_none(tmp_path: Path) -> None:
    with started(tmp_path, "") as host:
        runs_on(host)
        assert demo.read_status(host)["devices"] == []
        assert "placement is not available here, there is no GPU; everything stays" in host.log


def test_the_demo_holds(tmp_path: Path) -> None:
    environment = {**os.environ, "WEIGHTSTREAM_VIRTUAL": "", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, demo.__file__, "--folder", str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["bit_identical"] is True
    assert summary["misses"] == 0
    assert summary["steps"] == 2 * demo.STEPS, "of the prompt that loads, and of the one that is compared"
    assert summary["streamed_bytes"] > 0
