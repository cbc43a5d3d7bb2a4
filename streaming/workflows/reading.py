"""Reads the JSON of a workflow as strictly as it is written again."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from ..errors import WorkflowError


def read_workflow(text: str) -> Any:
    """Return what a text has as JSON.

    Raises:
        WorkflowError: it has a number that JSON cannot carry, so what is written of it would be no JSON.
        ValueError: it is no JSON. (A WorkflowError is one too.)
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def _finite(text: str) -> float:
    return number if math.isfinite(number := float(text)) else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise WorkflowError(f"it has the number {text}, which JSON cannot carry")
