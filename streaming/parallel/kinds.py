"""What a kind of block does with tokens: the description of a family is a few of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Kind:
    """One kind of block. Names are those of its forward's arguments.

    Attributes:
        sequence: the arguments that hold tokens, in the order of their tokens in attention.
        returns: what the block returns, as the arguments that it takes the place of, in order.
        tokens: the axis of tokens in these; channels follow it.
        along: further tensors along all tokens of the sequence, alone or in tuples, such as rotary tables: the axis.
        along_one: further tensors along the tokens of one argument, alone or in tuples: that argument, and the axis.
            One row there is the same for all tokens.
        least_dims: of tensors in ``along_one``: with fewer axes they have none of tokens.
        spans: lists of (first, end, ...) of tokens of one argument: that argument.
        places: numbers of a token of one argument, at which something begins: that argument.
        absent: arguments with which a block is not divided, unless they are None or missing.
        attends: modules in it in which attention is among all tokens; empty where all of its attention is.
    """

    sequence: tuple[str, ...]
    returns: tuple[str, ...]
    tokens: int = 1
    along: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    along_one: Mapping[str, tuple[str, int]] = field(default_factory=lambda: MappingProxyType({}))
    least_dims: int = 0
    spans: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    places: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    absent: tuple[str, ...] = ()
    attends: tuple[str, ...] = ()
