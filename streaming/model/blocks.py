"""Finds a model's blocks, which are the layers in its lists, and their units, which are placed one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from ..collector import uncollected
from ..errors import UnsupportedModelError
from ..planning.profile import Outline
from .forms import PlainForm
from .layout import Layout, Locate, NamedTensor, Place, TensorSpec, Value, make_layout, nowhere
from .shown import laid_out, plain

# A model most of whose bytes lie outside of its blocks gains nothing from streaming them.
MINIMUM_SHARE = 0.5

# A module with less than this part of its block's bytes (a norm, say), or a block with less than this part of the
# largest one's, stays on the device: a copy for it would cost more than its memory.
SMALL_SHARE = 1 / 256

# A buffer of a block that takes no more than this stays on the device too: blocks write to them while they run, and
# what is written to a slot is lost.
SMALL_BUFFER_BYTES = 1 << 20

# A module is cut into the layers of its own lists when they hold this part of its bytes.
INNER_SHARE = 0.9

# The name under which a layer compiled by torch.compile holds the original layer.
COMPILED = "_orig_mod"

# Returns the dtype that a tensor shall have when it runs: (module, attribute, tensor) -> dtype.
TargetDtype = Callable[[nn.Module, str, torch.Tensor], torch.dtype]


@dataclass(frozen=True)
class Unit:
    """What is placed as one: the tensors that one module holds itself, such as a linear layer's weight and bias.

    Attributes:
        index: number among all units; -1 for the rest of the model.
        block: number of the block that it belongs to; -1 for the rest.
        name: full name of the module from the model's root.
        module: the module; None for the rest, and where a tensor is tied to another module of the block: such a unit
            is needed for as long as the block runs.
        layout: its tensors.
    """

    index: int
    block: int
    name: str
    module: nn.Module | None = field(repr=False)
    layout: Layout = field(repr=False)

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes


@dataclass(frozen=True)
class Block:
    """A layer (:func:`find_blocks`).

    Attributes:
        index: position in the order of definition.
        name: full name from the model's root.
        module: the layer.
        units: what it consists of, without small ones and tensors that it shares with another block.
        small: tensors of its small modules, which are in the rest.
        tied: whether it shares tensors with another block, or with modules outside of blocks.
    """

    index: int
    name: str
    module: nn.Module = field(repr=False)
    units: tuple[Unit, ...] = field(repr=False)
    small: tuple[NamedTensor, ...] = field(repr=False)
    tied: bool


@dataclass(frozen=True)
class BlockSet:
    """A model cut into blocks and a rest that always stays on the device.

    Attributes:
        blocks: the blocks.
        outside: tensors that belong to no block, or to several.
    """

    blocks: tuple[Block, ...]
    outside: tuple[NamedTensor, ...] = field(repr=False)

    @cached_property
    def rest(self) -> Unit:
        """What is outside, and small tensors of blocks."""
        small = [item for block in self.blocks for item in block.small]
        return Unit(-1, -1, "rest", None, make_layout([*self.outside, *small]))

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The units of all blocks, by their numbers."""
        return tuple(unit for block in self.blocks for unit in block.units)

    @property
    def values(self) -> Iterator[Value]:
        """Every parameter and buffer of the model."""
        return (value for unit in (*self.units, self.rest) for value in unit.layout.values)

    @property
    def specs(self) -> Iterator[TensorSpec]:
        """Every plain tensor of the model, those that others are made of included."""
        return (spec for value in self.values for spec in value.specs)

    @cached_property
    def outline(self) -> Outline:
        """The model as plans see it."""
        kinds: dict[object, int] = {}
        block_kind = [kinds.setdefault(_kind(block), len(kinds)) for block in self.blocks]
        return Outline(
            tuple(unit.nbytes for unit in self.units),
            tuple(unit.block for unit in self.units),
            tuple(block_kind),
            self.rest.nbytes,
        )

    def part(self, blocks: Collection[int], with_outside: bool) -> BlockSet:
        """Return some of the blocks as a set of their own, numbered anew in the same order."""
        chosen = [self.blocks[number] for number in sorted(blocks)]
        before = 0
        parts = []
        for index, block in enumerate(chosen):
            units = [replace(unit, index=before + i, block=index) for i, unit in enumerate(block.units)]
            before += len(units)
            parts.append(replace(block, index=index, units=tuple(units)))
        return BlockSet(tuple(parts), self.outside if with_outside else ())


