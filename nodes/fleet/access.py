"""Who may use the front: everybody on this machine, and others who know the token."""

from __future__ import annotations

import hmac
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from ...fleet.config import FleetConfig

COOKIE = "weightstream_token"
QUERY = "token"
BEARER = "Bearer "


def guard(config: FleetConfig) -> Any:
    """A middleware that lets requests pass that know the token, if there is one.

    Programs send it as ``Authorization: Bearer TOKEN``. A browser opens the page with ``?token=TOKEN`` once, and gets a
    cookie that scripts cannot read and other sites cannot send.
    """
    token = config.token.encode()

    def knows(text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "surrogateescape"), token)

    @web.middleware
    async def middleware(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if not token:
            return await handler(request)
        header = request.headers.get("Authorization", "")
        if header.startswith(BEARER) and knows(header[len(BEARER) :]):
            return await handler(request)
        if knows(request.cookies.get(COOKIE, "")):
            return await handler(request)
        if request.method == "GET" and knows(request.query.get(QUERY, "")):
            if request.headers.get("Upgrade", "").lower() == "websocket":  # Which is led nowhere else.
                return await handler(request)
            left = [(name, value) for name, value in request.query.items() if name != QUERY]
            place = request.path + ("?" + urllib.parse.urlencode(left) if left else "")
            response = web.Response(status=302, headers={"Location": place})
            response.set_cookie(COOKIE, config.token, httponly=True, samesite="Strict")
            return response
        text = f"this fleet wants a token: open /?{QUERY}=TOKEN in a browser, or send Authorization: Bearer TOKEN"
        return web.json_response({"error": text}, status=401)

    return middleware
