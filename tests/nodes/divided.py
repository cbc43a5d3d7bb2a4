"""Models of which several devices run each step, each with a part of the tokens, without the rest of the pack."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from weightstream.nodes.parallel.dividing import OVERRIDE
from weightstream.nodes.parallel.families import lists_of_blocks
from weightstream.streaming import CpuBackend, VirtualMemory
from weightstream.streaming.parallel.exchange import Exchange, Wires
from weightstream.streaming.parallel.relay import Relay, Workers
from weightstream.streaming.parallel.tokens import TokenPart
from weightstream.streaming.split.links import Links

WORKERS = Workers()
Around = Callable[[int], contextlib.AbstractContextManager[object]]


class InlineBackend(CpuBackend):
    """Copies on the thread that asks for them, which alone has the modes of torch that a test has entered."""

    def _create_stream(self) -> None:  # type: ignore[override]
        return None


@contextlib.contextmanager
def divide(
    models: Sequence[nn.Module],
    shares: Sequence[float],
    links: Links,
    move: Callable[[Any, int], Any],
    around: Around = lambda number: contextlib.nullcontext(),
    backend: type[CpuBackend] = CpuBackend,
) -> Iterator[list[list[int]]]:
    """Meanwhile the first of like models runs its steps on all of them. Yields a list that gets, for each step, how
    many blocks of each model were divided.

    Args:
        models: of the host, one for each device.
        shares: of each in the tokens.
        links: between the devices.
        move: gives arguments to the model of this number.
        around: what a model of this number runs in, on its thread.
        backend: of each device.
    """
    originals: list[Callable[..., torch.Tensor]] = [model.apply_model for model in models]
    devices = range(len(models))
    wires = Wires([backend(VirtualMemory(1, f"gpu:{number}")) for number in devices], links)
    divided: list[list[int]] = []

    def run(x: torch.Tensor, t: torch.Tensor, **named: Any) -> torch.Tensor:
        relay = Relay(devices)
        exchange = Exchange(wires, relay)
        parts = [TokenPart(number, shares, exchange) for number in devices]
        given = [move((x, t, named), number) for number in devices]

        def call(number: int) -> torch.Tensor:
            x, t, named = given[number]
            options = {**named.get("transformer_options", {}), OVERRIDE: parts[number].attention}
            root = models[number].diffusion_model
            with around(number), parts[number].watching(root, list(lists_of_blocks(root))):
                return originals[number](x, t, **{**named, "transformer_options": options})

        outputs = relay.run([partial(call, number) for number in devices], WORKERS)
        divided.append([part.divided for part in parts])
        return outputs[0]

    models[0].apply_model = run  # type: ignore[assignment]
    try:
        yield divided
    finally:
        del models[0].apply_model  # It leads back to the model, which would wait for the garbage collector.


def copied(value: Any) -> Any:
    """In containers and tensors of its own."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) is dict:
        return {name: copied(each) for name, each in value.items()}
    return type(value)(map(copied, value)) if type(value) in (list, tuple) else value
