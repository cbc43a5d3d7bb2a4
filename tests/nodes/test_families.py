"""Every family of the host streams, on one device and over two, and the latents are the host's own to the bit.

Virtual devices: tensors on the second are copies, so what one block writes the others see only if it is handed on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import comfy.model_management as mm
import comfy.supported_models
import family_table
import pytest
import torch
import unknown_family
from comfy.model_patcher import ModelPatcher
from counting_links import CountingLinks
from families import (
    FAMILIES,
    KNOWN,
    LACKING,
    NAMES,
    OTHERS,
    OTHERS_SINCE,
    USES,
    is_known,
    missing,
    strangers,
)
from family import Family
from family_models import HostWeights, build, build_tiny, make_tiny, sample, streamed, whole
from family_table import Row
from weightstream.nodes.host.hosts import NEWEST_KNOWN
from weightstream.nodes.host.hosts import VERSION as HOST_VERSION
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.model.streamed_model import model_dtype
from weightstream.nodes.twins.likeness import difference, held_by
from weightstream.streaming import cut_model
from weightstream.streaming.handoff.boundary import Boundary

pytestmark = pytest.mark.usefixtures("one_thread")

HOME, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)


@pytest.fixture(scope="module")
def check_row(request: pytest.FixtureRequest) -> Iterator[Callable[[str, Row], None]]:
    """Compares a line of the committed table with what was found, or writes it."""
    committed = family_table.read()
    found: dict[str, Row] = {}
    writes = request.config.getoption("--write-table")

    def check(name: str, row: Row) -> None:
        found[name] = row
        if not writes:
            assert committed.get(name) == row, "docs/families.md says something else; --write-table writes it anew"

    yield check
    if writes:
        family_table.write(committed | found, family_table.in_order(NAMES, list(committed)))


def test_every_model_of_the_host_is_known() -> None:
    unknown, gone = strangers(NAMES), missing(HOST_VERSION, NAMES)
    if (unknown or gone) and not is_known(HOST_VERSION):
        pytest.skip(
            f"ComfyUI {HOST_VERSION} is newer than {NEWEST_KNOWN}, whose models are known. No test runs these "
            f"{len(unknown)} of its models: {', '.join(unknown)}. It lacks: {', '.join(gone) or 'none'}"
        )
    assert (unknown, gone) == ([], [])


def test_every_known_model_is_one_of_the_host() -> None:
    """Or this run says which are not tested, since the host is older."""
    if LACKING:
        absent = ", ".join(f"{name} ({family.since})" for name, family in LACKING.items())
        pytest.skip(f"ComfyUI {HOST_VERSION} lacks {len(LACKING)} of {len(KNOWN)} known families: {absent}")


def test_the_table_has_every_known_model_once(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--write-table"):
        assert sorted(family_table.names()) == sorted([*KNOWN, *OTHERS])


def test_what_a_host_lacks_and_what_is_new_in_it() -> None:
    assert missing("0.30.0", [name for name in KNOWN if KNOWN[name].since == "0.30"]) == []
    assert missing("0.33.0", [name for name in KNOWN if name != "Trellis2"]) == ["Trellis2"]
    assert strangers(["Flux", "SAM3", "NeverHeardOf"]) == ["NeverHeardOf"]
    assert is_known("0.33.2")
    assert not is_known("0.34.0")


def test_rows_of_models_that_the_host_lacks_stay_where_they_are() -> None:
    in_order = family_table.in_order
    assert in_order(["a", "c", "d"], ["a", "b", "c"]) == ["a", "b", "c", "d"]
    assert in_order(["new", "c", "a"], ["a", "b", "c"]) == ["a", "b", "new", "c"]
    assert in_order(["a", "b"], []) == ["a", "b"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_sampled_is_in_the_table_with_the_reason(name: str, check_row: Callable[[str, Row], None]) -> None:
    check_row(name, Row.unstreamed(OTHERS_SINCE, OTHERS[name]))


# Some of the host's models warn of functions that are going to change: shown, but no error.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("use", USES)
def test_a_family_streams_bit_identical(use: str, check_row: Callable[[str, Row], None]) -> None:
    name, family = USES[use]
    _check_streams(name, family, lambda: build_tiny(name, family))
    if use in FAMILIES:
        check_row(name, _row(name))


def test_a_family_that_nobody_knows_streams_as_any_other() -> None:
    """Neither the host's list of models nor ours has it."""
    assert unknown_family.Unknown.__name__ not in {*NAMES, *KNOWN}
    family = unknown_family.FAMILY
    _check_streams("Unknown", family, lambda: make_tiny(unknown_family.build, family))


