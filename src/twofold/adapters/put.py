"""An adapter put on a loaded model, where PEFT is installed."""

from __future__ import annotations

from pathlib import Path

from twofold.checkpoint.peft.register import need_packages
from twofold.model.load import LoadedModel


def put_adapter(loaded: LoadedModel, adapter: str) -> None:
    """Put a PEFT adapter on a loaded model.

    Raises:
        TwofoldError: if PEFT is not installed, there is no such adapter, or it does not belong to the model.
    """
    need_packages("peft")
    from twofold.adapters.folder import load_adapter

    loaded.model = load_adapter(loaded.model, Path(adapter).expanduser(), "default", loaded).eval()
    loaded.name = f"{loaded.name} with {adapter}"
