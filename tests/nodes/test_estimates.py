"""A model that is cut by the names in its file, against the same model as the host builds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from weightstream.nodes.loader import load_streamed
from weightstream.streaming import Outline
from weightstream.streaming.estimating.cutting import cut
from weightstream.streaming.estimating.tensors import read_tensors

from tools.checkpoints import write_flux, write_sd35, write_wan


@pytest.mark.parametrize("write", [write_flux, write_wan, write_sd35])
def test_the_header_shows_the_blocks_that_the_host_builds(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors")
    estimated = cut(read_tensors(path)).outline
    built = load_streamed(str(path), {}).streamer.blocks.outline
    assert estimated.blocks == built.blocks
    # On a CPU the host computes in 32 bits. A file has the layers of a block in an order of its own.
    assert [sorted(2 * size for size in sizes_of(estimated, block)) for block in range(built.blocks)] == [
        sorted(sizes_of(built, block)) for block in range(built.blocks)
    ]
    assert 2 * estimated.rest_bytes == pytest.approx(built.rest_bytes, rel=0.02)


def sizes_of(outline: Outline, block: int) -> list[int]:
    return [outline.unit_bytes[unit] for unit in outline.block_units[block]]
