"""A tensor that comes home when somebody computes with it, and not before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from weightstream.streaming.handoff.away import Away

HOME, THERE = torch.device("cpu", 0), torch.device("cpu", 1)


class Moves:
    """Copies tensors, and remembers where to."""

    def __init__(self) -> None:
        self.to: list[torch.device] = []

    def __call__(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.to.append(device)
        return tensor.clone()


@pytest.fixture(params=[False, True], ids=["", "inference mode"])
def moves(request: pytest.FixtureRequest) -> Any:
    with torch.inference_mode(request.param):
        yield Moves()


def away(moves: Moves, *shape: int) -> tuple[Away, torch.Tensor]:
    """A tensor that is away, and the same at home."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return Away(tensor.clone(), THERE, HOME, moves), tensor


QUESTIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "shape": lambda x: (x.shape, x.size(), x.size(0), x.dim(), x.ndim, x.numel(), x.nbytes),
    "strides": lambda x: x.stride(),
    "dtype": lambda x: (x.dtype, x.element_size()),
    "device": lambda x: (x.device, x.is_cuda, x.is_cpu),
    "kind": lambda x: (isinstance(x, torch.Tensor), x.layout, x.requires_grad),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_are_answered_where_it_is(moves: Moves, question: str) -> None:
    tensor, plain = away(moves, 2, 3)
    assert QUESTIONS[question](tensor) == QUESTIONS[question](plain)
    assert moves.to == []


WEIGHT = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
COMPUTATIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "operator": lambda x: x * 2 + x,
    "function": lambda x: torch.nn.functional.layer_norm(x, (3,)),
    "method": lambda x: x.transpose(0, 1).contiguous(),
    "matrix product": lambda x: functional.linear(x, WEIGHT),
    "attention": lambda x: functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    "in a list": lambda x: torch.cat([x, x * 2], dim=1),
    "in a list by name": lambda x: torch.stack(tensors=(x, x)),
    "index": lambda x: x[:, 1:],
    "cast": lambda x: x.to(torch.float16),
    "data": lambda x: x.data,
    "as an argument of a plain one": lambda x: WEIGHT[:2].add(x, alpha=2),
    "out": lambda x: torch.add(x, 1, out=torch.empty(2, 3)),
    "several": lambda x: torch.cat(x.unbind(0)),
}


@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_who_computes_gets_plain_tensors_of_home(moves: Moves, computation: str) -> None:
    tensor, plain = away(moves, 2, 3)
    found = COMPUTATIONS[computation](tensor)
    assert type(found) is torch.Tensor
    assert torch.equal(found, COMPUTATIONS[computation](plain))
    assert moves.to == [HOME]


def test_memory_is_that_of_home(moves: Moves) -> None:
    tensor, _ = away(moves, 2, 3)
    assert tensor.data_ptr() == tensor.here().data_ptr() != 0
    assert moves.to == [HOME]


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "method": lambda x: x.mul_(2),
    "item": lambda x: x.__setitem__((slice(None), 1), 7.0),
    "view": lambda x: x[:, 1:].add_(1),
    "copy": lambda x: x.copy_(torch.ones(2, 3)),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_counts_for_everybody(moves: Moves, write: str) -> None:
    tensor, plain = away(moves, 2, 3)
    for x in (tensor, plain):
        WRITES[write](x)
    assert torch.equal(tensor + 0, plain)
    assert torch.equal(tensor.on(THERE), plain)
    assert moves.to == [HOME, THERE], "what was there before the write is used no more"


def test_an_operator_in_place_gives_a_plain_tensor(moves: Moves) -> None:
    tensor, plain = away(moves, 2, 3)
    tensor += 1
    assert torch.equal(tensor, plain + 1)


def test_the_next_device_gets_it_straight(moves: Moves) -> None:
    tensor, plain = away(moves, 2, 3)
    assert torch.equal(tensor.on(THERE), plain)
    assert moves.to == []
    third = torch.device("cpu", 2)
    assert torch.equal(tensor.on(third), plain)
    assert moves.to == [third]
    assert torch.equal(tensor.here(), plain)
    assert tensor.here() is tensor.here()
    assert moves.to == [third, HOME]


def test_it_says_where_it_is(moves: Moves) -> None:
    tensor, _ = away(moves, 2, 3)
    assert repr(tensor) == "Away((2, 3), torch.float32, on cpu:1, for cpu:0)"
    assert moves.to == []
