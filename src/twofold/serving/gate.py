"""The door of the server: so many requests and no more, and none goes on for a client that has left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LARGEST = 16 << 20  # bytes of a request


class Gate:
    """An ASGI application around another one, which lets ``limit`` requests for answers in at once.

    One more gets the status 503 with a sentence. A request whose client leaves before the answer begins is cancelled; once the
    answer streams, the application learns of it as of any other disconnection.
    """

    def __init__(self, app: App, limit: int) -> None:
        self.app, self.limit = app, limit
        self.inside = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.inside >= self.limit:
            sentence = f"the queue is full ({self.limit} requests); try again in a moment"
            await refuse(send, 503, sentence, "overloaded", [(b"retry-after", b"1")])
            return
        self.inside += 1
        within = True

        def leave() -> None:
            nonlocal within
            self.inside -= within
            within = False

        async def give(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                leave()  # before the client has all of it, and may ask again
            await send(message)

        try:
            await self._run(scope, receive, give)
        finally:
            leave()

    async def _run(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > LARGEST:
                await refuse(send, 413, f"a request may have {LARGEST >> 20} MiB, this one has more", "too_large")
                return
        left, began = asyncio.Event(), asyncio.Event()
        given = False

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": bytes(body), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def forward(message: Message) -> None:
            began.set()
            await send(message)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()
            if not began.is_set():
                answer.cancel()

        answer = asyncio.ensure_future(self.app(scope, replay, forward))
        watcher = asyncio.ensure_future(watch())
        try:
            await answer
        except asyncio.CancelledError:
            if not left.is_set():  # it was not the client: the server stops
                answer.cancel()
                raise
        finally:
            watcher.cancel()


async def refuse(
    send: Send, status: int, sentence: str, code: str, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    """Answer with an error as OpenAI's API words it."""
    content = json.dumps(error_body(status, sentence, code)).encode()
    fields = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": fields + (headers or [])})
    await send({"type": "http.response.body", "body": content})


def error_body(status: int, sentence: str, code: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's API words it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": sentence, "type": kind, "param": None, "code": code}}
