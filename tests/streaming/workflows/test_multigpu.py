"""Workflows of ComfyUI-MultiGPU and DisTorch2, in the shapes in which that pack's nodes are saved."""

from __future__ import annotations

from typing import Any

import pytest
from weightstream.streaming.workflows.allocations import Allocation, Measure, read_allocation
from weightstream.streaming.workflows.convert import Conversion, convert
from weightstream.streaming.workflows.graph import LINKED
from weightstream.streaming.workflows.multigpu import find
from workflow_files import check_links, node, workflow

OURS, SETTINGS, PLACEMENT = "WeightStreamModelLoader", "WeightStreamOffloadSettings", "WeightStreamGPUPlacement"


def flux(unet: str, unet_values: list[Any], clip_device: str = "cpu", vae_device: str = "cuda:1") -> dict[str, Any]:
    """As that pack's own example for FLUX."""
    return workflow(
        node(1, unet, unet_values),
        node(2, "DualCLIPLoaderMultiGPU", ["t5xxl.safetensors", "clip_l.safetensors", "flux", clip_device]),
        node(3, "VAELoaderMultiGPU", ["ae.safetensors", vae_device]),
        node(4, "CLIPTextEncode", ["a river"], clip=(2, 0)),
        node(5, "KSampler", [7, "fixed"], model=(1, 0), positive=(4, 0)),
        node(6, "VAEDecode", [], samples=(5, 0), vae=(3, 0)),
    )


def widgets(graph: dict[str, Any], kind: str) -> list[Any]:
    [found] = [one["widgets_values"] for one in graph["nodes"] if one["type"] == kind]
    return found


def links(graph: dict[str, Any]) -> set[tuple[str, str]]:
    """Which class leads to which, with the name of the input."""
    nodes = {one["id"]: one for one in graph["nodes"]}
    return {
        (nodes[source]["type"], f"{nodes[target]['type']}.{nodes[target]['inputs'][place]['name']}")
        for _, source, _, target, place, _ in graph["links"]
    }


def said(conversion: Conversion) -> dict[str, str]:
    return {note.code: note.text for note in conversion.notes}


def check(conversion: Conversion) -> None:
    check_links(conversion.workflow)
    assert not convert(conversion.workflow).changed


def test_devices_become_one_placement_behind_the_model() -> None:
    found = convert(flux("UNETLoaderMultiGPU", ["flux.safetensors", "default", "cuda:0"], clip_device="cuda:1"))
    graph = found.workflow
    assert widgets(graph, OURS) == ["flux.safetensors", "default", 0.0]
    assert widgets(graph, "DualCLIPLoader") == ["t5xxl.safetensors", "clip_l.safetensors", "flux", "default"]
    assert widgets(graph, "VAELoader") == ["ae.safetensors"]
    assert widgets(graph, PLACEMENT) == ["gpu:0", "auto", "", "gpu:1", "gpu:1", "fallback", "exact"]
    assert links(graph) == {
        (OURS, f"{PLACEMENT}.model"),
        ("DualCLIPLoader", f"{PLACEMENT}.clip"),
        ("VAELoader", f"{PLACEMENT}.vae"),
        (PLACEMENT, "CLIPTextEncode.clip"),
        (PLACEMENT, "KSampler.model"),
        (PLACEMENT, "VAEDecode.vae"),
        ("CLIPTextEncode", "KSampler.positive"),
        ("KSampler", "VAEDecode.samples"),
    }
    check(found)


def test_the_devices_that_comfyui_uses_anyway_need_no_placement() -> None:
    graph = convert(flux("UNETLoaderMultiGPU", ["f", "default", "cuda:0"], "cpu", "cuda:0")).workflow
    assert PLACEMENT not in {one["type"] for one in graph["nodes"]}
    assert widgets(graph, "DualCLIPLoader")[-1] == "cpu", "the host's loader can do that itself"


