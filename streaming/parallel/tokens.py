"""One device's part in a step that several compute: blocks get the rows of its own tokens.

[Note: rows that are somebody else's]
A model's forward is left as it is, and every device runs all of it. A block that is divided gets views of the rows of
its device's tokens, and what it returns is put where these rows are; the other rows stay what they were, and nobody has
computed them. Between the blocks of a list a model does with tokens what it does with each by itself (residuals are
added), so rows that were right stay right. Before it does anything else all rows are put together: the last block of
each list is followed by an exchange, after which every device has the whole. Attention gets keys and values of all
tokens, in their order, for the queries of its own.

So each row is computed by one device as it would be by one alone, from the same numbers. That kernels give the same
bits for some rows as for all is not taken for granted: the first step is done both ways (docs/parallel.md).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import StreamingError
from .cut import cut
from .exchange import Exchange
from .kinds import Kind


class UndividedError(StreamingError):
    """The blocks do not do with tokens what is known of their kind; the message says what."""


class _Open:
    """A block that runs with a part of the tokens.

    Attributes:
        label: how many were divided before in this step, the number of its list, and its place there.
        kind: of the block.
        given: its arguments of the sequence, whole, by name.
        parts: for each of them the rows of every device.
        rows: of this device, which the block is given instead.
        has_attended: whether keys and values of all devices were put together for it.
    """

    def __init__(
        self, label: tuple[int, ...], kind: Kind, given: dict[str, torch.Tensor], parts: dict[str, list[range]]
    ) -> None:
        self.label = label
        self.kind = kind
        self.given = given
        self.parts = parts
        self.rows: dict[str, torch.Tensor] = {}
        self.has_attended = False

    @property
    def lengths(self) -> list[list[int]]:
        return [[len(rows) for rows in self.parts[name]] for name in self.kind.sequence]

    def along(self, tensor: torch.Tensor, axis: int, me: int) -> torch.Tensor:
        """The rows of one device of a tensor along the whole sequence."""
        total = sum(parts[-1].stop for parts in self.parts.values())
        if tensor.shape[axis] != total:
            raise UndividedError(f"a table has {tensor.shape[axis]} rows for {total} tokens")
        begin, found = 0, []
        for name in self.kind.sequence:
            rows = self.parts[name][me]
            found.append(tensor.narrow(axis, begin + rows.start, len(rows)))
            begin += self.parts[name][-1].stop
        return found[0] if len(found) == 1 else torch.cat(found, axis)


@functools.lru_cache(maxsize=64)
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    """Of a block's forward, which is asked for each block in each step."""
    return inspect.signature(kind.forward)


