"""ComfyUI's Train LoRA with a MODEL that streams: an error that says why, and nothing is left of it."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_train import TrainLoraNode
from placing import Machine, place
from prompts import conditioning
from sampling import MB, MODEL, sample
from weightstream.nodes.loader import load_streamed
from weightstream.nodes.model.offload import OffloadSettings
from weightstream.nodes.settings import with_settings
from weightstream.streaming import GradientError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),  # The node asks for it in float32.
    pytest.mark.filterwarnings("ignore:module forward hook with:UserWarning"),
]

OPTIONS = {
    "batch_size": 1,
    "steps": 1,
    "grad_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "rank": 4,
    "optimizer": "AdamW",
    "loss_function": "MSE",
    "seed": 5,
    "training_dtype": "fp32",
    "lora_dtype": "fp32",
    "quantized_backward": False,
    "algorithm": "LoRA",
    "gradient_checkpointing": False,
    "checkpoint_depth": 1,
    "offloading": False,
    "existing_lora": "[None]",
    "bucket_mode": False,
    "bypass_mode": False,
}


def train(model: Any, **options: Any) -> Any:
    latents = [{"samples": torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(4))}]
    values = {name: [value] for name, value in {**OPTIONS, **options}.items()}
    with torch.inference_mode():
        return TrainLoraNode.execute(model=[model], latents=latents, positive=[conditioning(1)], **values)


@pytest.mark.parametrize("way", ["loader", "settings", "split"])
@pytest.mark.parametrize("bypass", [False, True])
def test_a_lora_is_not_trained_on_weights_that_come_and_go(
    models: Any, native: Any, machine: Machine, way: str, bypass: bool
) -> None:
    expected = sample(native)
    mm.unload_all_models()
    machine(2 if way == "split" else 1, 24 * MB)
    with torch.inference_mode():
        if way == "settings":
            model = with_settings(comfy.sd.load_diffusion_model(str(models / MODEL)), OffloadSettings())
        else:
            model = load_streamed(str(models / MODEL), {})
        if way == "split":
            model = place(model, split="equal")[0]
    with pytest.raises(GradientError, match=r"gradients are recorded through .* which streams"):
        train(model, bypass_mode=bypass)
    assert torch.equal(sample(model), expected)
