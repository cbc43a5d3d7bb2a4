"""What other processes know a unit's copies by."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..model.identity import identity_of, packed_identity, patched_identity
from ..model.layout import Layout
from ..model.packed_table import VERSION
from .weights import KnownSignature

NO_SIGNATURES: Mapping[str, object] = MappingProxyType({})


def key_of(layout: Layout, signatures: Mapping[str, object] = NO_SIGNATURES) -> bytes | None:
    """What others know a copy with these patches by; None where it is of use to this process alone."""
    raw = identity_of(layout)
    if raw is None or not signatures:
        return raw
    known = []
    for number, value in enumerate(layout.values):
        if (signature := signatures.get(value.name)) is not None:
            identity = signature.identity() if isinstance(signature, KnownSignature) else None
            if identity is None:
                return None
            known.append((number, identity))
    return patched_identity(raw, known)


def packed_key_of(layout: Layout, signatures: Mapping[str, object]) -> bytes | None:
    """As :func:`key_of`, for a packed copy."""
    key = key_of(layout, signatures)
    return None if key is None else packed_identity(key, f"version {VERSION}")


def check_files(layout: Layout) -> None:
    """Raise if a file is not the one that was loaded any more, before its state goes into a key."""
    for spec in layout.specs:
        if spec.source is not None:
            spec.source.file.check_unchanged()