class TokenPart:
    """The part of one device.

    Args:
        me: its number.
        shares: of all devices, in the tokens.
        exchange: with the others.

    Attributes:
        divided: how many blocks have got a part of the tokens.
    """

    def __init__(self, me: int, shares: Sequence[float], exchange: Exchange) -> None:
        self._me = me
        self._shares = shares
        self._exchange = exchange
        self._open: _Open | None = None
        self._among_all = False
        self._has_begun = False
        self._unjoined: Sequence[nn.Module] | None = None
        self._tables: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self.divided = 0

    @contextmanager
    def watching(self, root: nn.Module, lists: Sequence[tuple[Sequence[nn.Module], Kind]]) -> Iterator[TokenPart]:
        """While this lasts, in which ``root`` runs once, the blocks of ``lists`` in it get this device's tokens.

        Raises:
            UndividedError: the blocks do not do with tokens what is known of their kind.
            HeldUpError: another device has failed, or does something else.
            BegunAgainError: another device has begun the step again, and this one has to.
        """
        self._forget()
        handles: list[RemovableHandle] = []
        try:
            handles.append(root.register_forward_pre_hook(self._begin_step))
            for number, (blocks, kind) in enumerate(lists):
                for place, block in enumerate(blocks):
                    handles += self._watch(block, kind, blocks, (number, place))
            yield self
            self._check_joined(None)
            self._exchange.finish(self._me)
        finally:
            for handle in handles:
                handle.remove()
            self._forget()

    def _forget(self) -> None:
        """What is known in the middle of a step."""
        self._has_begun = self._among_all = False
        self._open = self._unjoined = None
        self._tables.clear()

    def _watch(
        self, block: nn.Module, kind: Kind, among: Sequence[nn.Module], place: tuple[int, int]
    ) -> list[RemovableHandle]:
        signature = _signature(type(block))

        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            self._check_joined(among)
            return self._begin(module, kind, place, signature, args, kwargs)

        def end(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            if self._open is None:
                return None
            self._unjoined = None if module is among[-1] else among
            return self._end(module, output, is_last=module is among[-1])

        handles = [
            block.register_forward_pre_hook(begin, with_kwargs=True),
            block.register_forward_hook(end, with_kwargs=True),
        ]
        for name in kind.attends:
            inner = block.get_submodule(name)
            handles.append(inner.register_forward_pre_hook(lambda *_: self._attend(True)))
            handles.append(inner.register_forward_hook(lambda *_: self._attend(False)))
        return handles

    def _begin_step(self, *_: object) -> None:
        """The model begins. For lack of memory say, it may do so again in the same step, and then the others do too:
        they are past the blocks that the rows of this device would go to."""
        if self._has_begun:
            self._forget()
            self._exchange.begin_again(self._me)
        self._has_begun = True
        self.divided = 0

    def _check_joined(self, among: Sequence[nn.Module] | None) -> None:
        """Rows of a list of blocks must be put together before anything but a block of that list gets them."""
        if self._unjoined is not None and self._unjoined is not among:
            raise UndividedError(f"the last of several {type(self._unjoined[0]).__name__} was not run")

    def _attend(self, among_all: bool) -> None:
        self._among_all = among_all and self._open is not None

    def _begin(
        self,
        block: nn.Module,
        kind: Kind,
        place: tuple[int, int],
        signature: inspect.Signature,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        bound = signature.bind(block, *args, **kwargs)
        given = bound.arguments
        opened = self._divide(kind, place, given)
        if opened is None:
            if self._unjoined is not None:
                raise UndividedError(f"some {type(block).__name__} can be divided and others cannot")
            return None
        self._open, self._among_all = opened, not kind.attends
        self.divided += 1
        for name, whole in opened.given.items():
            rows = opened.parts[name][self._me]
            given[name] = opened.rows[name] = whole.narrow(kind.tokens, rows.start, len(rows))
        for name, axis in kind.along.items():
            given[name] = _each(given.get(name), partial(self._table, axis=axis, opened=opened))
        for name, (owner, axis) in kind.along_one.items():
            rows, total = opened.parts[owner][self._me], opened.parts[owner][-1].stop
            given[name] = _each(given.get(name), partial(_rows_of, kind=kind, axis=axis, rows=rows, total=total))
        for name, owner in kind.spans.items():
            if given.get(name) is not None:
                given[name] = _spans(given[name], opened.parts[owner][self._me])
        for name, owner in kind.places.items():
            if given.get(name) is not None:
                rows = opened.parts[owner][self._me]
                given[name] = min(max(given[name] - rows.start, 0), len(rows))
        return bound.args[1:], bound.kwargs

    def _divide(self, kind: Kind, place: tuple[int, int], given: dict[str, Any]) -> _Open | None:
        """How the block's tokens are divided; None if it computes all of them here."""
        if any(given.get(name) is not None for name in kind.absent):
            return None
        if not self._fit(kind, given):
            return None
        found = {name: given.get(name) for name in kind.sequence}
        if not all(isinstance(each, torch.Tensor) and each.ndim == kind.tokens + 2 for each in found.values()):
            return None
        if any(each.shape[kind.tokens] < len(self._shares) for each in found.values()):
            return None
        parts = {name: cut(each.shape[kind.tokens], self._shares) for name, each in found.items()}
        return _Open((self.divided, *place), kind, found, parts)

    def _fit(self, kind: Kind, given: dict[str, Any]) -> bool:
        """Whether what goes along with the tokens of one argument has a row for each of them, or one for all."""
        for name, (owner, axis) in kind.along_one.items():
            total = given[owner].shape[kind.tokens] if isinstance(given.get(owner), torch.Tensor) else 0
            for tensor in _flat(given.get(name)):
                if tensor.ndim >= kind.least_dims and tensor.shape[axis] not in (1, total):
                    return False
        return True

    def _table(self, tensor: torch.Tensor, axis: int, opened: _Open) -> torch.Tensor:
        """The rows of a table that is the same for many blocks."""
        key = id(tensor), axis, *(parts[-1].stop for parts in opened.parts.values())
        known = self._tables.get(key)
        if known is None or known[0] is not tensor:
            known = self._tables[key] = tensor, opened.along(tensor, axis, self._me)
        return known[1]

    def _end(self, block: nn.Module, output: Any, is_last: bool) -> Any:
        opened, self._open, self._among_all = self._open, None, False
        assert opened is not None
        if not opened.has_attended:
            raise UndividedError(f"attention in {type(block).__name__} is not the host's")
        single = isinstance(output, torch.Tensor)
        outputs = (output,) if single else tuple(output)
        found = [self._put(opened, *each, is_last) for each in zip(opened.kind.returns, outputs, strict=True)]
        return found[0] if single else type(output)(found)

    def _put(self, opened: _Open, name: str, rows: torch.Tensor, is_last: bool) -> torch.Tensor:
        """What a block returns, with all rows: this device's are right; after the last block all are."""
        parts, tokens = opened.parts[name], opened.kind.tokens
        if is_last:
            return self._exchange.gather(
                self._me, (*opened.label, name), [rows], tokens, [[len(each) for each in parts]]
            )[0]
        whole = opened.given[name]
        if rows is opened.rows[name]:  # The block has changed them in place.
            return whole
        placed = rows.new_empty((*rows.shape[:tokens], whole.shape[tokens], *rows.shape[tokens + 1 :]))
        mine = parts[self._me]
        placed.narrow(tokens, mine.start, len(mine)).copy_(rows)
        return placed

    def attention(
        self,
        attend: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The host's attention for the queries of this device's tokens.

        Shapes are (batch, heads, tokens, channels) with ``skip_reshape``, else (batch, tokens, channels).
        """
        opened = self._open
        if opened is None or not self._among_all:
            return attend(q, k, v, heads, mask, *args, **kwargs)
        axis = 2 if kwargs.get("skip_reshape") else 1
        opened.has_attended = True
        k, v = self._exchange.gather(self._me, opened.label, [k, v], axis, opened.lengths)
        if mask is not None and mask.ndim > 1 and mask.shape[-2] not in (1, q.shape[axis]):
            mask = opened.along(mask, mask.ndim - 2, self._me)
        return attend(q, k, v, heads, mask, *args, **kwargs)


def _each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A tensor, or those in tuples and lists, changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)(_each(each, change) for each in value) if isinstance(value, (tuple, list)) else value


def _flat(value: Any) -> list[torch.Tensor]:
    """A tensor, or those in tuples and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for each in value for tensor in _flat(each)] if isinstance(value, (tuple, list)) else []


def _rows_of(tensor: torch.Tensor, kind: Kind, axis: int, rows: range, total: int) -> torch.Tensor:
    if tensor.ndim < kind.least_dims or tensor.shape[axis] != total:
        return tensor
    return tensor.narrow(axis, rows.start, len(rows))


def _spans(spans: Sequence[Sequence[int | None]], rows: range) -> list[tuple[int | None, ...]]:
    """Those of the spans, or the parts of them, that are in ``rows``, counted from there."""
    found: list[tuple[int | None, ...]] = []
    for begin, end, *more in spans:
        first, last = max(begin or 0, rows.start), rows.stop if end is None else min(end, rows.stop)
        if first < last:
            found.append((first - rows.start, last - rows.start, *more))
    return found
