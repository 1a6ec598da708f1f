"""Which factored modules of a checkpoint vLLM can hold by this plug-in, and a sentence for each that it can't."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from twofold.errors import TwofoldError
from twofold.nn.factored_linear import FactoredLinear
from twofold.nn.sliced_linear import SlicedLinear

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
    form = settings.get("form", "plain")
    if "bits" in settings or "group" in settings:
        return "its numbers are integers (--bits)"
    if "basis" in settings:
        return "it shares its basis with other layers"
    if "kept" in settings or form in SlicedLinear.FORMS:
        return "it is sliced"
    if "columns" in settings:
        return "some of its columns are dense"
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
