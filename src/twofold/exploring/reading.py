"""What two models make of the same text: how far apart their predictions are, token by token, and what each would write next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BEST = 8  # candidates of each model for the next token


def divergences(dense: Tensor, factored: Tensor) -> Tensor:
    """Return KL(dense ‖ factored) of each prediction, in nats; what dense rules out counts nothing.

    Args:
        dense, factored: log-probabilities (predictions, vocabulary).
    """
    share = dense.exp()
    return torch.where(share > 0, share * (dense - factored), 0.0).sum(-1).clamp(min=0)


def compare_readings(
    ids: list[int],
    dense: Tensor,  # (tokens, vocabulary), log-probabilities of the token after each
    factored: Tensor,  # (tokens, vocabulary)
    tokenizer: Any,
) -> dict[str, Any]:
    """Return what the page shows of a text, ready for JSON.

    A token has the divergence of the two predictions for its place, what each gave it, and what each held for most likely;
    the first token of all was not predicted. ``next`` has the candidates for what comes after the text, the best of either.
    """
    apart = divergences(dense, factored).tolist()
    first, second = dense.argmax(-1).tolist(), factored.argmax(-1).tolist()
    tokens: list[dict[str, Any]] = [{"text": piece(tokenizer, None, ids[0])}]
    for i, token in enumerate(ids[1:]):
        tokens.append({
            "text": piece(tokenizer, ids[i], token),
            "divergence": apart[i],
            "dense": float(dense[i, token].exp()),
            "factored": float(factored[i, token].exp()),
            "best": [piece(tokenizer, ids[i], first[i]), piece(tokenizer, ids[i], second[i])],
        })  # fmt: skip
    count = min(BEST, dense.shape[-1])
    either = {*dense[-1].topk(count).indices.tolist(), *factored[-1].topk(count).indices.tolist()}
    candidates = [
        {
            "text": piece(tokenizer, ids[-1], i),
            "dense": float(dense[-1, i].exp()),
            "factored": float(factored[-1, i].exp()),
        }
        for i in sorted(either, key=lambda i: -float(dense[-1, i]))
    ]
    return {
        "tokens": tokens,
        "mean": sum(apart[:-1]) / (len(ids) - 1) if len(ids) > 1 else None,
        "same": sum(a == b for a, b in zip(first[:-1], second[:-1], strict=True)),
        "next": {"divergence": apart[-1], "candidates": candidates},
    }


def piece(tokenizer: Any, before: int | None, token: int) -> str:
    """Return what a token adds to a text; a tokenizer may write a space where another token stands before it.

    A part of a character, which is no text, is told by its id.
    """

    def text(*ids: int) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    added = text(token)
    if before is not None and not (start := text(before)).endswith("\ufffd"):
        both = text(before, token)
        added = both[len(start) :] if both.startswith(start) else added
    return f"\ufffd{token}" if added == "\ufffd" else added
