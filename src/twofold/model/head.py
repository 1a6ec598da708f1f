"""The last layer of a language model apart from the rest, so that its logits need not all be kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from twofold.model.blocks import input_before


def output_layer(model: Any) -> Any:
    """Return the layer that turns the last hidden states into outputs; None if the model has none or does not say."""
    with suppress(NotImplementedError, AttributeError):  # a model of several inputs, or of another library
        return model.get_output_embeddings()
    return None


def output_linear(model: Any) -> nn.Linear | None:
    """Return the output layer, where it is a plain linear one."""
    head = output_layer(model)
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
    if head is None or (not trained and any(parameter.requires_grad for parameter in head.parameters())):
        return None
    states = input_before(head, run)
    if states is None or states.shape[-1] != head.in_features:
        return None
    logits, expected = head(states).flatten(0, -2).float(), outputs.flatten(0, -2).float()
    return head if logits.shape == expected.shape and torch.allclose(logits, expected, rtol=1e-3, atol=1e-3) else None
