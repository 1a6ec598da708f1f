"""The output layer in a training: run on the learnt positions alone, a few at a time, or as TRL's fused head wants it.

TRL's head scores all positions where it has no kernel of its own, in tiles of a size that is fixed: on SmolLM2-135M that takes
more memory than the activations of all layers. TRL multiplies by ``lm_head.weight``, too, which layers of ours do not have.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from twofold.model.blocks import input_before
from twofold.model.frozen import evaluating, no_cache
from twofold.model.head import find_head, output_linear
from twofold.nn.compact import CompactLinear
from twofold.task.output.distillation import divergence

POSITIONS = 128  # whose logits are made at once
PROBED = 16  # tokens, by which the layer that makes the logits is known
# Settings by which a model scales or bounds its logits; TRL knows them, too.
SCALED = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


@dataclass(frozen=True)
class DenseHead:
    """What TRL asks of an output layer."""

    weight: Tensor  # (vocabulary, width)
    bias: Tensor | None  # (vocabulary,)


def dense_head(layer: CompactLinear) -> DenseHead:
    """Compute the weight of a factored or rounded output layer from the identity, so that gradients reach its factors."""
    bias = layer.bias
    columns: Tensor = layer(torch.eye(layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device))
    return DenseHead((columns if bias is None else columns - bias).T, bias)


def fuse_compact_head(model: Any) -> None:
    """Let TRL's fused forward see a dense output layer where the model's own is one of ours; other models are left alone."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base.get_output_embeddings(), CompactLinear):
        return
    forward = base.forward

    @functools.wraps(forward)
    def with_dense_head(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return forward(*args, **kwargs)
        head = dense_head(base.get_output_embeddings())
        base.get_output_embeddings = lambda: head
        try:
            return forward(*args, fused_lm_head=True, **kwargs)
        finally:
            del base.get_output_embeddings

    base.forward = with_dense_head


def plain_head(model: Any, device: torch.device) -> nn.Linear | None:
    """Return the output layer, if by all that the model says its outputs are the logits, and TRL has no kernel for the device."""
    config = model.config.get_text_config()
    if device.type != "cpu" or any(getattr(config, name, None) not in (None, 1, 1.0) for name in SCALED):
        return None
    if getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0):
        return None  # TRL adds the loss of the router
    head = output_linear(model)
    if head is None:
        return None
    trained = any(parameter.requires_grad for parameter in head.parameters())
    # In a narrow dtype the gradient of its weight would be summed up in that dtype.
    return None if trained and head.weight.dtype != torch.float32 else head


@torch.no_grad()
def row_head(
    model: Any,
    ids: Tensor,  # (1, length)
) -> nn.Linear | None:
    """Return ``plain_head``, if the outputs on a row's first tokens are the logits, too."""
    if plain_head(model, ids.device) is None:
        return None

    def run() -> Any:
        return model(input_ids=ids[:, :PROBED], **no_cache(model))

    with evaluating(model):
        return find_head(model, run, run().logits, trained=True)


def learnt_loss(
    model: Any,
    head: nn.Linear,
    inputs: dict[str, Any],  # of the model, and "labels" (rows, length), -100 where nothing is learnt
) -> tuple[Tensor, int] | None:
    """Return the summed cross-entropy of the learnt tokens in nats, and how many they are; None if there are none."""
    features = dict(inputs)
    labels = features.pop("labels")[:, 1:].flatten()
    learnt = (labels >= 0).nonzero().flatten()
    if not len(learnt):
        return None
    states = input_before(head, lambda: model(**features, **no_cache(model)))
    assert states is not None
    states, labels = states[:, :-1].flatten(0, 1).index_select(0, learnt), labels[learnt]
    if any(parameter.requires_grad for parameter in head.parameters()):
        parts = zip(torch.split(states, POSITIONS), torch.split(labels, POSITIONS), strict=True)
        summed = torch.stack([checkpoint(_cross_entropy, head, *part, use_reentrant=False) for part in parts]).sum()
    else:  # with its gradient in one pass; of no divergence, since no token of a teacher is given
        none = states.new_empty(len(states), 0)
        summed = divergence(states, none, none.long(), labels=labels, share=1.0, head=head) * len(states)
    return summed, len(learnt)


def _cross_entropy(
    head: nn.Linear,
    states: Tensor,  # (positions, width)
    labels: Tensor,  # (positions,)
) -> Tensor:  # ()
    return F.cross_entropy(head(states).float(), labels, reduction="sum")
