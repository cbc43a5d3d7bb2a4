"""The life cycle of a streamed model: load -> (prefetch -> wait -> release)* -> unload.

[Note: two events guard a slot]
A slot's memory is written by copies and read by the compute stream. Four things keep them apart:
 1. write after read: a copy into a slot waits for ``free``, recorded on the compute stream when the slot's last
    block has queued its kernels (``_release``);
 2. read after write: a block's kernels are queued behind a wait for ``ready``, recorded after the copy (``enter``);
 3. write after write: the backend carries copies out in the order in which they are queued;
 4. the host never rewrites a master copy while a copy from it may be under way: ``load`` and ``invalidate`` drain
    the copy streams first.
The host itself waits for nothing between ``load`` and ``unload``. Tensors never tell torch's allocator about the
second stream (``record_stream``): staging memory is freed only after ``synchronize``.

[Note: who keeps whom alive]
The model owns its streamer. The streamer refers to the root weakly, and to the blocks, their dictionaries of
parameters and buffers, and hook handles. The hooks refer to the streamer weakly. There is no cycle, so a model is
freed, and its page-locked memory with it, when the last reference to it goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import nn

from .arena import Arena, PinBudget
from .backend import Backend
from .blocks import BlockSet
from .config import StreamingConfig, format_bytes
from .hooks import attach
from .layout import Binding
from .masters import NoPatches, Patches
from .placement import Placement
from .plan import Plan, make_plan, minimum_bytes
from .ring import Ring
from .schedule import Schedule
from .telemetry import Counters, Snapshot, StallMeter


class State(Enum):
    """What of a streamed model is where.

    UNLOADED: modules use the originals; nothing on the device. Master copies made earlier are kept in host memory.
    LOADED: the rest and the resident blocks are on the device, the ring too; streamed blocks have master copies.
    """

    UNLOADED = "unloaded"
    LOADED = "loaded"


class Streamer:
    """Streams the blocks of one model to one device. One for each loaded model, shared by all who use the model.

    Args:
        root: the module whose forward is one step; its blocks run inside it.
        blocks: the model cut into blocks and rest (:func:`streaming.blocks.split_model`).
        backend: the device.
        config: settings.
        pins: page-locked memory that this model shares with others; None is a budget of its own without limit.
    """

    def __init__(
        self,
        root: nn.Module,
        blocks: BlockSet,
        backend: Backend,
        config: StreamingConfig,
        pins: PinBudget | None = None,
    ) -> None:
        self.blocks = blocks
        self.backend = backend
        self.config = config
        self.counters = Counters()
        self.plan: Plan | None = None
        self.state = State.UNLOADED
        self._root = weakref.ref(root)
        self._pins = pins
        self._placement = self._place_on(backend)
        self._ring: Ring | None = None
        self._slot_bindings: dict[tuple[int, int], Binding] = {}
        self._schedule: Schedule | None = None
        self._running: list[tuple[int, int]] = []
        self._stalls = StallMeter(self.counters)
        self._hooks: list[Any] = []
        self._finalizer = _close_at_end(self, backend)

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def model_bytes(self) -> int:
        return sum(self.blocks.sizes) + self.blocks.rest.nbytes

    @property
    def minimum_bytes(self) -> int:
        """The least device memory with which this model streams."""
        return minimum_bytes(self.blocks.sizes, self.blocks.rest.nbytes)

    @property
    def device_bytes(self) -> int:
        """Bytes on the device now."""
        return self.plan.device_bytes if self.plan is not None else 0

    @property
    def holders(self) -> set[int]:
        """Identities of the dictionaries of parameters and buffers whose tensors this streamer places."""
        return {id(place.holder) for spec in self.blocks.specs for place in spec.places}

    def plan_for(self, budget: float) -> Plan:
        """The plan that :meth:`load` would carry out with ``budget`` bytes, the configured limit respected."""
        if self.config.vram_limit is not None:
            budget = min(budget, self.config.vram_limit)
        return make_plan(self.blocks.sizes, self.blocks.rest.nbytes, budget, self.config.ring_slots)

    # -- load and unload -----------------------------------------------------------------------------------------

    def load(self, plan: Plan, patches: Patches | None = None) -> None:
        """Bring the model into the state that ``plan`` describes, with ``patches`` in its weights.

        Only differences to the present state cost anything: a second call with the same arguments does nothing.
        After an error the model is unloaded and all device memory is given back.
        """
        patches = patches or NoPatches()
        if self.state is State.LOADED and plan == self.plan and not self._placement.is_stale(plan, patches):
            return
        try:
            self._drain()
            self._drop_ring()
            self.plan = plan
            self._placement.carry_out(plan)
            self._placement.bake(plan, patches)
            self._placement.bind()
            if plan.streamed:
                self._make_ring(plan)
            self._attach(plan)
            self._prefetch()
        except BaseException:
            self.unload()
            raise
        self.state = State.LOADED

    def unload(self) -> None:
        """Take everything off the device; the modules use the originals again. Master copies stay."""
        self._drain()
        self._detach()
        self._drop_ring()
        self._placement.clear_device()
        self.plan = None
        self.state = State.UNLOADED

    def invalidate(self) -> None:
        """Weights were changed in place, by somebody else, on the device or in master copies: copy them anew."""
        if self.state is State.LOADED and self._schedule is not None:
            self._drain()
            self._schedule.forget()
            self._prefetch()

    @contextmanager
    def originals(self) -> Iterator[None]:
        """Point the modules at the weights as loaded, for code that reads them; not while a block runs."""
        self.settle()
        self._placement.bind_originals()
        try:
            yield
        finally:
            if self.state is State.LOADED:
                self._placement.bind()

    def move_to(self, backend: Backend) -> None:
        """Stream to another device from the next load on."""
        self.close()
        self._finalizer.detach()
        self.backend = backend
        self._placement = self._place_on(backend)
        self._finalizer = _close_at_end(self, backend)

    def close(self) -> None:
        """Unload, free the master copies, end the copy streams. The streamer can be loaded again."""
        self.unload()
        self._placement.clear_host()
        self.backend.close()

    def _place_on(self, backend: Backend) -> Placement:
        arena = Arena(backend, self.config.pin_memory, self._pins)
        return Placement(self.blocks, backend, arena, self.config.threads)

    def _drain(self) -> None:
        """Let every copy and every kernel that uses our memory finish (Note: two events guard a slot, 4)."""
        self.settle()
        self.backend.synchronize()

    def _make_ring(self, plan: Plan) -> None:
        self.backend.open(self.config.copy_streams)
        self._ring = Ring(self.backend, plan.slots, plan.slot_bytes)
        lookahead = 0 if self.config.synchronous else plan.slots
        self._schedule = Schedule(plan.streamed, plan.slots, lookahead)
        with torch.inference_mode(False):
            for index in plan.streamed:
                for number, slot in enumerate(self._ring.slots):
                    layout = self.blocks.blocks[index].layout
                    self._slot_bindings[index, number] = layout.binding(slot.buffer)

    def _drop_ring(self) -> None:
        if self._ring is not None:
            self._ring.release()
        self._ring = self._schedule = None
        self._slot_bindings.clear()
        self._stalls.clear()

    def _attach(self, plan: Plan) -> None:
        self._detach()
        root = self._root()
        assert root is not None
        streamed = [(index, self.blocks.blocks[index].module) for index in plan.streamed]
        self._hooks = attach(root, streamed, self)

    def _detach(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()

    # -- the hot path --------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """A forward of the root begins."""
        self.settle()
        if self._schedule is not None:
            self._schedule.begin_step()

    def end_step(self, completed: bool) -> None:
        """A forward of the root ends; ``completed`` is false when it raised."""
        if completed:
            self.counters.steps += 1
        else:
            self.settle()
        if self._schedule is not None:
            self._schedule.end_step(completed)
        self._stalls.collect()

    def settle(self) -> None:
        """Release blocks that an exception or an interrupt left bound. Harmless when there are none."""
        if not self._running:
            return
        while self._running:
            self._release(*self._running[-1])
        if self._schedule is not None:
            self._schedule.end_step(completed=False)

    def enter(self, index: int) -> None:
        """A streamed block begins: its weights are on the device, or on their way, and bound."""
        schedule, ring = self._schedule, self._ring
        assert schedule is not None
        assert ring is not None
        entry = schedule.enter(index)
        self._running.append((index, entry.slot))
        try:
            if entry.hit:
                self.counters.hits += 1
            else:
                self.counters.misses += 1
                self._fill(index, entry.slot)
            with torch.profiler.record_function("stream::wait"):
                self._stalls.add(self.backend.wait(ring.slots[entry.slot].ready))
            self._slot_bindings[index, entry.slot].apply()
        except BaseException:
            self._release(index, entry.slot)
            schedule.drop(entry.slot)
            raise

    def leave(self, index: int) -> None:
        """A streamed block ends: its slot is free for the next copy, which is queued now."""
        for running in reversed(self._running):
            if running[0] == index:
                self._release(*running)
                self._prefetch()
                return

    def _release(self, index: int, slot: int) -> None:
        schedule, ring = self._schedule, self._ring
        assert schedule is not None
        assert ring is not None
        self._running.remove((index, slot))
        with torch.profiler.record_function("stream::release"):
            schedule.leave(slot)
            ring.slots[slot].free = self.backend.mark()
            if all(running[0] != index for running in self._running):
                self._placement.bind_block(index)

    def _prefetch(self) -> None:
        if self._schedule is None:
            return
        while (copy := self._schedule.next_copy()) is not None:
            try:
                self._fill(copy.block, copy.slot)
            except BaseException:
                self._schedule.drop(copy.slot)
                raise

    def _fill(self, index: int, slot: int) -> None:
        master, ring = self._placement.master(index), self._ring
        assert ring is not None
        with torch.profiler.record_function("stream::prefetch"):
            ring.fill(slot, master.buffer)
        self.counters.copies += 1
        self.counters.streamed_bytes += master.buffer.nbytes

    # -- telling -------------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """The plan in effect and the page-locked memory behind it, in a line."""
        return self._explain(self.plan)

    def _explain(self, plan: Plan | None) -> str:
        if plan is None:
            return "not loaded"
        text = plan.explain()
        return f"{text}; {self._memory_text()}" if plan.streamed else text

    def _memory_text(self) -> str:
        pinned, pageable = self._placement.arena.pinned_bytes, self._placement.arena.pageable_bytes
        text = f"{format_bytes(pinned)} page-locked"
        return f"{text}, {format_bytes(pageable)} pageable ({self._placement.arena.reason})" if pageable else text

    def _mode(self, plan: Plan | None) -> str:
        if plan is None:
            return "off"
        if not plan.streamed:
            return "resident"
        return "synchronous" if self.config.synchronous else "streamed"

    def snapshot(self) -> Snapshot:
        """The state now, for any thread. Waits for nothing and changes nothing."""
        current = self.plan  # Once: another thread may load or unload meanwhile.
        plan = current or Plan(self.blocks.sizes, 0, tuple(range(len(self.blocks.sizes))), 0)
        loaded = current is not None
        return Snapshot(
            device=self.backend.name,
            mode=self._mode(current),
            explain=self._explain(current),
            note=self._placement.arena.reason or "",
            blocks=len(self.blocks.blocks),
            resident_blocks=len(plan.resident),
            streamed_blocks=len(plan.streamed) if loaded else 0,
            resident_bytes=plan.resident_bytes,
            rest_bytes=plan.rest_bytes,
            staging_bytes=plan.staging_bytes,
            streamed_block_bytes=plan.streamed_bytes if loaded else 0,
            pinned_bytes=self._placement.arena.pinned_bytes,
            pageable_bytes=self._placement.arena.pageable_bytes,
            device_bytes=self.backend.allocated,
            device_peak_bytes=self.backend.peak,
            device_budget_bytes=self.backend.budget,
            counters=replace(self.counters),
        )


def _close_at_end(streamer: Streamer, backend: Backend) -> weakref.finalize:
    """Close ``backend`` before the streamer's memory goes, also when a model is dropped without unloading."""
    finalizer = weakref.finalize(streamer, backend.close)
    finalizer.atexit = False
    return finalizer
