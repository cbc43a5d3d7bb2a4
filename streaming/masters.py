"""The copies of one unit: original, master copy in host memory, resident copy on the device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple, Protocol

import torch

from .arena import Arena, HostBuffer
from .backend import Backend
from .blocks import Unit
from .contents import needs_work, ranges, read_range, read_tensor
from .errors import UnsupportedModelError
from .layout import Binding, TensorSpec
from .reader import Reader
from .transfer import Tick, Transfer


class Patches(Protocol):
    """Changes to weights (LoRA and others), as the engine sees them."""

    def signature(self, name: str) -> object | None:
        """Something that equals another signature only if both give the same weight; None where nothing changes."""

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        """The changed weight, in the original's shape; the dtype and device are up to the callee."""


class NoPatches:
    """Weights as they were loaded."""

    def signature(self, name: str) -> object | None:
        return None

    def compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        return original


class Weights:
    """A buffer with a unit's weights, and which patches are in them.

    Attributes:
        buffer: uint8 memory on the host or on the device.
        binding: points the unit's module at this buffer.
    """

    def __init__(self, unit: Unit, buffer: torch.Tensor) -> None:
        self.unit = unit
        self.buffer = buffer
        with torch.inference_mode(False):
            self.binding: Binding = unit.layout.binding(buffer)
        self._baked: dict[str, object] = {}

    def bind_to(self, buffer: torch.Tensor) -> Binding:
        """Points the unit's module at another buffer, which holds or will hold a copy of this one."""
        return self.unit.layout.binding(buffer)

    @property
    def patched(self) -> bool:
        return bool(self._baked)

    def stale(self, patches: Patches) -> list[TensorSpec]:
        """Tensors whose patches differ from the ones in this buffer."""
        return [spec for spec in self.unit.layout.specs if patches.signature(spec.name) != self._baked.get(spec.name)]

    def write_from(self, other: Weights) -> None:
        """Copy another buffer of the same unit as it is, patches included."""
        self.buffer.copy_(other.buffer)
        self._baked = dict(other._baked)

    def bake(self, specs: Iterable[TensorSpec], patches: Patches, tick: Tick) -> None:
        """Write ``specs`` anew: patched, or the original where nothing changes them any more.

        ``tick`` is called before each, and may raise.
        """
        for spec in specs:
            tick()
            # While it is written the tensor is neither the old nor the new one: should that fail or be interrupted,
            # nobody may take it for either. This copy may outlive the failure.
            self._baked[spec.name] = _UNFINISHED
            signature = patches.signature(spec.name)
            if signature is None:
                read_tensor(spec, self.buffer)
                del self._baked[spec.name]
                continue
            if spec.source is not None:
                spec.source.check()
            original = spec.original if spec.original.dtype == spec.dtype else spec.original.to(spec.dtype)
            _write(spec, self.buffer, patches.compute(spec.name, original))
            self._baked[spec.name] = signature


_UNFINISHED = object()


def _write(spec: TensorSpec, buffer: torch.Tensor, value: torch.Tensor) -> None:
    target = spec.view(buffer)
    if value.shape != target.shape:
        raise UnsupportedModelError(
            f"a patch changes the shape of {spec.name} from {tuple(target.shape)} to {tuple(value.shape)}; "
            "load this model with the host's own loader"
        )
    target.copy_(value.detach())


# A builder looks after so many bytes whether it shall stop: 16 threads have 64 MB under way.
BUILD_BYTES = 4 * 1024**2


class _Master(NamedTuple):
    """A master copy and the memory that it lies in."""

    weights: Weights
    memory: HostBuffer


class _Arriving(NamedTuple):
    """Device memory that is being filled."""

    buffer: torch.Tensor
    transfer: Transfer


