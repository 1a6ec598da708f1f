"""Sentences as token ids, each one batch of its own, so that nothing is padded."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from twofold.model.load import check_ids, window_limit
from twofold.task.text.row import BadRowError


def ids_of(tokenizer: Any, loaded: Any, *texts: Any, **how: Any) -> dict[str, Tensor]:
    """Return a sentence, or a pair of them, as a batch of one, cut to the positions that the model has.

    Args:
        how: more for the tokenizer.

    Raises:
        BadRowError: if there is nothing in it.
    """
    for text in texts:
        if not isinstance(text, str | list) or not text or (isinstance(text, str) and not text.strip()):
            raise BadRowError(f"its text is empty or no text: {text!r}")
    limit = {"truncation": True, "max_length": longest} if (longest := window_limit(loaded.model)) else {}
    encoded = tokenizer(*texts, return_tensors="pt", **limit, **how)
    check_ids(encoded["input_ids"], loaded)
    # All of it is looked at.
    return {name: tensor for name, tensor in encoded.items() if name in ("input_ids", "token_type_ids")}
