"""Blocks of every family on two devices in turn: what crosses the boundary arrives, and is what it should be.

Virtual devices: tensors on the second are copies, so what one block writes the others see only if it is handed on.
"""

from __future__ import annotations

import comfy.model_management as mm
import pytest
import torch
import unknown_family
from counting_links import CountingLinks
from families import USES
from family import Family
from family_models import build_tiny, make_tiny, sample, whole
from weightstream.nodes.model.streamed_model import model_dtype
from weightstream.streaming import split_model
from weightstream.streaming.handoff.boundary import Boundary

pytestmark = pytest.mark.usefixtures("one_thread")

HOME, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("use", USES)
def test_a_family_runs_on_two_devices(use: str) -> None:
    name, family = USES[use]
    check(build_tiny(name, family), family)


def test_a_family_that_nobody_knows_runs_on_two_devices() -> None:
    check(make_tiny(unknown_family.build, unknown_family.FAMILY), unknown_family.FAMILY)


def check(model: torch.nn.Module, family: Family) -> None:
    expected = sample(whole(model), family)
    links = CountingLinks()
    boundary = Boundary(HOME, links)
    blocks = [block.module for block in split_model(model, model_dtype, minimum_share=0).blocks]
    boundary.attach(model.diffusion_model, [(block, SECOND if i % 2 else HOME) for i, block in enumerate(blocks)])
    latents = sample(whole(model), family)
    assert torch.equal(latents, expected)
    assert links.moves > 0 or len(blocks) == 1
    mm.unload_all_models()
