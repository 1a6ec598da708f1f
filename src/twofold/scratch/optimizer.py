"""AdamW for models with factored layers, whose steps are bounded or scaled by what they do to the product of two factors.

The bound (the default) is that of ``scratch/bound.py``, for dense matrices too: no step changes a matrix or a product by more
than a share of its own spectral norm. Weights that are no matrices (experts in one parameter, convolutions) are not bounded.
The other way scales the rates:

AdamW moves every number by about its rate η, so a step of a dense weight (m, n) has a spectral norm up to η√(mn). With W′ = AB
a step ΔB of the factor B (r, n), of norm up to η√(rn), changes the product by A ΔB, of norm up to ‖A‖₂ η√(rn): the more, the
larger A has grown. Divided by 2 ‖A‖₂ √(r/m), and the step of A by 2 ‖B‖₂ √(r/n), both together change the product by no more
than a dense step may. The norms are those of the moment, as in Spectron (arXiv 2602.12429), which divides the steps of both
factors by ‖A‖₂ + ‖B‖₂ + 1, with another optimizer, and follows the norms by power iteration too.

Weight decay by its gradient on the product, λ/2 ‖AB‖²_F, is that of Khodak et al. (arXiv 2105.01029), "Frobenius decay".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from twofold.errors import TwofoldError
from twofold.nn.int_matrix import IntMatrix
from twofold.nn.layers.factored import FactoredLinear
from twofold.scratch.steps import BoundedSteps, ScaledSteps

Scale = Literal["product", "bound", "none"]
Decay = Literal["product", "factors"]
BOUND = 0.02  # of scale="bound", as a share of the product's own norm
BETAS = (0.9, 0.95)


def training_optimizer(
    model: nn.Module,
    *,
    lr: float = 1e-2,
    embedding_lr: float | None = None,
    weight_decay: float = 0.0,
    scale: Scale = "bound",
    decay: Decay = "product",
    betas: tuple[float, float] = BETAS,
    bound: float = BOUND,
) -> torch.optim.AdamW:
    """Return AdamW over what a model trains, for transformers' ``Trainer(optimizers=(optimizer, None))`` or any other loop.

    Args:
        model: with or without factored layers; dense weights are trained as AdamW does, vectors without weight decay.
        lr: the highest rate, of dense weights and products alike; schedulers change it as always.
        embedding_lr: that of embeddings and the output layer; ``lr`` if it is None.
        scale: "bound" shortens a step that would change a product, or a dense matrix that is no embedding, by more than a
            share ``bound`` of its own spectral norm; "product" scales the rates of the factors (see the top of this file);
            "none" is AdamW as it is.
        decay: whether the weight decay of factored layers is that of the product or of each factor.

    Raises:
        TwofoldError: for a setting that there is not, or a model that can't be trained.
    """
    embedding_lr = lr if embedding_lr is None else embedding_lr
    for name, value, known in (("scale", scale, get_args(Scale)), ("decay", decay, get_args(Decay))):
        if value not in known:
            raise TwofoldError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    for name, rate in (("lr", lr), ("embedding_lr", embedding_lr)):
        if not 0 < rate < math.inf:
            raise TwofoldError(f"{name} must be above 0 and finite, got {rate!r}")
    if not 0 < bound < math.inf:
        raise TwofoldError(f"bound must be above 0 and finite, got {bound!r}; scale='none' bounds nothing")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise TwofoldError(f"betas must be two numbers from 0 to below 1, got {betas!r}")
    if not 0 <= weight_decay < math.inf:
        raise TwofoldError(f"weight_decay must be at least 0 and finite, got {weight_decay!r}")
    if any(isinstance(module, IntMatrix) for module in model.modules()):
        raise TwofoldError("integers can't be trained; take the model that was factorized without bits")
    product_decay = decay == "product" and weight_decay > 0
    layers = dict(factored_layers(model)) if scale != "none" or product_decay else {}
    factors = [weight for layer in layers.values() for weight in (layer.reduce.weight, layer.expand.weight)]
    factored = {id(weight) for weight in factors}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in factored]
    if not rest and not layers:
        raise TwofoldError("the model has no parameter that is trained")
    tables = {id(weight) for weight in embeddings(model)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() > 1 and id(p) not in tables]},
        {"params": [p for p in rest if id(p) in tables], "lr": embedding_lr},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups += [{"params": [w], "weight_decay": 0.0 if product_decay else weight_decay} for w in factors]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, weight_decay=weight_decay)
    if scale == "product":
        ScaledSteps(list(layers.values())).attach(optimizer)
    elif scale == "bound":
        BoundedSteps(layers, [p for p in rest if p.dim() == 2 and id(p) not in tables], bound).attach(optimizer)
    if product_decay:
        ProductDecay(list(layers.values()), weight_decay).attach(optimizer)
    return optimizer


def embeddings(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights of embeddings, and of the output layer."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is output:
            yield module.weight  # type: ignore[misc]


def factored_layers(model: nn.Module) -> Iterator[tuple[str, FactoredLinear]]:
    """Yield the layers with two plain factors that are both trained.

    Raises:
        TwofoldError: naming the first layer whose factors are no plain product, which these rules do not know.
    """
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear) and any(p.requires_grad for p in module.parameters()):
            if module.form != "plain":
                raise TwofoldError(
                    f"{name} has factors of the form {module.form}; a training from scratch takes plain ones (form='plain')"
                )
            if module.reduce.weight.requires_grad and module.expand.weight.requires_grad:
                yield name, module


@dataclass
class ProductDecay:
    """Weight decay of products, apart from the gradient as AdamW's own: a step of rate η along −λ ∂/∂(A, B) ½‖AB‖²_F."""

    layers: list[FactoredLinear]
    weight_decay: float

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Decay the products after each step of an optimizer, at the rate of their group."""
        optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
        for layer in self.layers:
            reduce, expand = layer.reduce.weight, layer.expand.weight
            # The gradients of ½‖AB‖²_F, by way of matrices (r, r).
            down, up = (expand.mT @ expand) @ reduce, expand @ (reduce @ reduce.mT)
            reduce.add_(down, alpha=-rates[id(reduce)] * self.weight_decay)
            expand.add_(up, alpha=-rates[id(expand)] * self.weight_decay)
