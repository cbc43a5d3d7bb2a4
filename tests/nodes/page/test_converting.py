"""Converted prompts run in a real ComfyUI server and give what hand-made ones give; and the route that converts."""

from __future__ import annotations

import copy
import dataclasses
import http.client
import json
from collections.abc import Mapping
from typing import Any

import pytest
from servers import TINY, free
from weightstream.streaming.workflows.convert import convert
from weightstream.streaming.workflows.kinds import LOADER, PLACEMENT, SETTINGS, Kind

from tools import demo
from tools.checkpoints import FLUX_SIZES, TensorSpec, clip_l_tensors, flux_tensors, write_checkpoint
from tools.host import HeadlessHost
from tools.serve import VAE, small_vae_tensors
from tools.workflow import choices, inputs_of, is_widget

ROUTE = "/weightstream/v1/convert"
DISTORCH = "UNETLoaderDisTorch2MultiGPU"
CHECKPOINT = "demo-checkpoint.safetensors"
SEED = 90


@pytest.fixture(scope="module")
def host(two_gpus: HeadlessHost) -> HeadlessHost:
    """The server, with a VAE and a checkpoint too; its first sampling in a process is not compared with."""
    write_checkpoint(two_gpus.models("vae") / VAE, small_vae_tensors(), seed=4)
    specs = [renamed(spec, "model.diffusion_model.") for spec in flux_tensors(FLUX_SIZES["tiny"])]
    specs += [renamed(spec, "text_encoders.clip_l.transformer.") for spec in clip_l_tensors()]
    write_checkpoint(two_gpus.models("checkpoints") / CHECKPOINT, specs, seed=5)
    demo.sample(two_gpus, demo.api_prompt(TINY, demo.THEIRS, SEED - 1))
    return two_gpus


def renamed(spec: TensorSpec, prefix: str) -> TensorSpec:
    return dataclasses.replace(spec, name=prefix + spec.name)


def prompt(**changed: dict[str, Any]) -> dict[str, Any]:
    """The demo's prompt with some nodes exchanged for others."""
    return {**copy.deepcopy(demo.api_prompt(TINY, demo.THEIRS, SEED)), **changed}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def with_loader(model: dict[str, Any], clip: dict[str, Any] | None = None, **more: dict[str, Any]) -> dict[str, Any]:
    return prompt(model=model, **({"clip": clip} if clip else {}), **more)


def leading(wanted: Mapping[str, Any], **links: list[Any]) -> dict[str, Any]:
    """A prompt in which the named inputs (``lora_model``) come from elsewhere."""
    changed = copy.deepcopy(dict(wanted))
    for name, link in links.items():
        number, _, inner = name.partition("_")
        changed[number]["inputs"][inner] = link
    return changed


UNET = {"unet_name": demo.UNET, "weight_dtype": "default"}
CLIP = {"clip_name": demo.CLIP, "type": "stable_diffusion"}
AUTO = {"mode": "auto", "copy_streams": 0, "prefetch_depth": 0, "vram_limit_gb": 0.0, "pin_memory": "auto"}
AUTO |= {"pinned_limit_gb": 0.0, "reserve_vram_gb": 0.0}
OURS = node("WeightStreamModelLoader", **UNET)
PLACED = leading(
    with_loader(
        OURS,
        placed=node(
            "WeightStreamGPUPlacement", model=["model", 0], clip=["clip", 0], devices="gpu:0,gpu:1", clip_device="gpu:1"
        ),
    ),
    lora_model=["placed", 0],
    text_clip=["placed", 1],
)
STREAMED_CHECKPOINT = leading(
    with_loader(
        node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        set=node("WeightStreamOffloadSettings", model=["model", 0], **AUTO),
    ),
    lora_model=["set", 0],
)

