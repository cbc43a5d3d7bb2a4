"""Find a model's blocks: the repeated layers that are placed one by one. What is left is its rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from .errors import UnsupportedModelError
from .layout import Layout, NamedTensor, Place, TensorSpec, make_layout

# A model most of whose bytes lie outside of its blocks gains nothing from streaming them.
MINIMUM_SHARE = 0.5

# Names the dtype that a tensor shall have when it runs: (module, attribute, tensor) -> dtype.
TargetDtype = Callable[[nn.Module, str, torch.Tensor], torch.dtype]


@dataclass(frozen=True)
class Block:
    """A repeated layer, or the rest of the model.

    Attributes:
        index: position in the order of definition; -1 for the rest.
        name: full name from the model's root.
        module: the layer; None for the rest, which is no single module.
        layout: its tensors, without those that it shares with another block.
    """

    index: int
    name: str
    module: nn.Module | None = field(repr=False)
    layout: Layout = field(repr=False)

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes


@dataclass(frozen=True)
class BlockSet:
    """A model cut into blocks and a rest that always stays on the device."""

    blocks: tuple[Block, ...]
    rest: Block

    @property
    def specs(self) -> Iterator[TensorSpec]:
        """Every tensor of the model."""
        return (spec for block in (*self.blocks, self.rest) for spec in block.layout.specs)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(block.nbytes for block in self.blocks)


def find_blocks(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the outermost lists of like layers below ``root``, in the order of definition.

    A list counts when it is a ``ModuleList`` of two or more modules of one class that hold parameters. Containers
    (``Sequential`` and its subclasses) are no layers: their callers may run their children one by one.
    """
    return list(_search(root, ""))


def _search(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if _is_block_list(child):
            yield from ((f"{path}.{key}", block) for key, block in child.named_children())
        else:
            yield from _search(child, f"{path}.")


def _is_block_list(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return False
    if len({type(child) for child in module}) > 1 or len({id(child) for child in module}) < len(module):
        return False
    first = module[0]
    if isinstance(first, (nn.Sequential, nn.ModuleList)):
        return False
    return all(any(True for _ in child.parameters()) for child in module)


def split_model(model: nn.Module, target_dtype: TargetDtype | None = None) -> BlockSet:
    """Cut ``model`` into blocks and rest, each with its layout.

    Tensors that two blocks share, and all tensors outside of blocks, belong to the rest.

    Raises:
        UnsupportedModelError: no list of blocks, too few bytes in blocks, or tensors that cannot be laid out.
    """
    found = find_blocks(model)
    if not found:
        raise UnsupportedModelError("it has no list of repeated blocks")
    tensors = _named_tensors(model, target_dtype or _own_dtype)
    owners = _owners(found, tensors)
    blocks = tuple(Block(index, name, module, make_layout(owners[index])) for index, (name, module) in enumerate(found))
    rest = Block(-1, "rest", None, make_layout(owners[-1]))
    share = sum(block.nbytes for block in blocks) / max(1, rest.nbytes + sum(block.nbytes for block in blocks))
    if share < MINIMUM_SHARE:
        raise UnsupportedModelError(f"only {share:.0%} of its bytes lie in repeated blocks")
    return BlockSet(blocks, rest)


def _own_dtype(module: nn.Module, attribute: str, tensor: torch.Tensor) -> torch.dtype:
    return tensor.dtype


def _named_tensors(model: nn.Module, target_dtype: TargetDtype) -> list[NamedTensor]:
    """Every parameter and buffer once, with all of its places: a tied tensor has several."""
    names: dict[int, list[str]] = defaultdict(list)
    places: dict[int, list[Place]] = defaultdict(list)
    first: dict[int, tuple[torch.Tensor, torch.dtype]] = {}
    for prefix, module in model.named_modules():
        for holder, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for attribute, tensor in holder.items():
                if tensor is None:
                    continue
                name = f"{prefix}.{attribute}" if prefix else attribute
                _check_plain(name, tensor)
                names[id(tensor)].append(name)
                places[id(tensor)].append(Place(holder, attribute, is_parameter))
                first.setdefault(id(tensor), (tensor, target_dtype(module, attribute, tensor)))
    return [NamedTensor(tuple(names[key]), *first[key], tuple(places[key])) for key in first]


def _check_plain(name: str, tensor: torch.Tensor) -> None:
    if type(tensor.data) is not torch.Tensor:
        raise UnsupportedModelError(f"{name} is a {type(tensor.data).__name__}, which is not laid out yet")
    if tensor.layout != torch.strided:
        raise UnsupportedModelError(f"{name} has the layout {tensor.layout}; only dense tensors stream")


def _owners(found: list[tuple[str, nn.Module]], tensors: list[NamedTensor]) -> dict[int, list[NamedTensor]]:
    """Tensors by the index of the one block that holds all of their places; -1 where there is none."""
    block_of_holder: dict[int, int] = {}
    for index, (_, block) in enumerate(found):
        for module in block.modules():
            block_of_holder[id(module._parameters)] = index
            block_of_holder[id(module._buffers)] = index
    owners: dict[int, list[NamedTensor]] = defaultdict(list)
    for item in tensors:
        indices = {block_of_holder.get(id(place.holder), -1) for place in item.places}
        owners[indices.pop() if len(indices) == 1 else -1].append(item)
    return owners
