"""Blocks that are never entered although their units run: which of them begins or ends now. Pure.

[Note: entered by its units]
Code that calls a block's layers one by one, without the block, does not show when the block begins. The layers are
hooked, and a first step shows that they run and the block does not (``Recorder.never_entered``). From then on such a
block counts as entered from its first unit until a unit of another block begins, or another block, or the step ends. So
it streams as others do: in the second step as a whole, later in parts.

Blocks of which no unit runs are not among these: a model may leave out what it does not need, and a read of a block's
weights without running any module of it cannot be seen. On a GPU such a read fails, and the log says why (runner.py).
"""

from __future__ import annotations

from collections.abc import Collection


class ByUnits:
    """Blocks that are entered by their units.

    Args:
        blocks: their numbers.
    """

    def __init__(self, blocks: Collection[int]) -> None:
        self._blocks = frozenset(blocks)
        self._running: dict[int, int] = {}
        self._called: set[int] = set()

    def begin_unit(self, block: int) -> bool:
        """A unit of ``block`` begins, after :meth:`ended_by`; returns whether the block begins with it."""
        if block not in self._blocks or block in self._called:
            return False
        begins = block not in self._running
        self._running[block] = self._running.get(block, 0) + 1
        return begins

    def end_unit(self, block: int) -> None:
        """A unit of ``block`` ends; this need not be called for one that raises."""
        if self._running.get(block):
            self._running[block] -= 1

    def begin_block(self, block: int) -> None:
        """``block`` is entered, after :meth:`ended_by`."""
        self._called.add(block)

    def end_block(self, block: int) -> None:
        """``block`` is left, after :meth:`begin_block`."""
        self._called.discard(block)

    def ended_by(self, block: int | None) -> list[int]:
        """Blocks that end because ``block`` begins, or a unit of it; None stands for the end of the step, which ends
        all. A block of which a unit is running does not end before the step."""
        ended = [one for one, units in self._running.items() if block is None or (one != block and units == 0)]
        for one in ended:
            del self._running[one]
        return ended

    def settle(self) -> None:
        """Nothing runs any more, whatever an exception or an interrupt has left behind."""
        self._running.clear()
        self._called.clear()
