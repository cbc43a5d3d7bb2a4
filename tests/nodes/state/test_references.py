"""What refers to a module: also a table of a pack that knows it, its identity or what was made of it."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from weightstream.nodes.state.references import refers_to

TABLE: dict[Any, Any] = {}
WEAK: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
itself = sys.modules[__name__]


@pytest.fixture(autouse=True)
def empty_tables() -> Iterator[None]:
    yield
    for table in (TABLE, WEAK, Compiler.compiled):
        table.clear()


def looks_up(model: Any) -> Any:
    return TABLE.get(model)


def looks_up_weakly(model: Any) -> Any:
    return WEAK.get(model)


def asks_another(model: Any) -> Any:
    return looks_up(model)


def looks_up_in_a_module(model: Any) -> Any:
    return itself.TABLE.get(model)


def looks_up_later(model: Any) -> Any:
    return [lambda: TABLE[model]]


class Compiler:
    compiled: ClassVar[dict[Any, Any]] = {}

    def __call__(self, model: Any) -> Any:
        return self.compiled[model]


class WithMethod:
    def __call__(self, model: Any) -> Any:
        return looks_up(model)


CALLERS = [looks_up, asks_another, looks_up_in_a_module, looks_up_later, Compiler(), WithMethod()]


def check_refers(caller: Any, module: torch.nn.Module) -> None:
    for carried in ([caller], [{"wrappers": [functools.partial(caller, 1)]}], [lambda: caller]):
        assert refers_to(carried, {id(module)})
        assert not refers_to(carried, {id(torch.nn.Linear(1, 1))})


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("key", ["module", "identity", "weak", "value"])
def test_a_table_of_a_pack_refers_to_what_it_is_about(caller: Any, key: str) -> None:
    module = torch.nn.Linear(1, 1)
    for table in (TABLE, Compiler.compiled):
        table |= {"module": {module: 1}, "identity": {id(module): 1}, "weak": {weakref.ref(module): 1}}.get(key, {})
        table |= {1: [torch.nn.Sequential(module)]} if key == "value" else {}
    check_refers(caller, module)


def test_a_table_that_keeps_nothing_alive() -> None:
    module = torch.nn.Linear(1, 1)
    WEAK[module] = 1
    check_refers(looks_up_weakly, module)


def has_attributes_of_that_name(model: Any) -> Any:
    return model.TABLE, model.looks_up


def test_tables_that_nobody_asks_are_none() -> None:
    module = torch.nn.Linear(1, 1)
    TABLE[module] = WEAK[module] = 1
    assert not refers_to([has_attributes_of_that_name], {id(module)})
    assert not refers_to([check_refers, functools.partial(print, 1), torch.nn.functional.gelu], {id(module)})
    assert not refers_to([1, "text", {2: [None]}], {id(module)})