def _kind(block: Block) -> object:
    """Equal for blocks that compute and are copied alike."""
    inner = tuple((unit.name.removeprefix(block.name), unit.nbytes) for unit in block.units)
    return type(block.module), inner


def find_blocks(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return names and modules of the layers in lists below ``root``, in the order of definition.

    [Note: what is a block]
    A block must be entered as a module; otherwise little shows when its weights are needed. What cannot be called (a
    ``ModuleList``, a ``ModuleDict``, any module without a ``forward``) is a container. So is a ``Sequential``, whose
    callers may run its children one by one. The first module below containers is a block, with two exceptions:

    - A ``Sequential`` of single layers (a small MLP) is no list of blocks unless it stands in a list itself.
    - A module that consists of such a list but for a tenth (the spatial transformers of SDXL have ten layers each)
      is no block, but its layers are: as a whole it would need too much room at once.
    """
    return list(_search(root, ""))


def _search(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in _children(module):
        if _is_container(child):
            yield from _members(child, f"{prefix}{name}.", False)
        else:
            yield from _search(child, f"{prefix}{name}.")


def _members(container: nn.Module, prefix: str, in_list: bool) -> Iterator[tuple[str, nn.Module]]:
    in_list = in_list or not isinstance(container, nn.Sequential)
    for name, child in _children(container):
        if _is_container(child):
            yield from _members(child, f"{prefix}{name}.", in_list)
        elif in_list or any(True for _ in child.children()):
            yield from _layer(child, f"{prefix}{name}")


def _layer(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """A module in a list: one block, or those of its own lists."""
    nbytes = _parameter_bytes(module)
    if nbytes == 0:
        return
    inner = list(_search(module, f"{path}."))
    in_layers = sum(_parameter_bytes(layer) for _, layer in inner)
    if len(inner) > 1 and in_layers >= INNER_SHARE * nbytes:
        yield from inner
    else:
        yield path, module


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, uncompiled(child)) for name, child in module.named_children())


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the original of a layer compiled by torch.compile; any other module as it is."""
    return module._modules.get(COMPILED, module)


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) or type(module).forward is nn.Module.forward


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@uncollected()
def cut_model(
    model: nn.Module,
    target_dtype: TargetDtype | None = None,
    locate: Locate = nowhere,
    minimum_share: float = MINIMUM_SHARE,
    shown_dtype: TargetDtype | None = None,
) -> BlockSet:
    """Cut ``model`` into blocks and rest, each with its layout.

    Tensors that two blocks share, and all tensors outside of blocks, belong to the rest.

    Args:
        model: the module.
        target_dtype: the dtype in which a tensor runs; its own by default, and where it is of a class of its own.
        locate: returns the source of a tensor that maps a file.
        minimum_share: the part of its bytes that must lie in blocks; with 0 it need not have any block.
        shown_dtype: the dtype in which modules hold a tensor while no copy of it is bound; as it runs by default.

    Raises:
        UnsupportedModelError: no list of blocks, too few bytes in blocks, or tensors that cannot be laid out.
    """
    found = _without_small(find_blocks(model))
    if not found and minimum_share > 0:
        raise UnsupportedModelError("it has no list of repeated blocks")
    tensors = _named_tensors(model, target_dtype or _own_dtype, locate, shown_dtype)
    owners = _owners(model, found, tensors)
    blocks: list[Block] = []
    first = 0
    shared = {id(place.holder) for item in owners[-1] for place in item.places}
    for index, (name, module) in enumerate(found):
        small: list[NamedTensor] = []
        units = tuple(_units(index, name, module, owners[index], first, small))
        blocks.append(Block(index, name, module, units, tuple(small), _holds(module, shared)))
        first += len(units)
    blocks_and_rest = BlockSet(tuple(blocks), tuple(owners[-1]))
    total = sum(unit.nbytes for unit in blocks_and_rest.units)
    share = total / max(1, blocks_and_rest.rest.nbytes + total)
    if share < minimum_share:
        raise UnsupportedModelError(f"only {share:.0%} of its bytes lie in repeated blocks")
    return blocks_and_rest


