"""Which factored modules of a checkpoint vLLM can hold by this plug-in, and a sentence for each that it can't."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from twofold.checkpoint.kinds import kind_of
from twofold.errors import TwofoldError
from twofold.nn.layers.factored import FactoredLinear

INSTEAD = "use `twofold export DIR --to dense`, whose output vLLM loads as any model"


def check_modules(modules: Mapping[str, Any]) -> None:
    """Refuse a checkpoint with a module of another kind than ``FactoredLinear`` with factors of floating point.

    Raises:
        TwofoldError: naming the first such module, and what is to be done.
    """
    for name, settings in modules.items():
        reason = _reason(name, settings)
        if reason is not None:
            raise TwofoldError(f"the plug-in for vLLM can't hold {name}: {reason}; {INSTEAD}")


def _reason(name: str, settings: Any) -> str | None:
    if not isinstance(settings, Mapping):
        return f"its settings in config.json must be a mapping, got {reprlib.repr(settings)}"
    kind, form = kind_of(settings), settings.get("form", "plain")
    if "bits" in settings or "group" in settings:
        return "its numbers are integers"
    if kind != FactoredLinear.KIND:
        return f"it is stored as a layer of the kind {reprlib.repr(kind)}"
    if form not in FactoredLinear.FORMS:
        return f"its form {reprlib.repr(form)} is none of {', '.join(FactoredLinear.FORMS)}"
    if type(settings.get("rank")) is not int:
        return f"it must have a whole number as its rank, got {reprlib.repr(settings.get('rank'))}"
    if ".experts." in name:
        return "vLLM merges the experts of a block into one weight"
    return None


def check_whole(name: str, parts: int) -> None:
    """Refuse to cut a factored layer among devices.

    Args:
        parts: the tensor parallel size of the layer.

    Raises:
        TwofoldError: if it is above 1.
    """
    if parts > 1:
        raise TwofoldError(
            f"the plug-in for vLLM does not cut factored layers among devices, and the tensor parallel size of {name} is "
            f"{parts}; set --tensor-parallel-size 1, or {INSTEAD}"
        )
