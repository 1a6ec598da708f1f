"""Who may ask the server: whoever has the token of its address, at that address."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = (  # of every answer; the address holds the token, so it goes nowhere else and is not kept
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)


class Door:
    """An ASGI application around another one, which is closed to all but the page that it gave out.

    A request without the token, or for another host (a name that was pointed at this machine afterwards), gets the status 403.
    """

    def __init__(self, app: ASGIApp, port: int, token: str) -> None:
        self.app, self.token = app, token.encode()
        names = ("127.0.0.1", "localhost")
        self.hosts = {f"{name}:{port}".encode() for name in names} | (
            {n.encode() for n in names} if port == 80 else set()
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        if scope["type"] == "http" and self._admits(scope):
            await self.app(scope, receive, sealed)
            return
        from starlette.responses import PlainTextResponse

        words = "open the whole address that twofold explore printed, with its token\n"
        await PlainTextResponse(words, 403)(scope, receive, sealed)

    def _admits(self, scope: Scope) -> bool:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        known = len(given) == 1 and secrets.compare_digest(given[0].encode(), self.token)
        return known and len(hosts) == 1 and hosts[0].lower() in self.hosts