# What comes out of a DisTorch2 loader: devices, split and ratio of the placement (None: there is none), the loader's
# limit, and the codes of what is said beside the change.
DISTORCH_2 = [
    (("cuda:0", 14, "cpu", ""), None, 0.0, {"virtual-vram"}),
    (("cuda:0", 0, "cpu", ""), None, 0.0, set()),
    (("cuda:0", 9, "cuda:1", ""), ["gpu:0,gpu:1", "auto", ""], 0.0, {"virtual-vram", "donor"}),
    (("cuda:2", 9, "cpu", ""), ["gpu:2", "auto", ""], 0.0, {"virtual-vram"}),
    (("cpu", 9, "cpu", ""), None, 0.0, {"virtual-vram", "compute-cpu"}),
    (("xpu:0", 9, "cpu", ""), None, 0.0, {"virtual-vram", "device"}),
    (("cuda:0", 4, "cpu", "cuda:0,2.5gb;cpu,*"), None, 2.5, {"limit"}),
    (("cuda:0", 4, "cpu", "cuda:1,512m;cuda:0,*"), ["gpu:0,gpu:1", "auto", ""], 0.0, {"by-memory"}),
    (("cuda:0", 4, "cpu", "cuda:0,4gb;cuda:1,2gb;cpu,*"), ["gpu:0,gpu:1", "ratio", "4,2"], 0.0, {"ratio"}),
    (("cuda:0", 4, "cpu", "cuda:1,30%;cuda:0,60%;cpu,10%"), ["gpu:0,gpu:1", "ratio", "60,30"], 0.0, {"ratio"}),
    (("cuda:0", 4, "cpu", "cuda:0,25%;cpu,75%"), None, 0.0, {"by-memory"}),
    (("cuda:0", 4, "cpu", "cuda:0,0.1;cuda:1,0.3;cpu,0.5"), ["gpu:0,gpu:1", "auto", ""], 0.0, {"by-memory"}),
    (("cuda:0", 4, "cpu", "half of it"), None, 0.0, {"unread"}),
    (("cuda:0", 4, "cpu", "cuda:0,0.0004%;cuda:1,4%"), ["gpu:0,gpu:1", "ratio", "0.001,4"], 0.0, {"ratio"}),
    (("cuda:0", 4, "cpu", "cuda:0,1234567%;cuda:1,1%"), ["gpu:0,gpu:1", "ratio", "1234567,1"], 0.0, {"ratio"}),
    (("cuda:0", 4, "cpu", "cuda:0,5000gb;cpu,*"), None, 1024.0, {"limit"}),
    (("cuda:0", 4, "cpu", f"cuda:0,{'9' * 400}gb;cpu,*"), None, 0.0, {"unread"}),
    (("cuda:0", -4, "cpu", ""), None, 0.0, {"unread"}),
    (("cuda:0", float("inf"), "cpu", ""), None, 0.0, {"unread"}),
]


@pytest.mark.parametrize(("asked", "placed", "limit", "codes"), DISTORCH_2, ids=[str(case[0]) for case in DISTORCH_2])
def test_what_distorch2_asks_for(asked: tuple[Any, ...], placed: Any, limit: float, codes: set[str]) -> None:
    graph = workflow(
        node(1, "UNETLoaderDisTorch2MultiGPU", ["f", "default", *asked, True]), node(2, "KSampler", [], model=(1, 0))
    )
    found = convert(graph)
    there = [one["widgets_values"][:3] for one in found.workflow["nodes"] if one["type"] == PLACEMENT]
    assert there == ([] if placed is None else [placed])
    assert widgets(found.workflow, OURS) == ["f", "default", limit]
    assert set(said(found)) - {"loader", "placement"} == codes
    check(found)


def test_a_limit_goes_to_the_settings_where_the_loader_is_another() -> None:
    values = ["c", "cuda:0", 4.0, "cpu", "cuda:0,3gb;cpu,*", True]
    graph = workflow(node(1, "CheckpointLoaderSimpleDisTorch2MultiGPU", values), node(2, "KSampler", [], model=(1, 0)))
    found = convert(graph)
    assert widgets(found.workflow, "CheckpointLoaderSimple") == ["c"]
    assert widgets(found.workflow, SETTINGS)[3] == 3.0
    check(found)


def test_other_gpus_of_the_first_distorch_are_all_gpus() -> None:
    graph = workflow(
        node(1, "UnetLoaderGGUFDisTorchMultiGPU", ["f.gguf", "cuda:0", 4, True, ""]),
        node(2, "KSampler", [], model=(1, 0)),
    )
    found = convert(graph)
    assert widgets(found.workflow, PLACEMENT)[0] == ""
    assert "devices=all" in said(found)["placement"]
    assert links(found.workflow) == {
        ("UnetLoaderGGUF", f"{SETTINGS}.model"),
        (SETTINGS, f"{PLACEMENT}.model"),
        (PLACEMENT, "KSampler.model"),
    }
    check(found)


