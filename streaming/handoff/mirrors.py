"""Copies of home's tensors on other devices, and which of them has been written to last.

[Note: one tensor on several devices]
A tensor that blocks of several devices get is copied to each device once in a step. Blocks may write to the tensor, or
to any of its copies, in place, and users of all the others must then see that. So, as for the caches of processors,
each copy is known to be like the original, or newer; and a copy that may be older is made anew.

- Torch's count of writes (``_version``), which views share, shows what a block writes to a copy. In inference mode
  torch counts nothing, so copies are made outside of it. A newer copy on another device comes home when code at home
  uses the tensor, and otherwise never: mostly a block writes to its hidden states, whose old values are not used any
  more. When the step ends, a newer copy comes home if the original's memory is still in use.
- What a block at home writes is counted too: in the place of a tensor of inference mode that has copies it gets another
  one on the same memory, made outside of inference mode.
- A mode of torch's dispatcher tells what is read and written at home outside of blocks (witness.py).

That mode cannot be on in steps that run compiled, and where a block is called without its model. There nothing is taken
for granted: what was written comes home at once, and each block gets copies of its own. A compiled block would be
compiled once more for tensors that are not of inference mode; so on other devices than home it gets only such tensors.

Tensors may be views of one memory. A write to one makes the copies of all others old. Where a block gets two tensors of
which one is a view of the other, so are their copies. Kernels that write past torch, to memory whose address they were
given, are not seen, as autograd does not see them.

After an exception, nothing comes home. Code that runs a step again has put back what was there before it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .away import Move
from .views import View

# Classes of tensors that can be made once more on the same memory.
PLAIN = (torch.Tensor, torch.nn.Parameter)


class Copy(NamedTuple):
    """A copy of a tensor, or another tensor on the same memory, and how often it had been written to."""

    tensor: torch.Tensor
    version: int

    @property
    def is_written(self) -> bool:
        return self.tensor._version != self.version


class Mirror:
    """One tensor at home and its copies.

    Attributes:
        memory: the memory that it is a view of.
        view: which part of that memory it is.
        copies: those that are like the original, or newer, by their device.
        newest: the device whose copy is newer than the original, if one is.
    """

    def __init__(self, tensor: torch.Tensor, memory: Memory, gone: Callable[[object], None]) -> None:
        self.memory = memory
        self.copies: dict[torch.device, Copy] = {}
        self.newest: torch.device | None = None
        self._alias: Copy | None = None
        self._version = _version(tensor)
        self._tensor = weakref.ref(tensor, gone)
        self.view = View(tensor, memory.weak)

    @property
    def alive(self) -> torch.Tensor | None:
        """The tensor; None once it is gone."""
        return self._tensor()

    def tensor(self) -> torch.Tensor | None:
        """The tensor, or another one on its memory; None if that memory is not in use any more."""
        tensor = self._tensor()
        return self.view.again() if tensor is None else tensor

    def copy_on(self, device: torch.device) -> torch.Tensor | None:
        """The copy on ``device`` that is known to be like the tensor, or newer; None without one."""
        tensor = self._tensor()
        if self.newest is None and tensor is not None and _version(tensor) != self._version:
            self.copies.clear()
        copy = self.copies.get(device)
        return None if copy is None else copy.tensor

    def keep(self, device: torch.device, tensor: torch.Tensor) -> None:
        original = self._tensor()
        self._version = 0 if original is None else _version(original)
        self.copies[device] = Copy(tensor, _version(tensor))

    def alias(self) -> torch.Tensor | None:
        """A tensor on the same memory whose writes are counted; None where they are anyway, or cannot be."""
        tensor = self._tensor()
        if tensor is None or type(tensor) not in PLAIN or not tensor.is_inference():
            return None
        if self._alias is None:
            alias = alias_counted(tensor)
            self._alias = Copy(alias, alias._version)
        return self._alias.tensor

    def is_written_at_home(self) -> bool:
        """Whether a block at home may have written to it since the last call of this."""
        tensor, alias = self._tensor(), self._alias
        if alias is None:
            return tensor is not None and tensor.is_inference()
        self._alias = Copy(alias.tensor, alias.tensor._version)
        return alias.is_written


class Memory:
    """Memory that several tensors may be views of."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.weak = StorageWeakRef(tensor.untyped_storage())
        self.mirrors: list[Mirror] = []

    @property
    def is_gone(self) -> bool:
        return self.weak.expired()

    def forget_copies(self) -> None:
        for mirror in self.mirrors:
            mirror.copies.clear()
            mirror.newest = None


