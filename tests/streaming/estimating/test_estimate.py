"""A plan by a file's header: what is read of it, how it is cut, and what is said of machines."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from weightstream.streaming import CheckpointError, UnsupportedModelError, format_bytes
from weightstream.streaming.command_line import main
from weightstream.streaming.estimating.cards import known_model
from weightstream.streaming.estimating.cutting import Cut, cut
from weightstream.streaming.estimating.estimate import Machine, describe_model, describe_plan, measured_by, plan_for
from weightstream.streaming.estimating.tensors import Tensor, missing_bytes, read_tensors

from tools.checkpoints import FLUX_SIZES, TensorSpec, encode_header, flux_tensors

GIB = 1 << 30


def write(path: Path, specs: list[TensorSpec]) -> Path:
    """The header of a checkpoint: its tensors are never read."""
    path.write_bytes(encode_header(specs))
    return path


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("flux") / "flux1-dev.safetensors", flux_tensors(FLUX_SIZES["dev"]))


@pytest.fixture(scope="module")
def found(flux: Path) -> Cut:
    return cut(read_tensors(flux))


def test_flux_is_cut_into_its_blocks(found: Cut) -> None:
    assert found.lists == {"double_blocks": 19, "single_blocks": 38}
    assert found.outline.blocks == 57
    assert len(set(found.outline.block_kind)) == 2
    assert len(found.outline.unit_bytes) == 19 * 10 + 38 * 3
    assert found.outline.model_bytes == found.file_bytes == pytest.approx(23.8e9, rel=0.01)
    assert found.packed_share == pytest.approx(0.71)


def test_the_step_that_was_measured_is_predicted(found: Cut) -> None:
    """FLUX at 1024^2 on an H200 with 8 GB left to it: 0.328 s without packing (docs/packing.md)."""
    machine = Machine(8e9 / GIB, reserve=1.5, link=55.2, compute_seconds=0.1748)
    plan = plan_for(found, machine)
    assert plan.forecast is not None
    assert plan.forecast.seconds == pytest.approx(0.328, rel=0.05)
    [line] = [line for line in describe_plan(found, machine) if "s/step" in line]
    assert "0.17 s of compute" in line
    assert "about 0.24 s with packed weights" in line


def test_without_a_measurement_only_the_bus_s_part_is_said(found: Cut) -> None:
    machine = Machine(8, link=25)
    plan = plan_for(found, machine)
    assert plan.streamed_bytes == pytest.approx(19.3e9, rel=0.01)
    streamed = format_bytes(plan.streamed_bytes)
    assert describe_plan(found, machine) == [
        "with 8 GiB of VRAM, of which 2.5 are left to activations and others:",
        f"  each step   streams {streamed}, from 57 of 57 blocks; 4.2 GiB stay in VRAM, beside 1.3 GiB of staging",
        f"  RAM         {streamed} page-locked",
        "  the bus     0.77 s of each step at 25 GB/s; about 0.55 s with packed weights",
        "  s/step      streaming costs nothing where a step computes for 0.77 s or more; "
        "compute was not measured on this card",
    ]
    assert round(plan.streamed_bytes / GIB, 1) + 4.2 == pytest.approx(found.outline.model_bytes / GIB, abs=0.05)


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        (Machine(25), "nothing streams"),
        (Machine(1.6), "too little: 3.3 GiB are the least"),
        (Machine(8, ram=32), f"page-locked, of at most {format_bytes(int(25 * GIB))} where there are 32 GiB"),
        (Machine(8, ram=32, system="nt"), f"but at most {format_bytes(int(12.8 * GIB))} of 32 GiB may be: "),
        (Machine(8, ram=16), "which RAM does not hold: at the disk's speed"),
        (Machine(8, compute_seconds=5.0), "5 s predicted (5 s of compute)"),
        (Machine(8, limit=0.5), "activations and others, and a limit of 0.5:"),
        (Machine(8, limit=0.5), "the limit is too low: 0.8 GiB are the least"),
        (Machine(2, limit=20), "too little: 3.3 GiB are the least"),
        (Machine(2, limit=0.5), "too little: 3.3 GiB are the least"),
    ],
)
def test_what_is_said_of_other_machines(found: Cut, machine: Machine, says: str) -> None:
    assert says in "\n".join(describe_plan(found, machine))


def test_the_diffusion_model_of_a_full_checkpoint_is_planned_alone(tmp_path: Path) -> None:
    specs = [TensorSpec(f"model.diffusion_model.blocks.{block}.a.weight", (64, 64), 1.0) for block in range(4)]
    specs += [TensorSpec(f"cond_stage_model.layers.{layer}.a.weight", (64, 64), 1.0) for layer in range(9)]
    found = cut(read_tensors(write(tmp_path / "full.safetensors", specs)))
    assert found.lists == {"blocks": 4}
    assert found.file_bytes == 4 * 64 * 64 * 2


def test_a_model_in_several_files_is_read_from_each_of_them(tmp_path: Path) -> None:
    names = [f"m-{number:05}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        write(tmp_path / name, [TensorSpec(f"blocks.{number}.a.weight", (64, 64), 1.0)])
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    for path in (tmp_path / names[1], index):
        assert [tensor.name for tensor in read_tensors(path)] == ["blocks.0.a.weight", "blocks.1.a.weight"]
    (tmp_path / names[0]).unlink()
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors cannot be read"):
        read_tensors(tmp_path / names[1])


def test_float32_takes_half_in_vram_and_fp8_is_not_packed() -> None:
    half = cut([Tensor(f"blocks.{block}.a.weight", "F32", 4000) for block in range(3)])
    assert half.outline.model_bytes == 6000
    assert "ComfyUI computes in 16 bits, so it takes" in describe_model("x", half)[-1]
    fp8 = cut([Tensor(f"blocks.{block}.a.weight", "F8_E4M3", GIB) for block in range(12)])
    assert fp8.packed_share == 1.0
    assert "packed" not in "\n".join(describe_plan(fp8, Machine(8)))


def test_small_parts_stay_and_a_list_of_one_is_no_block() -> None:
    tensors = [Tensor(f"blocks.{block}.a.weight", "BF16", 100_000) for block in range(3)]
    tensors += [Tensor(f"blocks.{block}.norm.weight", "BF16", 100) for block in range(3)]
    tensors += [Tensor("time.0.weight", "BF16", 5000), Tensor("img_in.weight", "BF16", 700)]
    found = cut(tensors)
    assert found.outline.unit_bytes == (100_000,) * 3
    assert found.outline.rest_bytes == 3 * 100 + 5000 + 700


@pytest.mark.parametrize("tensors", [[], [Tensor("a.weight", "BF16", 1000), Tensor("b.0.a.weight", "BF16", 10)]])
def test_a_model_without_blocks(tensors: list[Tensor]) -> None:
    with pytest.raises(UnsupportedModelError, match="no repeated block"):
        cut(tensors)


# What a damaged file may say of its tensors.
OFFSETS = (b"[4, 0]", b"[-4, 0]", b"[0, 1e999]", b"[0, 9999999999999999999999]", b'["0", "4"]', b"[0]", b"null")
DESCRIPTION = b'{"a": {"dtype": "BF16", "shape": [2], "data_offsets": %s}}'
HEADERS = [b'{"a": 1}', *(DESCRIPTION % offsets for offsets in OFFSETS)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is no safetensors file"),
        (b"GGUF" * 8, "it is no safetensors file"),
        (struct.pack("<Q", 9) + b"{", "its header cannot be read"),
        (struct.pack("<Q", 2) + b"[]", "its header is no JSON object"),
        (struct.pack("<Q", 9) + b"{}", "its header cannot be read; the file ends within it"),
        (struct.pack("<Q", 2) + b"{}", "it lists no tensors"),
        *((struct.pack("<Q", len(text)) + text, "its header does not describe tensors") for text in HEADERS),
    ],
)
def test_files_that_have_no_header(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as error:
        read_tensors(path)
    assert str(error.value).count(str(path)) == 1


def test_the_command(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(flux), "--vram", "12", "--ram", "32", "--link", "50", "--compute", "0.3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("flux1-dev.safetensors: ")
    assert "with 12 GiB" in said
    assert "s predicted" in said
    assert main(["plan", str(flux)]) == 0
    assert capsys.readouterr().out.count("GiB of VRAM") == 4, "without a card several are told of"
    assert main(["plan", str(flux), "--url", "127.0.0.1:9"]) == 2
    assert "no ComfyUI answers" in capsys.readouterr().err
    assert main(["plan", str(flux), "--vram", "8", "--limit", "0.5"]) == 0
    assert "the limit is too low: 0.8 GiB are the least" in capsys.readouterr().out
    assert main(["plan", str(flux), "--vram", "8", "--limit", "0"]) == 0
    assert "limit" not in capsys.readouterr().out
    assert main(["plan", str(flux), "--vram", "8", "--link", "0.001"]) == 0
    assert max(map(len, capsys.readouterr().out.split())) < 30
    for odd in (["--vram", "-3"], ["--link", "1e-300"], ["--link", "0"]):
        with pytest.raises(SystemExit):
            main(["plan", str(flux), *odd])


def told(name: Any, compute: Any = 0.2, nbytes: int = 1000) -> dict[str, Any]:
    """A model as a status tells of it."""
    sizes = {"resident_bytes": nbytes // 2, "rest_bytes": nbytes // 4, "streamed_weight_bytes": nbytes // 4}
    return {"name": name, "compute_seconds": compute, **sizes}


def test_a_card_by_its_name(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(flux), "--card", "4060", "--ram", "32"]) == 0
    said = capsys.readouterr().out
    assert "RTX 4060, PCIe 4 x8, by its data; nobody has measured it:\nwith 8 GiB of VRAM" in said
    assert "at 12.6 GB/s" in said
    assert "5.8 s predicted (5.8 s of compute, estimated from an H200's for FLUX.1-dev, 1024 x 1024, cfg 1" in said
    assert main(["plan", str(flux), "--card", "geforce rtx 4060", "--compute", "9", "--link", "5"]) == 0
    said = capsys.readouterr().out
    assert "(9 s of compute)" in said
    assert "at 5 GB/s" in said
    with pytest.raises(SystemExit):
        main(["plan", str(flux), "--card", "RTX 40"])
    assert "RTX 40 is none of RTX 4060, " in capsys.readouterr().err


def test_a_model_is_known_by_its_blocks_and_its_weights(found: Cut) -> None:
    known = known_model(found)
    assert known is not None
    assert known.name == "FLUX.1-dev"
    in_fp8 = replace(found, dtypes={"F8_E4M3": found.file_bytes // 2})
    assert known_model(in_fp8) == known
    assert known_model(replace(found, dtypes={"BF16": found.file_bytes * 3 // 4})) is None, "as Chroma's"
    assert known_model(replace(found, lists={"blocks": 57})) is None


def test_what_a_running_comfyui_has_measured() -> None:
    status = {"models": [told("a"), told("b", None), told("split", 0.1, 500), told("split", 0.1, 500)]}
    found = {name: measured_by(status, Path("models", name), 1000) for name in ("a", "b", "c", "split")}
    assert found == {"a": 0.2, "b": None, "c": None, "split": None}, "a part says nothing of the whole"


def test_a_measured_model_is_known_by_the_end_of_its_path_and_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    status = {"models": [told("m", 0.1), told("flux/m", 0.2), told("wan\\2.2\\m", 0.3)]}
    for path, seconds in (("x/flux/m", 0.2), ("x/wan/2.2/m", 0.3), ("x/m", 0.1), ("x/m2", None)):
        assert measured_by(status, Path(path), 1000) == seconds
    flux = {"models": [told("flux/m", 0.2)]}
    for path in ("m", "wan/m", "aflux/m"):
        assert measured_by(flux, Path(path), 1000) is None
    loaded = (1040, 500, 2000, 250, 900, 1300, 3000)
    known = [measured_by(flux, Path("flux/m"), nbytes) is not None for nbytes in loaded]
    assert known == [True] * 4 + [False] * 3, "in another dtype it is larger or smaller, and the same model"
    monkeypatch.setattr(Path, "absolute", lambda path: Path("/models/flux") / path)
    assert measured_by(flux, Path("m"), 1000) == 0.2, "a path counts from the root on"


def test_a_measured_model_that_is_unloaded_is_known_in_comfyui_s_folders() -> None:
    unloaded = {"models": [told("flux/m", nbytes=0)]}
    for folder, seconds in (("unet", 0.2), ("checkpoints", 0.2), ("downloads", None)):
        assert measured_by(unloaded, Path("/models", folder, "flux/m"), 1000) == seconds
    assert measured_by(unloaded, Path("/flux/m"), 1000) is None


@pytest.mark.parametrize("compute", [0, 0.0, -0.1, "a", True, [], float("nan"), float("inf"), 10**400])
def test_what_is_no_time_was_not_measured(compute: Any) -> None:
    assert measured_by({"models": [told("a", compute)]}, Path("a"), 1000) is None


@pytest.mark.parametrize(
    "status",
    [{}, {"models": None}, {"models": {"name": "a"}}, {"models": [None, 5, {}, told(None), told(7), told("")]}]
    + [{"models": [{**told("a"), "rest_bytes": size}]} for size in (None, "1", -1, [])],
)
def test_an_odd_status_tells_of_nothing(status: dict[str, Any]) -> None:
    assert measured_by(status, Path("a"), 1000) is None


@pytest.mark.parametrize("name", ["m.safetensors.index.json", "m-00001-of-00000.safetensors"])
def test_a_model_in_no_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="it lists no tensors"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("files", [5, [1], ["a", None], [["a"]], ["../a"], [""], ["."]])
def test_an_index_that_names_no_files(files: Any, tmp_path: Path) -> None:
    index = tmp_path / "m.safetensors.index.json"
    weights = dict(enumerate(files)) if isinstance(files, list) else files
    index.write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(CheckpointError, match="it is no index"):
        read_tensors(index)


def test_a_number_of_many_digits_is_no_block() -> None:
    with pytest.raises(UnsupportedModelError):
        cut([Tensor(f"a.{'9' * 5000}.weight.b", "BF16", 100)])


def test_what_a_file_lacks_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    specs = [TensorSpec(f"blocks.{block}.a.weight", (64, 64), 1.0) for block in range(4)]
    path = write(tmp_path / "part.safetensors", specs)
    data = 4 * 64 * 64 * 2
    assert missing_bytes(path) == data
    assert main(["plan", str(path), "--vram", "8"]) == 0
    assert "a file did not come whole" in capsys.readouterr().out
    path.write_bytes(path.read_bytes() + bytes(data))
    assert missing_bytes(path) == 0
    assert main(["plan", str(path), "--vram", "8", "--reserve", "0"]) == 0
    assert "whole" not in capsys.readouterr().out


def test_the_least_that_is_said_is_enough(found: Cut) -> None:
    for reserve in (0.0, 0.33, 2.5, 2.51):
        [title, said] = describe_plan(found, Machine(reserve, reserve))
        assert "would have to be left" in title
        least = float(said.split()[2])
        assert "too little" not in "\n".join(describe_plan(found, Machine(least, reserve)))
        assert "too little" in "\n".join(describe_plan(found, Machine(least - 0.15, reserve)))


def test_many_seconds_are_written_out(found: Cut) -> None:
    assert "e+" not in "".join(describe_plan(found, Machine(8, link=0.025, compute_seconds=1234.0)))
