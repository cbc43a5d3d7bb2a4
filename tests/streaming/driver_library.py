"""The CUDA driver's library, whose functions are Python's, and strict. Which device it is: the second of two."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

CONTEXT = 0xC0


class DriverLibrary:
    """What every program asks of the driver; what it asks more is in a subclass.

    Args:
        prototypes: the arguments of the functions that there are.

    Attributes:
        fails: codes that functions give instead of doing anything, by their names.
        contexts: that a thread is in now.
        retained: how often the device's context was asked for.
    """

    def __init__(self, prototypes: dict[str, Collection[Any]]) -> None:
        self.fails: dict[str, int] = {}
        self.contexts: list[int] = []
        self.retained = 0
        self._prototypes = prototypes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._prototypes:
            raise AttributeError(name)
        function = getattr(type(self), "do_" + name)

        def call(*arguments: Any) -> int:
            assert len(arguments) == len(self._prototypes[name])
            return self.fails.get(name) or function(self, *map(self.value_of, arguments)) or 0

        return call

    def value_of(self, argument: Any) -> Any:
        """What a function is given of an argument."""
        return argument.value if hasattr(argument, "value") else argument

    def do_cuInit(self, flags: int) -> None:
        assert flags == 0

    def do_cuGetErrorName(self, code: int, text: Any) -> None:
        text._obj.value = b"CUDA_ERROR_OF_SOME_KIND"

    def do_cuDeviceGet(self, device: Any, ordinal: int) -> None:
        assert ordinal == 1
        device._obj.value = 1

    def do_cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        assert device == 1
        self.retained += 1
        context._obj.value = CONTEXT

    def do_cuCtxPushCurrent_v2(self, context: int) -> None:
        assert context == CONTEXT
        self.contexts.append(context)

    def do_cuCtxPopCurrent_v2(self, context: Any) -> None:
        context._obj.value = self.contexts.pop()

    def check_context(self) -> None:
        assert self.contexts == [CONTEXT], "a thread may be in no context, or in that of another device"
