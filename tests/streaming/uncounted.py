"""Devices of tests whose memory nobody counts."""

from __future__ import annotations

from weightstream.streaming import Backend, DeviceMemory


class UncountedBackend(Backend):
    """Has as much memory as anybody asks for; nothing of it is kept for later, and it goes with the last reference."""

    def memory(self) -> DeviceMemory:
        return DeviceMemory(1 << 40, 0)

    def keep(self, nbytes: int) -> None:
        """Nothing is kept for later."""

    def watch_peak(self) -> None:
        """Nobody counts."""

    def peak_bytes(self) -> None:
        return None

    def give_back(self) -> None:
        """Memory goes with the last reference to it."""

    def trim(self) -> int:
        return 0