class Mirrors:
    """The tensors of one step that have copies (Note: one tensor on several devices).

    Args:
        home: where originals are.
        move: returns a copy of a tensor on a device.
    """

    def __init__(self, home: torch.device, move: Move) -> None:
        self._home, self._move = home, move
        self._of: dict[int, Mirror] = {}
        self._memories: dict[int, Memory] = {}
        self._newer: dict[int, Memory] = {}
        self._let_go: list[Memory] = []

    def __len__(self) -> int:
        """How many tensors have copies."""
        return len(self._of)

    def bring(self, tensor: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Mirror]:
        """The copy of ``tensor`` on ``device``."""
        mirror = self._mirror(tensor)
        copy = mirror.copy_on(device)
        if copy is None:
            newer = [one for one in mirror.memory.mirrors if one.newest is not None]
            if newer == [mirror]:
                tensor = mirror.copies[mirror.newest].tensor  # Straight from there.
            else:
                self.come_home(mirror.memory)
            copy = self._made_on(device, tensor, mirror)
            mirror.keep(device, copy)
        return copy, mirror

    def _made_on(self, device: torch.device, tensor: torch.Tensor, mirror: Mirror) -> torch.Tensor:
        """Make a copy of ``tensor``. If it is a view of a tensor that has a copy there, or the other way round, so are
        the copies: a block may get both."""
        others = [(one.view, one.copies[device].tensor) for one in mirror.memory.mirrors if device in one.copies]
        for view, copy in others:
            if view.covers(mirror.view):
                with counted():
                    _, offset, size, stride = mirror.view.within(view, copy)
                    return copy.as_strided(size, stride, offset)
        made = moved_counted(self._move, tensor, device)
        for view, copy in others:
            if mirror.view.covers(view):
                with counted():
                    copy.set_(*view.within(mirror.view, made))
        return made

    def at_home(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Mirror | None]:
        """What a block at home gets for ``tensor``, and its mirror if it has copies."""
        memory = self._memories.get(tensor.untyped_storage()._cdata) if self._memories else None
        if memory is None or not any(mirror.copies for mirror in memory.mirrors):
            return tensor, None
        mirror = self._mirror(tensor)
        alias = mirror.alias()
        return tensor if alias is None else alias, mirror

    def written(self, device: torch.device, given: list[Mirror]) -> None:
        """A block on ``device``, which was given these, may have written to them."""
        if device == self._home:
            for mirror in given:
                if mirror.is_written_at_home():
                    mirror.memory.forget_copies()
            return
        self._forget_what_is_gone()
        found = [mirror for mirror in given if device in mirror.copies and mirror.copies[device].is_written]
        for mirror in found:
            newest = mirror.copies[device].tensor
            for other in mirror.memory.mirrors:
                if other not in found and other.newest is None:
                    other.copies.clear()
            mirror.copies = {device: Copy(newest, newest._version)}
            mirror.newest = device
            self._newer[mirror.memory.weak.cdata] = mirror.memory

    def touched(self, tensor: torch.Tensor, writes: bool) -> None:
        """Code at home reads ``tensor`` now, or writes to it."""
        if not self._memories:
            return
        memory = self._memories.get(tensor.untyped_storage()._cdata)
        if memory is not None:
            self.come_home(memory)
            if writes:
                memory.forget_copies()

    def all_come_home(self) -> None:
        """Code at home may use any tensor now."""
        for memory in list(self._newer.values()):
            self.come_home(memory)

    def come_home(self, memory: Memory) -> None:
        """Have originals hold what was written to their copies."""
        if self._newer.pop(memory.weak.cdata, None) is None:
            return
        for mirror in memory.mirrors:
            device, mirror.newest = mirror.newest, None
            if device is not None and (tensor := mirror.tensor()) is not None:
                copy = mirror.copies[device].tensor
                with torch.no_grad():
                    tensor.copy_(self._move(copy, self._home))
                mirror.keep(device, copy)
        if memory.is_gone:
            memory.forget_copies()

    def clear(self) -> None:
        """Forget all copies."""
        for memory in self._memories.values():
            memory.forget_copies()
        self._of.clear()
        self._memories.clear()
        self._newer.clear()
        self._let_go.clear()

    def _mirror(self, tensor: torch.Tensor) -> Mirror:
        key = id(tensor)
        known = self._of.get(key)
        # Once the tensor is gone, another one may have its id.
        if known is not None and known.alive is tensor:
            return known
        memory = self._memory(tensor)
        mirror = self._of[key] = Mirror(tensor, memory, _forgets(key, self._of, self._let_go))
        memory.mirrors.append(mirror)
        return mirror

    def _forget_what_is_gone(self) -> None:
        """Forget memory of tensors that are gone, unless it is still in use."""
        for memory in self._let_go:
            if memory.is_gone:
                memory.forget_copies()
                memory.mirrors.clear()
                self._newer.pop(memory.weak.cdata, None)
                self._memories.pop(memory.weak.cdata, None)
        self._let_go.clear()

    def _memory(self, tensor: torch.Tensor) -> Memory:
        key = tensor.untyped_storage()._cdata
        known = self._memories.get(key)
        # Its address is not used again while there is a weak reference to it.
        if known is None:
            known = self._memories[key] = Memory(tensor)
        return known


def _forgets(key: int, mirrors: dict[int, Mirror], let_go: list[Memory]) -> Callable[[object], None]:
    """Make what is called when a tensor is gone, which may be at any time: copies that are like it go too."""

    def forget(_: object) -> None:
        mirror = mirrors.pop(key, None)
        if mirror is None:
            return
        if mirror.newest is None:
            mirror.copies.clear()
        let_go.append(mirror.memory)

    return forget


def moved_counted(move: Move, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on ``device`` whose writes torch counts."""
    with counted():
        return move(tensor, device)


def alias_counted(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor on the memory of ``tensor``, whose writes torch counts."""
    with counted():
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


@contextmanager
def counted() -> Iterator[None]:
    """Tensors that are made while this lasts are none of inference mode."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
