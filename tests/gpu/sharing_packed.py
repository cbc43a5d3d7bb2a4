"""A process that streams a model of a file packed, and shares its packed copies (sharing_program.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import Transformer, make_transformer
from safetensors.torch import save_file
from weightstream.streaming import (
    Checkpoint,
    CpuBackend,
    CudaBackend,
    PinBudget,
    Streamer,
    StreamingConfig,
    VirtualMemory,
    cut_model,
)
from weightstream.streaming.config import PackingMode
from weightstream.streaming.sharing.share import Share

DEPTH = 4
# Until times are known, weights are packed, and they have streamed so twice.
STEPS = 6


def write_model(path: Path, on_gpu: bool) -> None:
    """Weights that are large enough to be packed."""
    model = make_transformer(DEPTH, 2048 if on_gpu else 128).to(torch.bfloat16)
    save_file(model.state_dict(), path)


class PackingUser:
    """Opens the model, and packs it.

    Args:
        address: of the broker.
        path: of the model's file.
    """

    def __init__(self, address: str, on_gpu: bool, path: Path) -> None:
        self.share = Share(address)
        self.pins = PinBudget(share=self.share)
        self.device = torch.device("cuda:0" if on_gpu else "cpu")
        backend = CudaBackend(self.device) if on_gpu else CpuBackend(VirtualMemory(1 << 30))
        self.checkpoint = Checkpoint.open(path)
        self.model = self._opened()
        blocks = cut_model(self.model, locate=self.checkpoint.locate)
        config = StreamingConfig(packing=PackingMode.ON, stream_all=True, adaptive=False, headroom_bytes=0)
        self.streamer = Streamer(self.model, blocks, backend, config, self.pins)

    def _opened(self) -> Transformer:
        """Its weights are views of the file."""
        weights = self.checkpoint.state_dict()
        model = make_transformer(DEPTH, weights["input.weight"].shape[0], seed=1)
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_(False)

    def run(self) -> bool:
        """Run a prompt; returns whether every step gives what the same model gives that is on the device as a whole."""
        plain = self._opened().to(self.device)
        width = plain.input.weight.shape[0]
        x = torch.linspace(-1, 1, 15 * width, device=self.device).reshape(3, 5, width).to(torch.bfloat16)
        expected = plain(x)
        self.streamer.begin_run()
        self.streamer.load(self.streamer.plan_for(self.streamer.model_bytes // 2))
        outputs = [self.streamer.run(lambda: self.model(x), reload=self.streamer.load) for _ in range(STEPS)]
        return all(torch.equal(output, expected) for output in outputs)

    def facts(self) -> dict[str, Any]:
        plan, weights = self.streamer.plan, self.streamer.site.weight_copies
        memory = [weights.copies(unit).packed.memory for unit in sorted(plan.packed)]
        return {
            "packed": len(memory),
            "shared": sum(one.is_shared for one in memory),
            "built": self.share.built,
            "taken": self.share.taken,
            "locked": self.pins.locked,
            "shared_bytes": self.pins.shared,
            "reason": self.share.reason,
        }

    def let_go(self) -> None:
        self.streamer.close()
