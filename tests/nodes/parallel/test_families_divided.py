"""Every kind of block that is described, in tiny models of the host's families: the bits of one device."""

from __future__ import annotations

from contextlib import nullcontext

import comfy.model_management as mm
import pytest
import torch
from divided import InlineBackend, copied, divide
from fake_gpus import GPUS, WITH_VALUES, SoundLinks, denoise, gpus, move, plenty
from families import USES
from family_models import build_tiny, build_tiny_outline, sample, whole
from weightstream.nodes.parallel.dividing import moved
from weightstream.nodes.parallel.families import KINDS, kind_of, lists_of_blocks
from weightstream.streaming.split.links import Links

# One use for each kind, and those that do more with tokens than others.
DIVIDED = [
    *("Flux", "Flux, two references", "Flux2", "Chroma", "HunyuanVideo", "HunyuanVideoI2V, picture", "QwenImage"),
    *("QwenImage, references, in place", "WAN21_T2V", "WAN21_Vace, two controls", "WAN22_Animate", "ZImage", "LTXV"),
    *("MiniMaxH3", "Ideogram4", "Krea2", "CogVideoX_T2V", "Omnigen2", "Kandinsky5", "JoyImage", "AuraFlow"),
]


def test_every_kind_is_tried_and_there() -> None:
    found = set()
    for use in DIVIDED:
        name, family = USES[use]
        for blocks, _ in lists_of_blocks(build_tiny(name, family).diffusion_model):
            found |= {f"{type(block).__module__}.{type(block).__qualname__}" for block in blocks}
            assert all(kind_of(block) is not None for block in blocks)
    assert found == set(KINDS)


@pytest.mark.parametrize("use", DIVIDED)
def test_the_same_bits(use: str) -> None:
    name, family = USES[use]
    models = [build_tiny(name, family) for _ in range(2)]
    expected = sample(whole(models[0]), family)
    with divide(models, (1, 1), Links(), lambda value, _: copied(value)) as divided:
        assert torch.equal(sample(whole(models[0]), family), expected)
    assert divided
    assert all(one == other > 0 for one, other in divided)


@pytest.mark.parametrize("use", ["Flux", "QwenImage", "WAN21_T2V", "MiniMaxH3"])
def test_uneven_parts_on_three_devices(use: str) -> None:
    """Nearly the same numbers: a CPU's kernels may give other bits for other numbers of rows."""
    name, family = USES[use]
    shares = (3, 1, 2)
    models = [build_tiny(name, family) for _ in shares]
    expected = sample(whole(models[0]), family)
    with divide(models, shares, Links(), lambda value, _: copied(value)) as divided:
        assert torch.allclose(sample(whole(models[0]), family), expected, atol=1e-4)
    assert all(min(counts) > 0 for counts in divided)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("use", DIVIDED)
def test_no_operation_mixes_devices(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mm, "get_free_memory", plenty)
    name, family = USES[use]
    values = use in WITH_VALUES
    models = [(build_tiny if values else build_tiny_outline)(name, family) for _ in range(2)]
    with gpus(values) as same:
        for model, gpu in zip(models, GPUS, strict=False):
            for module in model.modules():
                move(module, gpu, values)
        with divide(
            models,
            (1, 1),
            SoundLinks(),
            lambda value, number: moved(value, GPUS[number], SoundLinks()),
            lambda number: same() if number else nullcontext(),
            InlineBackend,
        ) as divided:
            assert denoise(models[0], family).device == GPUS[0]
    assert all(one == other > 0 for one, other in divided)
