"""Nodes that change how a step is made of the model's outputs, or which parts of the model run in it.

Those that act on a UNet's blocks, as FreeU does, are in test_neighbours_unet.py: a FLUX has none of these places.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.context_windows
import pytest
import torch
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_cfg import CFGNorm, CFGZeroStar
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_eps import EpsilonScaling, TemporalScoreRescaling
from comfy_extras.nodes_fresca import FreSca
from comfy_extras.nodes_mahiro import Mahiro
from comfy_extras.nodes_model_advanced import (
    ModelComputeDtype,
    ModelNoiseScale,
    ModelSamplingAuraFlow,
    ModelSamplingContinuousEDM,
    ModelSamplingFlux,
    ModelSamplingSD3,
    RescaleCFG,
)
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_perpneg import PerpNeg
from comfy_extras.nodes_rope import ScaleROPE
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT, SkipLayerGuidanceDiTSimple
from comfy_extras.nodes_tcfg import TCFG
from prompts import Change, check_same, conditioning, guided, latent, output
from sampling import SIDE

Load = Callable[..., Any]

GUIDANCE: dict[str, Change] = {
    "APG": lambda model: output(APG.execute(model, 0.7, 5.0, -0.3)),
    "CFGNorm": lambda model: output(CFGNorm.execute(model, 0.8)),
    "CFGZeroStar": lambda model: output(CFGZeroStar.execute(model)),
    "EpsilonScaling": lambda model: output(EpsilonScaling.execute(model, 1.02)),
    "FreSca": lambda model: output(FreSca.execute(model, 1.2, 1.4, 3)),
    "Mahiro": lambda model: output(Mahiro.execute(model)),
    "NAGuidance": lambda model: output(NAGuidance.execute(model, 5.0, 0.5, 1.5)),
    "PerpNeg": lambda model: output(PerpNeg.execute(model, conditioning(3), 0.8)),
    "RescaleCFG": lambda model: output(RescaleCFG().patch(model, 0.7)),
    "TCFG": lambda model: output(TCFG.execute(model)),
    "TemporalScoreRescaling": lambda model: output(TemporalScoreRescaling.execute(model, 0.95, 1.0)),
}

SAMPLING: dict[str, Change] = {
    "ModelComputeDtype": lambda model: output(ModelComputeDtype().patch(model, "bf16")),
    "ModelNoiseScale": lambda model: output(ModelNoiseScale().patch(model, 1.1)),
    "ModelSamplingAuraFlow": lambda model: output(ModelSamplingAuraFlow().patch_aura(model, 1.73)),
    "ModelSamplingContinuousEDM": lambda model: output(
        ModelSamplingContinuousEDM().patch(model, "v_prediction", 80.0, 0.01)
    ),
    "ModelSamplingFlux": lambda model: output(ModelSamplingFlux().patch(model, 2.0, 0.3, 256, 256)),
    "ModelSamplingSD3": lambda model: output(ModelSamplingSD3().patch(model, 5.0)),
}

SKIPPING: dict[str, Change] = {
    "one double block": lambda model: output(SkipLayerGuidanceDiT.execute(model, 2.0, 0.0, 1.0, "1", "", 0.2)),
    "single blocks": lambda model: output(SkipLayerGuidanceDiT.execute(model, 3.0, 0.01, 0.8, "", "0, 2, 3")),
    "first and last": lambda model: output(SkipLayerGuidanceDiT.execute(model, 1.0, 0.0, 1.0, "0", "3")),
    "all": lambda model: output(SkipLayerGuidanceDiT.execute(model, 1.0, 0.0, 1.0, "0, 1", "0, 1, 2, 3")),
    "negative alone": lambda model: output(SkipLayerGuidanceDiTSimple.execute(model, 0.0, 1.0, "0", "1, 2")),
}


in_four_steps = partial(guided, steps=4)
high = partial(guided, image=latent(16))


@pytest.mark.parametrize("node", GUIDANCE)
def test_guidance(streamed: Load, native: Any, node: str) -> None:
    check_same(streamed(), native, GUIDANCE[node])


@pytest.mark.parametrize("node", SAMPLING)
def test_model_sampling(streamed: Load, native: Any, node: str) -> None:
    check_same(streamed(), native, SAMPLING[node])


def test_rotary_positions_are_scaled(streamed: Load, native: Any) -> None:
    check_same(streamed(), native, lambda model: output(ScaleROPE.execute(model, 1.5, 2.0, 0.5, 0.0, 1.0, 0.0)))


@pytest.mark.parametrize("blocks", SKIPPING)
def test_layers_are_skipped(streamed: Load, native: Any, blocks: str) -> None:
    """A call of the model without some blocks lies between two whole ones: what was copied ahead is not what runs."""
    check_same(streamed(), native, SKIPPING[blocks], in_four_steps)


@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_whole_steps_are_skipped(streamed: Load, native: Any, node: Any) -> None:
    run = partial(guided, steps=8)
    model = streamed()
    hits = []
    with torch.inference_mode():
        cached = output(node.execute(model, 1.5, 0.1, 0.95, False))
    for each in (model, model, cached):
        before = model.status()["counters"]["hits"]
        run(each)
        hits.append(model.status()["counters"]["hits"] - before)
    assert hits[2] < hits[1], "no step was skipped"
    check_same(model, native, lambda base: output(node.execute(base, 1.5, 0.1, 0.95, False)), run)


SCHEDULES = comfy.context_windows.ContextSchedules


@pytest.mark.parametrize(
    "schedule", [SCHEDULES.STATIC_STANDARD, SCHEDULES.UNIFORM_STANDARD, SCHEDULES.UNIFORM_LOOPED, SCHEDULES.BATCHED]
)
@pytest.mark.parametrize("freenoise", [False, True])
def test_context_windows(streamed: Load, native: Any, schedule: str, freenoise: bool) -> None:
    """Windows over the height of the latents, so that each step calls the model several times."""

    def windowed(model: Any) -> Any:
        return output(ContextWindowsManualNode.execute(model, 6, 2, schedule, 1, False, "pyramid", 2, freenoise))

    check_same(streamed(), native, windowed, high)


def test_differential_diffusion(streamed: Load, native: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    image = {
        "samples": torch.randn(1, 16, SIDE, SIDE, generator=generator),
        "noise_mask": torch.rand(1, 1, SIDE, SIDE, generator=generator),
    }
    check_same(
        streamed(),
        native,
        lambda model: output(DifferentialDiffusion.execute(model, 0.9)),
        partial(guided, steps=5, image=image),
    )


def test_several_nodes_at_once(streamed: Load, native: Any) -> None:
    def chain(model: Any) -> Any:
        for change in (SAMPLING["ModelSamplingFlux"], SKIPPING["single blocks"], GUIDANCE["APG"]):
            model = change(model)
        return output(EasyCacheNode.execute(model, 0.4, 0.1, 0.9, False))

    check_same(streamed(), native, chain, partial(guided, steps=6))