class UnitCopies:
    """Every copy of one unit that exists now.

    The original is a view of the mapped file (or memory that the host filled), so letting go of any other copy
    loses nothing but work.

    Attributes:
        arriving: a resident copy that is on its way.
        built: a master copy that a builder's thread has finished and nobody has adopted (builder.py, Note: handed over,
            not shared).
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.original_binding = unit.layout.original_binding()
        self.resident: Weights | None = None
        self.arriving: _Arriving | None = None
        self.built: _Master | None = None
        self._master: _Master | None = None
        self._begun: tuple[HostBuffer, int] | None = None

    @property
    def master(self) -> Weights | None:
        return self._master.weights if self._master is not None else None

    @property
    def pinned(self) -> bool:
        """Whether there is a master copy in page-locked memory."""
        return self._master is not None and self._master.memory.pinned

    @property
    def master_bytes(self) -> int:
        """Host memory that the master copy takes, one that is being built included."""
        return self.unit.nbytes if self._master or self.built or self._begun else 0

    def patched_by(self, patches: Patches) -> bool:
        return any(patches.signature(spec.name) is not None for spec in self.unit.layout.specs)

    def holds(self, names: Collection[str]) -> bool:
        """Whether one of these tensors is the unit's."""
        return any(name in names for spec in self.unit.layout.specs for name in (spec.name, *spec.aliases))

    # -- master copies -------------------------------------------------------------------------------------------

    def move_to_master(self, arena: Arena) -> None:
        """Make the master copy from the resident one, patches included."""
        assert self.resident is not None
        memory, _ = self._begun or (arena.allocate(self.unit.nbytes), 0)
        self._begun = None
        try:
            master = Weights(self.unit, memory.memory)
            master.write_from(self.resident)
            arena.lock(memory)
        except BaseException:
            arena.release(memory)
            raise
        self._master = _Master(master, memory)

    def fill_master(self, arena: Arena, stopped: Callable[[], bool], forget: bool, needed: bool = False) -> bool:
        """On a builder's thread: fill memory with the weights as they were loaded, for :meth:`lock_master`.

        What was begun before is taken up again. Gives whether memory may be had. An unpatched master copy in pageable
        memory would have no use, since the original is as good, unless weights are cast on the way, or it is needed
        for somebody to write to.
        """
        memory, filled = self._begun or (arena.claim(self.unit.nbytes), 0)
        self._begun = None
        if memory is None:
            of_use = needs_work(self.unit.layout) and arena.budget.has_room(self.unit.nbytes)
            if not (of_use or needed):
                return False
            memory = arena.allocate(self.unit.nbytes)
        try:
            for start, end in ranges(self.unit.layout, BUILD_BYTES):
                if start < filled:
                    continue
                if stopped():
                    break
                read_range(self.unit.layout, start, end, memory.memory[start:end], forget)
                filled = end
        except BaseException:
            arena.release(memory)
            raise
        self._begun = memory, filled
        return True

    def lock_master(self, arena: Arena, needed: bool = False) -> bool:
        """On a builder's thread: page-lock what was filled, and leave it to be adopted if it was filled as a whole.

        Gives whether others shall be built: false when no more memory may be page-locked.
        """
        memory, filled = self._begun
        if filled < self.unit.nbytes:
            return True
        self._begun = None
        try:
            locked = arena.lock(memory)
            if locked or needed or needs_work(self.unit.layout):
                self.built = _Master(Weights(self.unit, memory.memory), memory)
            else:
                arena.release(memory)
        except BaseException:
            arena.release(memory)
            raise
        return locked

    def give_up_begun(self, arena: Arena) -> None:
        """On a builder's thread: free what was filled and shall not be page-locked after all."""
        begun, self._begun = self._begun, None
        if begun is not None:
            arena.release(begun[0])

    def adopt(self) -> None:
        """Take what a builder has finished, if there is anything."""
        built, self.built = self.built, None
        self._master = built or self._master

    def drop_master(self) -> HostBuffer | None:
        """Let go of the master copy, or of what was built of one; no builder may be at work. Gives its memory."""
        self.adopt()
        dropped, self._master = self._master, None
        begun, self._begun = self._begun, None
        self.bind()
        if dropped is not None:
            return dropped.memory
        return begun[0] if begun is not None else None

    # -- resident copies -----------------------------------------------------------------------------------------

    def await_resident(self, buffer: torch.Tensor, transfer: Transfer) -> None:
        """``buffer`` on the device will hold the weights as they were loaded, once ``transfer`` is over."""
        self.arriving = _Arriving(buffer, transfer)

    def arrive(self, backend: Backend, reader: Reader, tick: Tick) -> None:
        """Take what was awaited as the resident copy; the host waits until its copies are queued."""
        if self.arriving is None:
            return
        event = reader.wait(self.arriving.transfer, tick)
        backend.wait(event)  # Race: kernels must not read the buffer before the copies into it are done.
        self.resident, self.arriving = Weights(self.unit, self.arriving.buffer), None
        self.bind()

    def stop_awaiting(self, backend: Backend) -> None:
        """No copy is under way any more: keep what has arrived, and free what has not."""
        arriving, self.arriving = self.arriving, None
        if arriving is None:
            return
        if arriving.transfer.queued.exception() is None:
            self.resident = Weights(self.unit, arriving.buffer)
            self.bind()
        else:
            backend.free(arriving.buffer)

    def copy_resident(self, backend: Backend) -> None:
        """Make the resident copy from the master copy, patches included."""
        assert self.master is not None
        buffer = backend.allocate(self.unit.nbytes)
        try:
            resident = Weights(self.unit, buffer)
            resident.write_from(self.master)
        except BaseException:
            backend.free(buffer)
            raise
        self.resident = resident

    def drop_resident(self, backend: Backend) -> None:
        resident, self.resident = self.resident, None
        self.bind()  # A module that still pointed at the buffer would keep its memory.
        if resident is not None:
            backend.free(resident.buffer)

    # -- modules -------------------------------------------------------------------------------------------------

    @property
    def home(self) -> Binding:
        """Points the modules at the resident copy, else at the master copy, else at the original."""
        weights = self.resident or self.master
        return weights.binding if weights is not None else self.original_binding

    def bind(self) -> None:
        self.home.apply()
