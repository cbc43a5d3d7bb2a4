"""Carries out plans: which copies of which unit exist, and which of them the modules point at."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from .arena import Arena
from .backend import Backend
from .blocks import BlockSet
from .masters import Patches, UnitCopies, Weights
from .plan import Plan


class Placement:
    """Every copy of every unit of one model, on one device and in host memory.

    Args:
        blocks: the model cut into blocks and rest.
        backend: the device.
        arena: where master copies come from.
        threads: threads that fill master copies.
    """

    def __init__(self, blocks: BlockSet, backend: Backend, arena: Arena, threads: int) -> None:
        self.arena = arena
        self._backend = backend
        self._threads = threads
        self._copies = [UnitCopies(unit) for unit in blocks.units]
        self._rest = UnitCopies(blocks.rest)

    def carry_out(self, plan: Plan) -> None:
        """Make the copies that ``plan`` asks for and drop the others; first what frees memory."""
        streamed = [self._copies[unit] for unit in sorted(plan.streamed)]
        resident = [self._copies[unit] for unit in plan.resident]
        self._make_masters([copies for copies in streamed if copies.master is None])
        for copies in streamed:
            copies.drop_resident(self._backend)
        # What was freed goes back as it is. Else it would be cut up for the next copies, and what is left between them
        # would be too small for a step's activations.
        self._backend.trim()
        self._rest.make_resident(self._backend)
        for copies in resident:
            copies.make_resident(self._backend)
            copies.drop_master(self.arena)

    def is_stale(self, plan: Plan, patches: Patches) -> bool:
        """Whether some weight has other patches in it than ``patches``."""
        return any(weights.stale(patches) for weights in self._weights(plan))

    def bake(self, plan: Plan, patches: Patches) -> None:
        """Write the weights whose patches have changed; no other is touched."""
        for weights in self._weights(plan):
            weights.bake(weights.stale(patches), patches)

    def bind(self) -> None:
        """Point the modules at the copies that are in use."""
        for copies in (*self._copies, self._rest):
            copies.bind()

    def bind_originals(self) -> None:
        """Point the modules at the weights as loaded."""
        for copies in (*self._copies, self._rest):
            copies.original_binding.apply()

    @property
    def resident_bytes(self) -> int:
        """Bytes of units that have a resident copy now."""
        return sum(copies.unit.nbytes for copies in self._copies if copies.resident is not None)

    def drop_residents(self, units: Iterable[int]) -> None:
        """Let go of resident copies, and make nothing in their place."""
        for unit in units:
            self._copies[unit].drop_resident(self._backend)

    def master(self, unit: int) -> Weights:
        """The master copy of a streamed unit."""
        master = self._copies[unit].master
        assert master is not None
        return master

    def clear_device(self) -> None:
        """Drop everything on the device. Modules use the originals then: master copies may have patches in them."""
        for copies in (*self._copies, self._rest):
            copies.drop_resident(self._backend)
        self.bind_originals()

    def clear_host(self) -> None:
        """Drop the master copies."""
        for copies in self._copies:
            copies.drop_master(self.arena)

    def _weights(self, plan: Plan) -> Iterable[Weights]:
        for unit, copies in enumerate(self._copies):
            yield copies.master if unit in plan.streamed else copies.resident
        yield self._rest.resident

    def _make_masters(self, copies: list[UnitCopies]) -> None:
        """Fill and page-lock host memory, unit by unit on a few threads: filling is what costs, not locking."""
        if not copies:
            return
        with ThreadPoolExecutor(self._threads, thread_name_prefix="weightstream-fill") as pool:
            futures = [pool.submit(item.make_master, self.arena) for item in copies]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