def _without_small(found: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    sizes = [_parameter_bytes(module) for _, module in found]
    least = SMALL_SHARE * max(sizes, default=0)
    return [block for block, nbytes in zip(found, sizes, strict=True) if nbytes >= least]


def _holds(module: nn.Module, holders: Collection[int]) -> bool:
    return any(id(holder) in holders for m in module.modules() for holder in (m._parameters, m._buffers))


def _units(
    block: int, prefix: str, root: nn.Module, tensors: Sequence[NamedTensor], first: int, small: list[NamedTensor]
) -> Iterator[Unit]:
    """Yield the units of a block, numbered from ``first``. Small buffers and small modules' tensors go to ``small``."""
    modules = {id(module._parameters): (name, module) for name, module in root.named_modules()}
    modules |= {id(module._buffers): (name, module) for name, module in root.named_modules()}
    groups: dict[int, list[NamedTensor]] = defaultdict(list)
    for item in tensors:
        if is_small_buffer(item):
            small.append(item)
            continue
        groups[id(modules[id(item.places[0].holder)][1])].append(item)
    least = SMALL_SHARE * sum(item.nbytes for item in tensors)
    for items in groups.values():
        if sum(item.nbytes for item in items) < least:
            small.extend(items)
            continue
        name, module = modules[id(items[0].places[0].holder)]
        tied = len({id(modules[id(place.holder)][1]) for item in items for place in item.places}) > 1
        full_name = f"{prefix}.{name}" if name else prefix
        yield Unit(first, block, full_name, None if tied else module, make_layout(items))
        first += 1


def is_small_buffer(item: NamedTensor | Value) -> bool:
    """Whether it always stays on the device, so that what is written to it lasts."""
    if any(place.is_parameter for place in item.places) or not isinstance(item.form, PlainForm):
        return False
    return item.form.shape.numel() * item.dtype.itemsize <= SMALL_BUFFER_BYTES


def _own_dtype(module: nn.Module, attribute: str, tensor: torch.Tensor) -> torch.dtype:
    return tensor.dtype


def held_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, Place, torch.Tensor]]:
    """Yield every place of a model that holds a tensor: its full name, its module, the place and the tensor."""
    for prefix, module in model.named_modules():
        prefix = prefix.replace(f"{COMPILED}.", "")
        if module._modules.get(COMPILED) is not None or prefix.endswith(COMPILED):
            prefix = prefix.removesuffix(COMPILED).rstrip(".")
        for holder, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for attribute, tensor in holder.items():
                if tensor is not None:
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    yield name, module, Place(holder, attribute, is_parameter), tensor


def _named_tensors(
    model: nn.Module, target_dtype: TargetDtype, locate: Locate, shown_dtype: TargetDtype | None
) -> list[NamedTensor]:
    """Return every parameter and buffer once, with all of its places: a tied tensor has several."""
    found: dict[int, list[tuple[str, nn.Module, Place, torch.Tensor]]] = defaultdict(list)
    for held in held_tensors(model):
        found[id(held[3])].append(held)
    named = []
    for group in found.values():
        _, module, place, tensor = group[0]
        names, places = tuple(name for name, *_ in group), tuple(each for _, _, each, _ in group)
        spec = laid_out(tensor)
        if spec is not None:
            given = spec.original, spec.dtype, places, lambda _, spec=spec: spec.source
            named.append(NamedTensor(names, *given, tensor.dtype, tensor))
            continue
        tensor = plain(tensor)
        dtype = target_dtype(module, place.attribute, tensor)
        shown = dtype if shown_dtype is None else shown_dtype(module, place.attribute, tensor)
        named.append(NamedTensor(names, tensor, dtype, places, locate, shown))
    return named


def _owners(
    model: nn.Module, found: list[tuple[str, nn.Module]], tensors: list[NamedTensor]
) -> dict[int, list[NamedTensor]]:
    """Return tensors by the index of the one block that has all of their places; -1 where there is none."""
    owner: dict[int, int] = {}

    def claim(module: nn.Module, index: int) -> None:
        for holder in (module._parameters, module._buffers):
            if owner.setdefault(id(holder), index) != index:
                owner[id(holder)] = -1  # A module of two blocks, or of one block and of what lies outside.

    roots = {id(block) for _, block in found}
    for index, (_, block) in enumerate(found):
        for module in block.modules():
            claim(module, index)
    for module in _outside(model, roots):
        claim(module, -1)
    owners: dict[int, list[NamedTensor]] = defaultdict(list)
    for item in tensors:
        indices = {owner[id(place.holder)] for place in item.places}
        owners[indices.pop() if len(indices) == 1 else -1].append(item)
    return owners


def _outside(module: nn.Module, roots: Collection[int]) -> Iterator[nn.Module]:
    """Yield ``module`` and what lies below it, without the modules ``roots`` and what lies below them."""
    yield module
    for child in module.children():
        if id(child) not in roots:
            yield from _outside(child, roots)
