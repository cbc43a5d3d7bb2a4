"""Which steps of a MODEL in parallel run on one GPU, and which on all."""

from __future__ import annotations

from typing import Any

import pytest
from weightstream.nodes.parallel import verified


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that ran, on one GPU or on all, in order."""
    runs: list[str] = []
    for name in ("alone", "together"):
        method = getattr(verified._Step, name)

        def run(step: Any, *way: Any, method: Any = method, name: str = name) -> Any:
            runs.append(name)
            return method(step, *way)

        monkeypatch.setattr(verified._Step, name, run)
    return runs
