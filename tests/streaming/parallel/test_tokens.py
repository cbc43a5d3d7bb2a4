"""Blocks that get a part of the tokens: the same bits, and an error where the tokens would be put together wrongly."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from race import RaceBackend
from token_models import HEADS, WIDTH, Model, attend, plain, run_divided
from weightstream.streaming.parallel.exchange import Exchange
from weightstream.streaming.parallel.relay import HeldUpError
from weightstream.streaming.parallel.tokens import UndividedError

IMG, TXT = 11, 5
SHARES = [(1, 1), (3, 1), (1, 5), (1, 1, 1), (1, 2, 3)]


@pytest.fixture
def model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model().requires_grad_(False)


def tokens(count: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(count))


def check(model: Model, shares: tuple[float, ...] = (2, 1), batch: int = 1, divided: int = 6) -> None:
    img, txt = tokens(IMG, batch), tokens(TXT, batch)
    expected = model(img, txt, plain)
    outputs, parts = run_divided(model, img, txt, shares)
    assert all(torch.equal(output, expected) for output in outputs)
    assert [part.divided for part in parts] == [divided] * len(shares)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_same_bits(model: Model, shares: tuple[float, ...], batch: int) -> None:
    check(model, shares, batch)


def options(model: Model, which: str) -> None:
    total = TXT + IMG
    if which == "a mask of all queries":
        model.mask = torch.linspace(-1, 1, total * total).reshape(1, 1, total, total)
    elif which == "a mask of keys":
        model.mask = torch.linspace(-1, 1, total).reshape(1, 1, 1, total)
    elif which == "a gate of each token":
        model.gate = torch.linspace(0, 1, total)[None, :, None].repeat(1, 1, WIDTH)
    elif which == "a gate without tokens":
        model.gate = torch.linspace(0, 1, WIDTH)[None]
    elif which == "spans":
        model.spans = [(0, 4, 2.0), (4, None, 0.5)]
    elif which == "a place":
        model.begin = 7
    elif which == "tables in tuples":
        model.in_tuples = True


@pytest.mark.parametrize(
    "which",
    [
        *("a mask of all queries", "a mask of keys", "a gate of each token", "a gate without tokens", "spans"),
        *("a place", "tables in tuples"),
    ],
)
@pytest.mark.parametrize("shares", [(2, 1), (1, 1, 1)])
def test_what_goes_along_with_tokens(model: Model, which: str, shares: tuple[float, ...]) -> None:
    before = model(tokens(IMG), tokens(TXT), plain)
    options(model, which)
    assert (which == "tables in tuples") == torch.equal(model(tokens(IMG), tokens(TXT), plain), before)
    check(model, shares)


def test_what_has_neither_a_row_for_each_token_nor_one_for_all_is_not_divided(model: Model) -> None:
    model.gate = torch.ones(1, 2, WIDTH).repeat_interleave((TXT + IMG) // 2, 1)[:, : TXT + IMG]
    check(model)
    model.single[0].forward = lambda x, *_, **__: x  # Has no use for a gate of two rows.
    model.gate = torch.ones(1, 2, WIDTH)
    del model.single[1:]
    check(model, divided=3)


def test_blocks_that_are_asked_for_what_is_not_known_of_them_are_not_divided(model: Model) -> None:
    model.backwards = True
    check(model, divided=3)


def test_fewer_tokens_than_devices_are_not_divided(model: Model) -> None:
    img, txt = tokens(IMG), tokens(2)
    outputs, parts = run_divided(model, img, txt, (1, 1, 1))
    assert all(torch.equal(output, model(img, txt, plain)) for output in outputs)
    assert [part.divided for part in parts] == [3] * 3, "only those with all tokens in one stream"


def test_blocks_in_the_middle_may_be_skipped(model: Model) -> None:
    model.skipped = {1}
    check(model, divided=5)


Change = Callable[[int, Model], None]


def failing(change: Change, model: Model) -> None:
    run_divided(model, tokens(IMG), tokens(TXT), (1, 1), change)


def test_rows_that_are_not_put_together_are_an_error(model: Model) -> None:
    model.skipped = {2}
    with pytest.raises(UndividedError, match="the last of several Joint was not run"):
        failing(lambda *_: None, model)


def test_rows_that_are_not_put_together_at_the_end_are_an_error(model: Model) -> None:
    model.single_skipped = {2}
    with pytest.raises(UndividedError, match="the last of several Single was not run"):
        failing(lambda *_: None, model)


def test_a_table_with_other_rows_than_tokens_is_an_error(model: Model) -> None:
    model.spare_rows = 1
    with pytest.raises(UndividedError, match="a table has 17 rows for 16 tokens"):
        failing(lambda *_: None, model)


def test_rows_that_another_kind_of_attention_does_not_get_are_an_error(model: Model) -> None:
    def change(number: int, each: Model) -> None:
        block = each.single[1]
        block.inner.forward = lambda x, other, options: attend(x, x, x, HEADS)

    with pytest.raises(UndividedError, match="attention in Single is not the host's"):
        failing(change, model)


def test_a_block_that_cannot_be_divided_behind_one_that_was_is_an_error(model: Model) -> None:
    def change(number: int, each: Model) -> None:
        each.single[0].register_forward_hook(lambda *_: setattr(each, "gate", torch.ones(1, 2, WIDTH)))

    model.single[0].register_forward_hook(lambda *_: None)
    with pytest.raises(UndividedError, match="some Single can be divided and others cannot"):
        failing(change, model)


@pytest.mark.parametrize("rows", [2, 3, 40])
def test_a_mask_of_other_queries_is_an_error_by_name(model: Model, rows: int) -> None:
    """As one of keys for each of several prompts, which looks like one of so many queries."""
    model.mask = torch.zeros(rows, TXT + IMG)
    with pytest.raises(UndividedError, match=f"a table has {rows} rows for {TXT + IMG} tokens"):
        failing(lambda *_: None, model)


def test_devices_that_run_other_blocks_are_an_error(model: Model) -> None:
    def change(number: int, each: Model) -> None:
        each.skipped = {number}

    with pytest.raises(HeldUpError):
        failing(change, model)


@pytest.mark.parametrize("device", [0, 1, 2])
@pytest.mark.parametrize("where", ["joint.0", "joint.1", "single.0.inner", "single.1"])
def test_all_devices_begin_the_step_again_where_one_does(model: Model, device: int, where: str) -> None:
    """Its rows would go to other blocks than those that they are of."""
    expected = model(tokens(IMG), tokens(TXT), plain)

    def change(number: int, each: Model) -> None:
        if number == device:
            forward = each.forward
            each.forward = lambda *args: fails_first(forward, each, *args)

    def fails_first(forward: Callable[..., Any], each: Model, *args: Any) -> torch.Tensor:
        del each.forward
        hook = each.get_submodule(where).register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward(*args)
        hook.remove()
        return each(*args)

    found, parts = run_divided(model, tokens(IMG), tokens(TXT), (1, 2, 1), change)
    assert all(torch.equal(each, expected) for each in found)
    assert [part.divided for part in parts] == [6] * 3


def test_rows_are_let_go_at_the_end(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gather, posted = Exchange.gather, []

    def noted(self: Exchange, me: int, label: Any, tensors: Any, *args: Any) -> Any:
        posted.extend(map(weakref.ref, tensors))
        return gather(self, me, label, tensors, *args)

    monkeypatch.setattr(Exchange, "gather", noted)
    _, parts = run_divided(model, tokens(IMG), tokens(TXT), (1, 1), backend=lambda number: RaceBackend())
    assert len(parts) == 2
    assert len(posted) > 20
    assert not any(each() is not None for each in posted)


def test_nothing_stays_on_the_blocks(model: Model) -> None:
    img, txt = tokens(IMG), tokens(TXT)
    kept: list[Model] = []
    run_divided(model, img, txt, (1, 1), lambda number, each: kept.append(each))
    for each in kept:
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in each.modules())
        assert torch.equal(each(img, txt, plain), model(img, txt, plain))