def test_a_text_encoder_with_virtual_vram_streams_beside_the_model() -> None:
    graph = workflow(
        node(1, "UNETLoaderDisTorch2MultiGPU", ["q.safetensors", "default", "cuda:0", 14, "cpu", "", True]),
        node(2, "CLIPLoaderDisTorch2MultiGPU", ["vl.safetensors", "qwen_image", "cuda:1", 3.9, "cpu", "", False]),
        node(3, "CLIPTextEncode", ["a river"], clip=(2, 0)),
        node(4, "KSampler", [7, "fixed"], model=(1, 0), positive=(3, 0)),
    )
    found = convert(graph)
    assert links(found.workflow) == {
        (OURS, f"{SETTINGS}.model"),
        ("CLIPLoader", f"{SETTINGS}.clip"),
        (SETTINGS, f"{PLACEMENT}.model"),
        (SETTINGS, f"{PLACEMENT}.clip"),
        (PLACEMENT, "CLIPTextEncode.clip"),
        (PLACEMENT, "KSampler.model"),
        ("CLIPTextEncode", "KSampler.positive"),
    }
    assert widgets(found.workflow, "CLIPLoader") == ["vl.safetensors", "qwen_image", "default"]
    assert widgets(found.workflow, PLACEMENT)[3] == "gpu:1"
    check(found)


@pytest.mark.parametrize(
    ("kind", "values", "streams"),
    [
        ("CheckpointLoaderAdvancedMultiGPU", ["c", "cuda:1", "cpu", "cuda:0"], False),
        (
            "CheckpointLoaderAdvancedDisTorch2MultiGPU",
            ["c", "cuda:1", 5, "cpu", "cuda:0", 2, "cpu", "cuda:0", "", "", False, True],
            True,
        ),
    ],
)
def test_the_advanced_checkpoint_loader_places_its_parts(kind: str, values: list[Any], streams: bool) -> None:
    graph = workflow(
        node(1, kind, values),
        node(2, "CLIPTextEncode", ["a river"], clip=(1, 1)),
        node(3, "KSampler", [7, "fixed"], model=(1, 0), positive=(2, 0)),
        node(4, "VAEDecode", [], samples=(3, 0), vae=(1, 2)),
    )
    found = convert(graph)
    assert widgets(found.workflow, "CheckpointLoaderSimple") == ["c"]
    clip = "default" if streams else "cpu"
    assert widgets(found.workflow, PLACEMENT) == ["gpu:1", "auto", "", clip, "default", "fallback", "exact"]
    assert (("CheckpointLoaderSimple", f"{SETTINGS}.clip") in links(found.workflow)) == streams
    assert ("precision" in said(found)) == streams
    check(found)


def test_a_text_encoder_without_a_model_beside_it_streams_where_comfyui_puts_it() -> None:
    graph = workflow(
        node(1, "CLIPLoaderDisTorch2MultiGPU", ["c", "wan", "cuda:1", 2, "cpu", "", False]),
        node(2, "CLIPTextEncode", ["a river"], clip=(1, 0)),
    )
    found = convert(graph)
    assert "Select CLIP Device" in said(found)["alone"]
    assert links(found.workflow) == {("CLIPLoader", f"{SETTINGS}.clip"), (SETTINGS, "CLIPTextEncode.clip")}
    check(found)


def test_what_a_device_selector_says_is_read_and_the_selector_goes() -> None:
    graph = workflow(
        node(1, "DeviceSelectorMultiGPU", ["cuda:1"]),
        node(2, "UNETLoaderMultiGPU", ["f", "default", "cuda:0"], device=(1, 0)),
        node(3, "KSampler", [], model=(2, 0)),
    )
    found = convert(graph)
    assert widgets(found.workflow, PLACEMENT)[0] == "gpu:1"
    assert "DeviceSelectorMultiGPU" not in {one["type"] for one in found.workflow["nodes"]}
    assert "selector-gone" in said(found)
    check(found)


def test_what_comes_behind_a_device_keeps_its_link() -> None:
    graph = workflow(
        node(1, "DeviceSelectorMultiGPU", ["cuda:0"]),
        node(2, "PrimitiveNode", ["f"]),
        node(3, "UNETLoaderMultiGPU", ["f", "default", "cuda:0"], device=(1, 0), unet_name=(2, 0)),
    )
    found = convert(graph)
    assert found.workflow["links"] == [[2, 2, 0, 3, 0, "COMBO"]]
    check(found)


def test_a_muted_vae_does_not_go_along_with_a_model_that_runs() -> None:
    graph = flux("UNETLoaderMultiGPU", ["f", "default", "cuda:0"])
    graph["nodes"][2]["mode"] = 2
    found = convert(graph)
    assert PLACEMENT not in {one["type"] for one in found.workflow["nodes"]}
    assert "Select VAE Device" in said(found)["alone"]
    check(found)


def test_what_has_no_equal_is_said_once_for_the_wan_wrapper() -> None:
    graph = workflow(
        node(1, "WanVideoModelLoaderMultiGPU", ["m"]),
        node(2, "WanVideoSamplerMultiGPU", []),
        node(3, "Florence2ModelLoaderMultiGPU", []),
    )
    found = convert(graph)
    assert not found.changed
    assert found.workflow == graph
    assert [note.code for note in found.notes] == ["no-equal-wan", "no-equal"]
    assert "and 1 more like it" in found.notes[0].text


