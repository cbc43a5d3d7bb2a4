"""Copies between devices keep strides, and pairs of GPUs are tried once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from weightstream.streaming import ConfigError
from weightstream.streaming.split import links
from weightstream.streaming.split.links import PEER_VARIABLE, Links

BASE = torch.arange(240.0).view(4, 6, 10)
TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "dense": lambda: BASE,
    "transposed": lambda: BASE.transpose(0, 2),
    "part": lambda: BASE[1:, 2:4, ::3],
    "repeated": lambda: BASE[:, :1].expand(4, 6, 10),
    "one row repeated": lambda: torch.arange(10.0).expand(7, 10),
    "one": lambda: torch.tensor(3.0),
    "empty": lambda: BASE[:0],
    "one in a dimension": lambda: BASE[:, 2:3],
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_copy_has_values_and_strides_of_the_original(name: str) -> None:
    tensor = TENSORS[name]()
    copy = Links().move(tensor, torch.device("cpu", 1))
    assert torch.equal(copy, tensor)
    wide = [number for number, size in enumerate(tensor.shape) if size > 1]  # Other strides say nothing.
    assert [copy.stride(number) for number in wide] == [tensor.stride(number) for number in wide]
    assert tensor.numel() == 0 or copy.data_ptr() != tensor.data_ptr()


def test_elements_that_overlap_are_copied_one_by_one() -> None:
    tensor = torch.arange(10.0).as_strided((4, 5), (1, 1))
    copy = Links().move(tensor, torch.device("cpu", 1))
    assert torch.equal(copy, tensor)
    assert copy.is_contiguous()


PAIR = (torch.device("cuda", 0), torch.device("cuda", 1))


@pytest.mark.parametrize("arrives", [True, False])
def test_a_pair_is_tried_once(monkeypatch: pytest.MonkeyPatch, arrives: bool) -> None:
    tried = []
    monkeypatch.setattr(links, "_try", lambda *pair: tried.append(pair) or arrives)
    ways = Links()
    assert [ways.is_sound(*PAIR) for _ in range(3)] == [arrives] * 3
    assert tried == [PAIR]
    assert [ways.is_unsound(*pair) for pair in (PAIR, PAIR[::-1])] == [not arrives, False], "that tries nothing"
    assert ways.is_sound(*reversed(PAIR)) is arrives
    assert len(tried) == 2


def test_straight_copies_may_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_try", lambda *pair: pytest.fail("it was tried"))
    monkeypatch.setenv(PEER_VARIABLE, "0")
    assert not Links().is_sound(*PAIR)
    monkeypatch.setenv(PEER_VARIABLE, "perhaps")
    with pytest.raises(ConfigError, match=PEER_VARIABLE):
        Links().is_sound(*PAIR)
