"""The application: the page of each size, and what both models make of a text."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from functools import cache
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel

from twofold.errors import TwofoldError
from twofold.exploring.door import Door
from twofold.exploring.models import Models, RefusedError
from twofold.exploring.sizes import Size
from twofold.host.quiet import first_line
from twofold.report.messages import ENGLISH, Words
from twofold.serving.gate import Gate

QUEUE = 8  # requests at once, waiting ones too


class Asked(BaseModel, extra="forbid", strict=True):
    """A text, and the size that reads it beside the original."""

    size: str
    text: str
    chat: bool = False


def build_app(
    sizes: list[Size], models: Models | None, told: dict[str, Any], port: int, token: str, words: Words = ENGLISH
) -> Door:
    """Build the application.

    Args:
        models: None for runs of which the page alone is served.
        told: what every page is told of the server.
        port: where it listens: an address with another one is not its own.
        token: that an address must have.
        words: of the language of the pages.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    named, drawing = {size.name: size for size in sizes}, threading.Lock()
    make = cache(lambda name: named[name].page({**told, "page": name}, words))

    def page(size: str = sizes[0].name) -> Any:
        if size not in named:
            return _refusal(RefusedError("served.size", size=size), 404)
        with drawing:  # figures are drawn one at a time
            return HTMLResponse(make(size))

    app.get("/", response_model=None)(page)
    if models is not None:
        app.post("/read", response_model=None)(_answering(models.read))
        app.post("/answer", response_model=None)(_answering(models.answer))

    async def unreadable(_: Request, error: Exception) -> Any:
        return _refusal(RefusedError("served.unreadable"))

    async def refused(_: Request, error: Exception) -> Any:
        assert isinstance(error, RefusedError)
        return _refusal(error)

    async def failed(_: Request, error: Exception) -> Any:
        if not isinstance(error, TwofoldError):
            traceback.print_exception(error)
        return _refusal(RefusedError("served.failed", why=first_line(error)), 500)

    app.exception_handlers |= {RequestValidationError: unreadable, RefusedError: refused, Exception: failed}
    return Door(Gate(app, QUEUE), port, token)


def _answering(work: Callable[[str, str, bool], dict[str, Any]]) -> Callable[[Asked], Any]:
    """Return an endpoint; FastAPI runs it in a thread, so that others are answered meanwhile."""

    def endpoint(asked: Asked) -> Any:
        return JSONResponse(work(asked.size, asked.text, asked.chat))

    return endpoint


def _refusal(error: RefusedError, status: int = 400) -> JSONResponse:
    """Return an error by its key, so that the page says it in its language, and in words for others."""
    return JSONResponse({"error": {"message": str(error), "key": error.key, "values": error.values}}, status)
