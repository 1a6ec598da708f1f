"""The OpenAI API of one model: transformers' own server, pinned to a model, behind a gate."""

from __future__ import annotations

import importlib.util
import logging
import socket
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError
from twofold.model.generation import answering_generation
from twofold.model.load import LoadedModel, load_model, need_tokenizer
from twofold.serving.gate import Gate, refusal
from twofold.task.causal_lm import need_writer

INSTALL = "pip install 'twofold[serve]'"
PACKAGES = ("fastapi", "uvicorn", "openai")
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
QUEUE = 64
SECONDS = 5  # that answers under way have when the server is stopped


def check_installed(command: str = "serve", packages: Iterable[str] = PACKAGES) -> None:
    """Refuse to serve without the packages that a command needs.

    Raises:
        TwofoldError: naming those that are missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise TwofoldError(f"twofold {command} needs {' and '.join(missing)}, not installed here: {INSTALL}")


def build_app(loaded: LoadedModel, name: str, queue: int = QUEUE) -> Gate:
    """Build the application: chat, completion, the list of the one model, and the state of health.

    Args:
        name: of the model, for clients.
        queue: requests that may wait or be answered at once; another one is refused.

    Raises:
        TwofoldError: if the model has no tokenizer, or does not decode.
    """
    check_installed()
    tokenizer = need_tokenizer(loaded)
    need_writer(loaded.model, loaded.name, "so it can't answer")
    if not getattr(tokenizer, "is_fast", False):
        raise TwofoldError(
            f"{loaded.name} has a slow tokenizer, and answers are streamed with fast ones (tokenizer.json)"
        )
    from fastapi import HTTPException, Request
    from fastapi.exceptions import RequestValidationError

    try:
        from transformers.cli.serving.server import build_server

        from twofold.serving.generation import Chat, Complete, OneModel, State
    except ImportError as error:
        raise TwofoldError(
            f"this transformers has not the server that twofold serve builds on ({error}); install 5.23 or newer"
        ) from error

    loaded.model.generation_config = answering_generation(loaded.model)  # one answer at a time, streamed
    manager, state = OneModel(loaded, name), State(loaded)
    app: Any = build_server(
        manager,
        Chat(manager, state),
        completion_handler=Complete(manager, state),
        response_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]

    async def refused(_: Request, error: HTTPException) -> Any:
        return refusal(error.status_code, str(error.detail))

    async def unreadable(_: Request, error: RequestValidationError) -> Any:
        return refusal(400, "the request is no JSON object")

    async def failed(_: Request, error: Exception) -> Any:
        traceback.print_exception(error)
        return refusal(500, f"the server failed ({type(error).__name__}: {error})")

    app.exception_handlers |= {HTTPException: refused, RequestValidationError: unreadable, Exception: failed}
    return Gate(app, queue)


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    queue: int = QUEUE,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Answer OpenAI's API until the process is stopped.

    Args:
        port: 0 takes any that is free.

    Raises:
        TwofoldError: if the model can't be loaded, or the place is taken.
    """
    check_installed()
    place = listen(host, port)
    import uvicorn

    name = Path(model).name or Path(model).resolve().name
    app = build_app(load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code), name, queue)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SECONDS)
    print(f"Serving {name} at http://{host}:{place.getsockname()[1]}/v1 (Ctrl-C ends it)", flush=True)
    uvicorn.Server(config).run(sockets=[place])


def listen(host: str, port: int, other: str = "`port` or `host`") -> socket.socket:
    """Open a socket that listens at a place.

    Args:
        other: the settings that name another place.

    Raises:
        TwofoldError: if it is taken, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        place = socket.socket(family, kind, protocol)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
        place.listen(128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TwofoldError(f"can't listen at {host}:{port} ({reason}); name another {other}") from error
    return place
