"""ControlNet residuals and transformer patches of every kind, and which of them a model takes.

A patch computes with what it gets and with a tensor of its own, which is where the MODEL is, as those of real patches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample
from torch.utils._pytree import tree_map

# Of each list a model takes as many as it has places for, but for those that must be given as many as that.
RESIDUALS = 64
EXACT_RESIDUALS = {"HunyuanDiT": 1, "HunyuanDiT1": 1}
# Most add them to the first tokens of what they have; Stable Cascade scales pictures.
RESIDUAL_SHAPES = {"Stable_Cascade_C": (1, 1, 1, 1)}
# At least the blocks of tiny models.
BLOCKS = range(16)


class Points:
    """The places of a model where a patch or residuals may be: asked for, and used."""

    def __init__(self, home: torch.device) -> None:
        self.home = home
        self.asked: set[str] = set()
        self.used: set[str] = set()

    @property
    def own(self) -> torch.Tensor:
        return torch.full((1,), 0.125, device=self.home)

    def patches(self) -> dict[str, Any]:
        patches = {name: [partial(self._use, name, patch)] for name, patch in PATCHES.items()}
        name = "forward_timestep_embed_patch"
        patches[name] = [(Downsample, partial(self._use, name, _layer))]
        return _Recorded(patches, self.asked)

    def replacements(self) -> dict[str, Any]:
        """For every block, and for attention in every place of a UNet."""
        kinds: dict[str, dict[Any, Any]] = defaultdict(dict)
        for number in BLOCKS:
            for name in ("double_block", "single_block", "block"):
                kinds["dit"][name, number] = partial(self._use, f"replace {name}", _block)
            for place in ("input", "middle", "output"):
                for name in ("attn1", "attn2"):
                    kinds[name][place, number] = partial(self._use, f"replace {name}", _attention_itself)
        return {name: _Recorded(items, self.asked, kind=name) for name, items in kinds.items()}

    def residuals(self, family: str) -> dict[str, Any]:
        shape, count = RESIDUAL_SHAPES.get(family, (1, 1, 1)), EXACT_RESIDUALS.get(family, RESIDUALS)
        names = ("input", "middle", "output")
        return _Recorded(
            {name: _Residuals([self.own.reshape(shape)] * count, partial(self.used.add, name)) for name in names},
            self.asked,
        )

    def _use(self, name: str, patch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.used.add(name)

        def change(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                assert value.device == self.home
                return value + self.own if value.is_floating_point() else value
            return value

        return patch(change, *args, **kwargs)


class _Recorded(dict):
    """Notes what a model asks for. Keys are names, or places: of blocks, or of attention in a UNet (``kind``)."""

    def __init__(self, items: dict[Any, Any], asked: set[str], kind: str = "") -> None:
        super().__init__(items)
        self._asked, self._kind = asked, kind

    def _note(self, key: Any) -> None:
        if self._kind.startswith("attn"):
            self._asked |= {f"replace {self._kind}"} if key is not None else set()
        else:
            self._asked.add(f"replace {key[0]}" if isinstance(key, tuple) else key)

    def __contains__(self, key: Any) -> bool:
        self._note(key)
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)


class _Residuals(list):
    """Notes that some were taken."""

    def __init__(self, items: list[torch.Tensor], taken: Callable[[], None]) -> None:
        super().__init__(items)
        self._taken = taken

    def pop(self, *index: int) -> torch.Tensor:
        self._taken()
        return super().pop(*index)

    def __getitem__(self, index: Any) -> Any:
        self._taken()
        return super().__getitem__(index)


# -- patches -----------------------------------------------------------------------------------------------------------
# Each is given what changes a tensor, and then what models give to patches of its kind.

Change = Callable[[Any], Any]


def _first(change: Change, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return change(value)


def _with_skip(change: Change, hidden: torch.Tensor, skip: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return change(hidden), change(skip)


def _streams(change: Change, args: dict[str, Any]) -> dict[str, Any]:
    """Between blocks or within one: what a model takes back is called by these names."""
    return args | {name: change(args[name]) for name in ("img", "txt", "x", "h") if name in args}


def _attention(change: Change, *args: Any, **kwargs: Any) -> Any:
    """Before attention. Models that give a dictionary call it afterwards, and take back one tensor."""
    if isinstance(args[0], dict):
        return change(args[0]["x"]) + sum(change(args[0][name]).mean() for name in ("q", "k") if name in args[0])
    changed = [change(value) for value in args[:3]]
    return dict(zip("qkv", changed, strict=True)) if "pe" in kwargs else tuple(changed)


def _layer(change: Change, layer: Any, hidden: torch.Tensor, *_: Any) -> torch.Tensor:
    return change(layer(change(hidden)))


def _block(change: Change, args: dict[str, Any], extra: dict[str, Any]) -> Any:
    """Around a block."""
    given = args | {name: change(args[name]) for name in ("img", "x", "vid") if name in args}
    return tree_map(change, extra["original_block"](given))


def _attention_itself(change: Change, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return change(q) + change(k).mean() + change(v).mean()


PATCHES: dict[str, Callable[..., Any]] = {
    "emb_patch": _first,
    "input_block_patch": _first,
    "input_block_patch_after_skip": _first,
    "middle_block_after_patch": _streams,
    "output_block_patch": _with_skip,
    "attn1_patch": _attention,
    "attn1_output_patch": _first,
    "middle_patch": _first,
    "attn2_patch": _attention,
    "attn2_output_patch": _first,
    "post_input": _streams,
    "noise_refiner": _streams,
    "double_block": _streams,
    "mlp_patch": _streams,
}
