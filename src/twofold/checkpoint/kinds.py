"""The kind of a stored layer, in checkpoints that name it and in those of before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OLD_FORMS = {  # of formats up to 4 → kind
    "kept-rows": "sliced", "kept-columns": "sliced", "dense": "quantized", "corrected": "corrected",
    "embedding": "embedding", "tied": "tied",
}  # fmt: skip
OLD_KEYS = {"basis": "shared", "columns": "dense-columns"}


def kind_of(settings: Mapping[str, Any]) -> str:
    """Return the kind of a storage layer; formats up to 4 do not name it, and it follows from what they say."""
    if "kind" in settings:
        return str(settings["kind"])
    form = str(settings.get("form"))
    if form in OLD_FORMS:
        return OLD_FORMS[form]
    return next((kind for key, kind in OLD_KEYS.items() if key in settings), "factored")