def test_a_prompt_is_converted_as_the_page_s_workflow_is() -> None:
    prompt = {
        "a": {
            "class_type": "UNETLoaderMultiGPU",
            "inputs": {"unet_name": "f", "weight_dtype": "default", "device": ["s", 0]},
        },
        "s": {"class_type": "DeviceSelectorMultiGPU", "inputs": {"device": "cuda:1"}},
        "v": {"class_type": "VAELoaderMultiGPU", "inputs": {"vae_name": "v", "device": "cpu"}},
        "k": {"class_type": "KSampler", "inputs": {"model": ["a", 0]}},
        "d": {"class_type": "VAEDecode", "inputs": {"vae": ["v", 0], "samples": ["k", 0]}},
    }
    found = convert(prompt).workflow
    assert "s" not in found
    assert found["a"] == {"class_type": OURS, "inputs": {"unet_name": "f", "weight_dtype": "default"}}
    assert found["v"] == {"class_type": "VAELoader", "inputs": {"vae_name": "v"}}
    assert found["1"]["inputs"] == {"model": ["a", 0], "vae": ["v", 0], "devices": "gpu:1", "vae_device": "cpu"}
    assert found["k"]["inputs"]["model"] == ["1", 0]
    assert found["d"]["inputs"]["vae"] == ["1", 2]


@pytest.mark.parametrize(
    ("text", "measure", "gpus"),
    [
        ("cuda:0,500mb;cuda:1,3.0g;cpu,5gb*", Measure.BYTES, {"gpu:0": 500 / 1024, "gpu:1": 3.0}),
        ("cuda:0,2GB;cuda:1,*", Measure.BYTES, {"gpu:0": 2.0, "gpu:1": None}),
        ("cuda:0,8%;cuda:1,8%;cpu,4%", Measure.RATIO, {"gpu:0": 8.0, "gpu:1": 8.0}),
        ("cuda,0.1;cpu,0.5", Measure.MEMORY, {"gpu:0": 0.1}),
        ("cuda:0,1gb#cuda:0;4;cpu", Measure.BYTES, {"gpu:0": 1.0}),
    ],
)
def test_allocations_in_all_three_measures(text: str, measure: Measure, gpus: dict[str, float | None]) -> None:
    assert read_allocation(text) == Allocation(measure, gpus)


@pytest.mark.parametrize("text", ["", ";", "cuda:0", "cuda:0,", "xpu:0,4gb", "cuda:0,much", "cuda:0,-1gb", "4gb"])
def test_allocations_that_cannot_be_read(text: str) -> None:
    assert read_allocation(text) is None


def test_a_value_behind_a_link_is_told() -> None:
    archived = find("UNETLoaderDisTorch2MultiGPU")
    assert archived is not None
    wish = archived.read({"compute_device": LINKED, "virtual_vram_gb": LINKED, "expert_mode_allocations": LINKED})
    assert [about["name"] for _, about in wish.notes] == [
        "compute_device",
        "expert_mode_allocations",
        "virtual_vram_gb",
    ]


@pytest.mark.parametrize(
    "values", [["c", "flux", "cpu", 4, "cpu", "", False], ["c", "flux", "cpu", 0, "cpu", "x", False]]
)
def test_a_text_encoder_on_the_cpu_does_not_stream(values: list[Any]) -> None:
    graph = workflow(node(1, "CLIPLoaderDisTorch2MultiGPU", values), node(2, "CLIPTextEncode", [], clip=(1, 0)))
    found = convert(graph)
    assert [one["type"] for one in found.workflow["nodes"]] == ["CLIPLoader", "CLIPTextEncode"]
    assert [note.code for note in found.notes] == ["host", "no-device"]


UNUSED = ["donor_device", "expert_mode_allocations"]


@pytest.mark.parametrize(
    ("kind", "values", "names"),
    [
        (
            "VAELoader",
            ["v", "cuda:0", 4, "cuda:1", "x"],
            ["virtual_vram_gb", "donor_device", "expert_mode_allocations"],
        ),
        ("ControlNetLoader", ["v", "cuda:0", 4, "cpu", ""], ["virtual_vram_gb"]),
        ("CLIPLoader", ["c", "flux", "cuda:0", 4, "cuda:1", "x"], UNUSED),
    ],
)
def test_what_a_node_asks_for_in_vain_is_told(kind: str, values: list[Any], names: list[str]) -> None:
    notes = convert(workflow(node(1, f"{kind}DisTorch2MultiGPU", [*values, True]))).notes
    assert [note.values["name"] for note in notes if note.code == "no-device"] == names