# Each: what a user has, and the same for this pack, written by hand.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Load Diffusion Model": (with_loader(node("UNETLoader", **UNET)), with_loader(OURS)),
    "Load Checkpoint": (with_loader(node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)), STREAMED_CHECKPOINT),
    "MultiGPU": (
        with_loader(
            node("UNETLoaderMultiGPU", **UNET, device="cuda:1"), node("CLIPLoaderMultiGPU", **CLIP, device="cpu")
        ),
        leading(
            with_loader(
                OURS,
                node("CLIPLoader", **CLIP, device="cpu"),
                placed=node("WeightStreamGPUPlacement", model=["model", 0], devices="gpu:1"),
            ),
            lora_model=["placed", 0],
        ),
    ),
    "DisTorch2 with another GPU": (
        with_loader(
            node(DISTORCH, **UNET, compute_device="cuda:0", virtual_vram_gb=1, donor_device="cuda:1"),
            node("CLIPLoaderMultiGPU", **CLIP, device="cuda:1"),
        ),
        PLACED,
    ),
    "DisTorch2 with bytes": (
        with_loader(node(DISTORCH, **UNET, compute_device="cuda:0", expert_mode_allocations="cuda:0,500gb;cpu,*")),
        with_loader(node("WeightStreamModelLoader", **UNET, vram_limit_gb=500.0)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_converted_prompt_gives_the_latents_of_a_hand_made_one(host: HeadlessHost, name: str) -> None:
    theirs, by_hand = CASES[name]
    converted = convert(theirs)
    assert converted.changed
    free(host)
    expected = demo.sample(host, by_hand).latent
    free(host)
    assert demo.sample(host, converted.workflow).latent == expected
    assert demo.read_status(host)["models"], "it is streamed"
    assert not host_knows(host, theirs) or demo.sample(host, theirs).latent == expected


def host_knows(host: HeadlessHost, wanted: Mapping[str, Any]) -> bool:
    """Whether the host has the classes of a prompt: those of the archived pack it has not."""
    known = host.get("/object_info")
    return all(one["class_type"] in known for one in wanted.values())


@pytest.mark.parametrize("kind", [LOADER, SETTINGS, PLACEMENT], ids=lambda kind: kind.title)
def test_the_classes_are_described_as_the_host_has_them(host: HeadlessHost, kind: Kind) -> None:
    """What was added to a class since may only come behind, with a default."""
    info = host.get(f"/object_info/{kind.name}")[kind.name]
    assert info["display_name"] == kind.title
    inputs = inputs_of(info)
    widgets = [name for name, (type_, options) in inputs.items() if is_widget(type_, options)]
    assert widgets[: len(kind.widgets)] == list(kind.widgets)
    assert not set(widgets[len(kind.widgets) :]) & set(info["input"].get("required", {}))
    for name, value in list(kind.widgets.items()):
        type_, options = inputs[name]
        offered = choices(type_, options)
        assert name == "unet_name" or options.get("default", offered[0] if offered else None) == value
        assert name in kind.optional or name in info["input"]["required"]
    sockets = [(name, type_) for name, (type_, options) in inputs.items() if not is_widget(type_, options)]
    assert sockets == [(socket.name, socket.type) for socket in kind.sockets]
    assert info["output"] == [socket.type for socket in kind.outputs]


def test_the_route_converts(host: HeadlessHost) -> None:
    answer = host.post(ROUTE, CASES["Load Diffusion Model"][0])
    assert answer["changed"] is True
    assert answer["workflow"] == convert(CASES["Load Diffusion Model"][0]).workflow
    [note] = answer["notes"]
    assert (note["code"], note["weight"], note["node"], note["kind"]) == ("loader", "changed", "model", "UNETLoader")


def refused(host: HeadlessHost, body: bytes) -> str:
    """Why the route refuses what comes; the answer is JSON that a page can read."""
    connection = http.client.HTTPConnection("127.0.0.1", host.port, timeout=30)
    connection.request("POST", ROUTE, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 400
    error = json.loads(answer.read())["error"]
    connection.close()
    return error


@pytest.mark.parametrize("body", [b"{", b"[]", b"[" * 100_000, b"\xff", b"{}"])
def test_the_route_refuses_what_is_no_workflow(host: HeadlessHost, body: bytes) -> None:
    assert refused(host, body).startswith("it is no ")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_the_route_refuses_numbers_that_json_cannot_carry(host: HeadlessHost, number: str) -> None:
    """The answer would have them, and no page could read it."""
    body = json.dumps(CASES["Load Diffusion Model"][0]).replace(str(SEED), number)
    assert f"it has the number {number}," in refused(host, body.encode())
