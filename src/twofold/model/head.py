"""The last layer of a language model apart from the rest, so that its logits need not all be kept."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from twofold.model.blocks import input_before
from twofold.model.frozen import no_cache


def before_head(
    model: Any,
    head: nn.Module,
    ids: Tensor,  # (count, length)
) -> Tensor | None:  # (count, length, width)
    """What the head is given, with its graph; the head itself is not run. None if it is not called."""
    return input_before(head, lambda: model(input_ids=ids.to(model.device), **no_cache(model)))


def output_linear(model: Any) -> nn.Linear | None:
    """The output layer, where it is a plain linear one."""
    head = None
    with suppress(NotImplementedError, AttributeError):  # a model of several inputs
        head = model.get_output_embeddings()
    return head if type(head) is nn.Linear else None


@torch.no_grad()
def find_head(
    model: Any,
    ids: Tensor,  # (1, length)
    logits: Tensor,  # (1, length, vocabulary), of these tokens
    *,
    trained: bool = False,
) -> nn.Linear | None:
    """The linear layer whose outputs are the logits as they are; None if something comes after it.

    Args:
        trained: a layer that is to be trained will do, too.
    """
    head = output_linear(model)
    if head is None:
        return None
    if not trained and any(parameter.requires_grad for parameter in head.parameters()):
        return None
    states = before_head(model, head, ids)
    if states is None or states.shape[:-1] != logits.shape[:-1] or states.shape[-1] != head.in_features:
        return None
    own = head(states)
    return (
        head
        if own.shape == logits.shape and torch.allclose(own.float(), logits.float(), rtol=1e-3, atol=1e-3)
        else None
    )
