"""Where a model is: a folder, a GGUF file, the hub, or the built-in alias. Nothing here loads PyTorch."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from twofold.errors import TwofoldError
from twofold.model.builtin import ALIAS

KNOWN = f"name a folder, a hub id, a .gguf file, or {ALIAS}"


def find_model(name: str, revision: str | None = None) -> Path | None:
    """Find the folder or GGUF file that a name stands for; None for a model of the hub, and for the built-in one.

    Raises:
        TwofoldError: if there is no such model.
    """
    if name == ALIAS:
        return None
    try:
        path = Path(name).expanduser()
        path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, an unknown ~user
        reason = getattr(error, "strerror", None) or error
        raise TwofoldError(f"the model {name[:80]!r} can't be found: {reason}") from error
    if path.is_file() and path.suffix != ".gguf":
        raise TwofoldError(f"{name} is a file but not a .gguf; name the folder of a Transformers checkpoint")
    if path.is_file() or path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise TwofoldError(f"there is no folder {name}; {KNOWN}")
    _check_hub(name, revision)
    return None


@lru_cache
def _check_hub(name: str, revision: str | None) -> None:
    """Refuse a name that is neither in the cache of the hub nor on the hub; asked once, and not repeated.

    Raises:
        TwofoldError: if the hub has no such model, or can't be reached.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from twofold.host.quiet import first_line

    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
    except Exception as error:
        reason = "the hub can't be reached"  # no network, no name server, offline by a setting …
        if isinstance(error, HfHubHTTPError | HFValidationError):
            response = getattr(error, "response", None)
            if response is not None and (response.status_code == 429 or response.status_code >= 500):
                return  # transformers asks again
            reason = "no such model on the hub"
        raise TwofoldError(f"there is no folder {name}, and {reason} ({first_line(error)}); {KNOWN}") from error
