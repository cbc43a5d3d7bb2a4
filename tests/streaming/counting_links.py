"""Copies between devices, counted."""

from __future__ import annotations

import torch
from weightstream.streaming.split.links import Links


class CountingLinks(Links):
    def __init__(self) -> None:
        super().__init__()
        self.moves = 0

    def move(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.moves += 1
        return super().move(tensor, device)
