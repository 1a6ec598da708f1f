"""The last layer of a language model apart from the rest, so that its logits need not all be kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from twofold.calibrate.collect import no_cache


class _Enough(Exception):  # noqa: N818, it is no error
    pass


def before_head(
    model: Any,
    head: nn.Module,
    ids: Tensor,  # (count, length)
) -> Tensor | None:  # (count, length, width)
    """What the head is given, with its graph; the head itself is not run. None if it is not called."""
    kept: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        kept.extend(arg for arg in args[:1] if isinstance(arg, Tensor))
        raise _Enough

    handle = head.register_forward_pre_hook(stop)
    try:
        model(input_ids=ids.to(model.device), **no_cache(model))
    except _Enough:
        pass
    finally:
        handle.remove()
    return kept[0] if kept else None


@torch.no_grad()
def find_head(
    model: Any,
    ids: Tensor,  # (1, length)
    logits: Tensor,  # (1, length, vocabulary), of these tokens
) -> nn.Linear | None:
    """The linear layer whose outputs are the logits as they are; None if something comes after it, or it is to be trained."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        return None
    states = before_head(model, head, ids)
    if states is None or states.shape[:-1] != logits.shape[:-1] or states.shape[-1] != head.in_features:
        return None
    own = head(states)
    return head if own.shape == logits.shape and torch.allclose(own, logits, rtol=1e-3, atol=1e-3) else None
