"""Admission to the server: a limited number of requests, and none goes on for a client that has left."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST = 16 << 20  # bytes of a request


class Gate:
    """An ASGI application around another one, which lets ``limit`` requests for answers in at once.

    One more gets the status 503 with a sentence. A request whose client leaves before the answer begins is cancelled; once the
    answer streams, the application learns of it as of any other disconnection.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.inside >= self.limit:
            sentence = f"the queue is full ({self.limit} requests); try again in a moment"
            await refusal(503, sentence, "overloaded", {"retry-after": "1"})(scope, receive, send)
            return
        self.inside += 1
        with ExitStack() as place:
            place.callback(self._leave)

            async def give(message: Message) -> None:
                if message["type"] == "http.response.body" and not message.get("more_body", False):
                    place.close()  # before the client has all of it, and may ask again
                await send(message)

            await self._run(scope, receive, give)

    def _leave(self) -> None:
        self.inside -= 1

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > LARGEST:
                sentence = f"a request may have {LARGEST >> 20} MiB, this one has more"
                await refusal(413, sentence, "too_large")(scope, receive, send)
                return
        left, began = asyncio.Event(), asyncio.Event()
        messages: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            if messages:
                return messages.pop()
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


def refusal(status: int, sentence: str, code: str | None = None, headers: dict[str, str] | None = None) -> Any:
    """Return the response with an error as OpenAI's API words it."""
    from starlette.responses import JSONResponse

    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": sentence, "type": kind, "param": None, "code": code}}, status, headers)