def test_layers_that_are_called_without_their_blocks_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    family = replace(unknown_family.FAMILY, size=unknown_family.FAMILY.size | {"alone": True})
    expected = sample(whole(make_tiny(lambda: unknown_family.build(family), family)), family)
    model = streamed("Unknown", make_tiny(lambda: unknown_family.build(family), family))
    caplog.set_level(logging.INFO, "weightstream")
    told = []
    for _ in range(3):
        assert torch.equal(sample(model, family), expected)
        told.append(caplog.text.count("nobody calls 7 of its blocks (diffusion_model.parts.0)"))
    assert told[0] > 0
    assert told[1:] == told[:1] * 2


def _check_streams(name: str, family: Family, make: Callable[[], torch.nn.Module]) -> None:
    native = whole(make())
    expected = sample(native, family)
    assert expected.isfinite().all()
    assert expected.std() > 0
    mm.unload_all_models()

    model = streamed(name, make())
    assert difference(held_by(model), held_by(native)) == "", "one that has run would be taken for another model"
    latents = sample(model, family)
    assert torch.equal(latents, expected)
    assert model.streamer.plan.segments
    counters = model.streamer.counters
    assert counters.copies > 0

    _shrink(model)
    with HostWeights(model.streamer) as host_weights:
        latents = sample(model, family)
    assert torch.equal(latents, expected)
    assert host_weights.found == set()
    assert model.streamer.never_entered == []
    mm.unload_all_models()

    _check_two_devices(native, family, expected)


def _check_two_devices(native: ModelPatcher, family: Family, expected: torch.Tensor) -> None:
    """Blocks in turn: what crosses the boundary arrives, and is what it should be."""
    links = CountingLinks()
    boundary = Boundary(HOME, links)
    blocks = [block.module for block in cut_model(native.model, model_dtype, minimum_share=0).blocks]
    places = [(block, SECOND if number % 2 else HOME) for number, block in enumerate(blocks)]
    boundary.attach(native.model.diffusion_model, places)
    assert torch.equal(sample(native, family), expected)
    assert links.moves > 0 or len(blocks) == 1
    mm.unload_all_models()


def _shrink(model: StreamedModelPatcher) -> None:
    """Once it is known in which order the parts of blocks run, the model needs less: take the rest from it."""
    mm.unload_all_models()
    model.streamer.backend.store.budget = model.streamer.minimum_bytes
    mm.load_models_gpu([model])
    model.streamer.finish_building()
    assert model.streamer.plan.learned
    in_blocks = model.streamer.model_bytes - model.streamer.outline.rest_bytes
    # The least memory has room for at most a third of any family's blocks; how much of it is staging hangs on times.
    assert model.streamer.plan.streamed_bytes > 0.6 * in_blocks


def _row(name: str) -> Row:
    """What the table says of a family that streams, by a model of real size."""
    family = FAMILIES[name]
    assert getattr(comfy.supported_models, name).matches(family.size)
    outline = cut_model(build(name, family), model_dtype).outline
    largest = max(outline.block_bytes(block) for block in range(outline.blocks))
    share = 1 - outline.rest_bytes / outline.model_bytes
    size, largest_size = f"{outline.model_bytes / 1024**3:.1f} GiB", f"{largest / 1024**2:.0f} MiB"
    return Row(family.since, (size, str(outline.blocks), largest_size, f"{share:.0%}"), "yes")


def test_a_weight_that_is_read_outside_of_its_block_is_found() -> None:
    """The check that every family passes can fail."""
    name = "QwenImage"
    model = streamed(name, build_tiny(name, FAMILIES[name]))
    transformer = model.model.diffusion_model
    weight = transformer.transformer_blocks[1].attn.to_q
    transformer.img_in.register_forward_hook(lambda module, args, output: output + 0 * weight.weight.sum())
    sample(model, FAMILIES[name])
    _shrink(model)
    with HostWeights(model.streamer) as host_weights:
        sample(model, FAMILIES[name])
    assert {misplaced.unit for misplaced in host_weights.found} == {"diffusion_model.transformer_blocks.1.attn.to_q"}


def test_a_model_of_real_size_takes_no_memory() -> None:
    model = build("QwenImage", FAMILIES["QwenImage"])
    in_memory = [parameter for parameter in model.parameters() if parameter.device.type != "meta"]
    assert sum(parameter.nbytes for parameter in in_memory) < 1 << 20
