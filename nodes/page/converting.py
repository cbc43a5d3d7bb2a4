"""The route by which the page has a workflow converted: the same code as ``python -m streaming convert``."""

from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING, NoReturn

from aiohttp import web

from ...streaming import WorkflowError
from ...streaming.workflows.convert import Conversion, convert

if TYPE_CHECKING:
    from server import PromptServer

CONVERT_ROUTE = "/weightstream/v1/convert"


def add_convert_route(server: PromptServer) -> None:
    """Register the route: a workflow or prompt as JSON comes, and goes back with what was changed and what was not."""

    @server.routes.post(CONVERT_ROUTE)
    async def post_convert(request: web.Request) -> web.Response:
        try:
            conversion = await asyncio.to_thread(_convert, await request.text())
        except (ValueError, LookupError, RecursionError) as error:  # No JSON, an unknown encoding, nested too deeply.
            text = str(error) if isinstance(error, WorkflowError) else f"it is no JSON ({error})"
            return web.json_response({"error": text}, status=400)
        notes = [note.as_dict() for note in conversion.notes]
        return web.json_response({"workflow": conversion.workflow, "changed": conversion.changed, "notes": notes})


def _convert(text: str) -> Conversion:
    return convert(json.loads(text, parse_constant=_refuse, parse_float=_finite))


def _finite(text: str) -> float:
    return number if math.isfinite(number := float(text)) else _refuse(text)


def _refuse(text: str) -> NoReturn:
    """What comes back would be no JSON: it has no infinite numbers, and nothing that is no number."""
    raise WorkflowError(f"it has the number {text}, which JSON cannot carry")
