"""twofold explore: a server for the user of this machine alone."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError
from twofold.exploring.models import ANSWER, Models
from twofold.exploring.sizes import Size, find_sizes
from twofold.host.progress import say
from twofold.model.place import find_model
from twofold.model.tokenizer import read_tokenizer
from twofold.report.messages import Words
from twofold.report.names import model_title
from twofold.serving.server import SECONDS, check_installed, listen
from twofold.task.causal_lm import CausalLM
from twofold.task.text.chat import has_template

HOST = "127.0.0.1"


def explore(
    folder: Path | str,
    *,
    port: int = 8321,
    against: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    lang: str = "en",
) -> None:
    """Serve the page of a run on this machine until the process is stopped, with both models to ask.

    Args:
        folder: of a compressed model, or one that holds several sizes of the same original.
        port: 0 takes any that is free.
        against: the original; by default the one that the run names.
        lang: of the page, ``en`` or ``es``.

    Raises:
        TwofoldError: if there is no compressed model, its original is not there, or the port is taken.
    """
    check_installed("explore", ("fastapi", "uvicorn"))
    words = Words(lang)
    sizes = find_sizes(Path(folder).expanduser())
    models = find_models(sizes, against, {"dtype": dtype, "device": device})
    place = listen(HOST, port, "`port`")
    port = place.getsockname()[1]
    import uvicorn

    from twofold.exploring.app import build_app

    token = secrets.token_urlsafe(24)
    app = build_app(sizes, models, tell_page(sizes, models), port, token, words)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SECONDS)
    names = ", ".join(size.name for size in sizes)
    print(f"Exploring {names} at http://{HOST}:{port}/?token={token} (Ctrl-C ends it)", flush=True)
    uvicorn.Server(config).run(sockets=[place])


def find_models(sizes: list[Size], against: str | None, how: dict[str, Any]) -> Models | None:
    """Find the original of some sizes; nothing is loaded yet. None if they are no language models that write.

    Raises:
        TwofoldError: if it is not there.
    """
    recipe = sizes[0].run.recipe
    if sizes[0].run.task != CausalLM.name:
        say(
            f"the page alone is served: texts are for language models, and this run is for {sizes[0].run.task or 'no task'}"
        )
        return None
    only = {} if against else {"revision": recipe.revision, "dequantize": recipe.dequantize}
    original = against or recipe.model
    try:
        find_model(original, only.get("revision"))
    except TwofoldError as error:
        raise TwofoldError(f"the original of {sizes[0].name} is not there: {error}; or give it by `against`") from error
    return Models(sizes, original, how, only)


def tell_page(sizes: list[Size], models: Models | None) -> dict[str, Any]:
    """Return what every page is told of the server, as web/src/served.ts reads it."""
    first = sizes[0]
    tokenizer, _ = read_tokenizer(first.folder, {"trust_remote_code": False}) if models else (None, "")
    return {
        "original": model_title(first.run.recipe.model if models is None else models.original),
        "task": first.run.task,
        "asks": models is not None,
        "chat": has_template(tokenizer),
        "answer": ANSWER,
        "sizes": [size.told for size in sizes],
    }
