"""The route by which the page has a workflow converted: the same code as ``python -m streaming convert``."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp import web

from ...streaming import WorkflowError
from ...streaming.workflows.convert import Conversion, convert
from ...streaming.workflows.reading import read_workflow

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
    return convert(read_workflow(text))
