"""The last layer of a language model apart from the rest, so that its logits need not all be kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from twofold.model.blocks import input_before


def before_head(head: nn.Module, run: Callable[[], object]) -> Tensor | None:  # (..., width)
    """Return what the head is given when the model is run, with its graph, without running the head; None if it is not called."""
    return input_before(head, run)


def output_linear(model: Any) -> nn.Linear | None:
    """The output layer, where it is a plain linear one."""
    head = None
    with suppress(NotImplementedError, AttributeError):  # a model of several inputs
        head = model.get_output_embeddings()
    return head if type(head) is nn.Linear else None


@torch.no_grad()
def find_head(
    model: Any,
    run: Callable[[], object],
    outputs: Tensor,  # (..., classes), of that run
    *,
    trained: bool = False,
) -> nn.Linear | None:
    """Return the linear layer whose outputs are the model's as they are; None if something comes after it.

    Args:
        run: runs the model on a small batch.
        trained: a layer that is to be trained will do, too.
    """
    head = output_linear(model)
    if head is None:
        return None
    if not trained and any(parameter.requires_grad for parameter in head.parameters()):
        return None
    states = before_head(head, run)
    if states is None or states.shape[-1] != head.in_features:
        return None
    own, given = head(states).flatten(0, -2).float(), outputs.flatten(0, -2).float()
    return head if own.shape == given.shape and torch.allclose(own, given, rtol=1e-3, atol=1e-3) else None
