from __future__ import annotations

from collections.abc import Callable, Iterator

import comfy.model_management as mm
import comfy.supported_models
import family_table
import pytest
import torch
from families import FAMILIES, OTHERS
from family_models import HostWeights, build, build_tiny, sample, streamed, whole
from family_table import Row
from weightstream.nodes.patcher import StreamedModelPatcher
from weightstream.nodes.streamed_model import model_dtype
from weightstream.streaming import split_model

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [model.__name__ for model in comfy.supported_models.models]


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
        family_table.write(committed | found, NAMES)


def test_every_model_of_the_host_is_known() -> None:
    assert sorted(NAMES) == sorted([*FAMILIES, *OTHERS])


def test_the_table_has_every_model_of_the_host_once(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--write-table"):
        assert list(family_table.read()) == NAMES


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_sampled_is_in_the_table_with_the_reason(name: str, check_row: Callable[[str, Row], None]) -> None:
    check_row(name, Row.unstreamed(OTHERS[name]))


# Some of the host's models warn of functions that are going to change: shown, but no error.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_streams_bit_identical(name: str, check_row: Callable[[str, Row], None]) -> None:
    family = FAMILIES[name]
    expected = sample(whole(build_tiny(name, family)), family)
    assert expected.isfinite().all()
    assert expected.std() > 0
    mm.unload_all_models()

    model = streamed(name, build_tiny(name, family))
    latents = sample(model, family)
    assert torch.equal(latents, expected)
    assert model.streamer.plan.segments
    assert model.streamer.counters.copies >= len(model.streamer.plan.segments)

    _shrink(model)
    with HostWeights(model.streamer) as host_weights:
        latents = sample(model, family)
    assert torch.equal(latents, expected)
    assert host_weights.found == set()
    check_row(name, _row(name))


def _shrink(model: StreamedModelPatcher) -> None:
    """Once it is known in which order the parts of blocks run, the model needs less: take the rest from it."""
    mm.unload_all_models()
    model.streamer.backend.store.budget = model.streamer.minimum_bytes
    mm.load_models_gpu([model])
    model.streamer.finish_building()
    assert model.streamer.plan.learned
    in_blocks = model.streamer.model_bytes - model.streamer.outline.rest_bytes
    assert model.streamer.plan.streamed_bytes > 0.8 * in_blocks


def _row(name: str) -> Row:
    """What the table says of a family that streams, by a model of real size."""
    family = FAMILIES[name]
    assert getattr(comfy.supported_models, name).matches(family.size)
    outline = split_model(build(name, family), model_dtype).outline
    largest = max(outline.block_bytes(block) for block in range(outline.blocks))
    share = 1 - outline.rest_bytes / outline.model_bytes
    size, largest_size = f"{outline.model_bytes / 1024**3:.1f} GiB", f"{largest / 1024**2:.0f} MiB"
    return Row((size, str(outline.blocks), largest_size, f"{share:.0%}"), "yes")


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
