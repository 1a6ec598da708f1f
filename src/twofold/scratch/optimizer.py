"""AdamW for models with factored layers: a step of the factors changes their product as much as one of a dense weight would.

AdamW moves every number by about its rate η, so a step of a dense weight (m, n) has a spectral norm up to η√(mn). With W′ = AB
a step ΔB of the factor B (r, n), of norm up to η√(rn), changes the product by A ΔB, of norm up to ‖A‖₂ η√(rn): the more, the
larger A has grown. Divided by ‖A‖₂ √(r/m) it changes the product as a dense step does, and so does a step of A divided by
‖B‖₂ √(r/n). The norms are those of the moment, as in Spectron (arXiv 2602.12429), which divides the steps of both factors by ‖A‖₂ + ‖B‖₂ + 1,
with another optimizer.

Weight decay by its gradient on the product, λ/2 ‖AB‖²_F, is that of Khodak et al. (arXiv 2105.01029), "Frobenius decay".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.nn import FactoredLinear, IntMatrix
from twofold.tune.bound import BoundedUpdate, spectral_norm

Scale = Literal["product", "bound", "none"]
Decay = Literal["product", "factors"]
BOUND = 0.02  # of scale="bound", as a share of the product's own norm
BETAS = (0.9, 0.95)


def training_optimizer(
    model: nn.Module,
    *,
    lr: float = 3e-3,
    weight_decay: float = 0.0,
    scale: Scale = "product",
    decay: Decay = "product",
    betas: tuple[float, float] = BETAS,
    bound: float = BOUND,
) -> torch.optim.AdamW:
    """AdamW over what a model trains, for transformers' ``Trainer(optimizers=(optimizer, None))`` or any other loop.

    Args:
        model: with or without factored layers; dense weights are trained as AdamW does, vectors without weight decay.
        lr: the highest rate, of dense weights and products alike; schedulers change it as always.
        scale: "product" scales the rates of the factors (see the top of this file), "bound" shortens steps that would change a
            product by more than a share ``bound`` of its own norm, "none" is AdamW as it is.
        decay: whether the weight decay of factored layers is that of the product or of each factor.

    Raises:
        TwofoldError: for a setting that there is not, or a model that can't be trained.
    """
    for name, value, known in (
        ("scale", scale, ("product", "bound", "none")),
        ("decay", decay, ("product", "factors")),
    ):
        if value not in known:
            raise TwofoldError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if not 0 < lr < math.inf or not 0 <= weight_decay < math.inf:
        raise TwofoldError(f"lr must be above 0 and weight_decay not below 0, got {lr!r} and {weight_decay!r}")
    if any(isinstance(module, IntMatrix) for module in model.modules()):
        raise TwofoldError("integers can't be trained; take the model that was factorized without bits")
    layers = dict(factored_layers(model)) if scale != "none" or decay == "product" else {}
    factors = {id(w) for layer in layers.values() for w in (layer.reduce.weight, layer.expand.weight)}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in factors]
    if not rest and not layers:
        raise TwofoldError("the model has no parameter that is trained")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() > 1]},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    own = 0.0 if decay == "product" else weight_decay
    for layer in layers.values():
        groups += [{"params": [w], "weight_decay": own} for w in (layer.reduce.weight, layer.expand.weight)]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, weight_decay=weight_decay)
    if scale == "product":
        ScaledSteps(list(layers.values())).attach(optimizer)
    elif scale == "bound":
        BoundedUpdate(dict(layers), bound).attach(optimizer)
    if decay == "product" and weight_decay > 0:
        ProductDecay(list(layers.values()), weight_decay).attach(optimizer)
    return optimizer


def factored_layers(model: nn.Module) -> Iterator[tuple[str, FactoredLinear]]:
    """The layers with two plain factors that are both trained.

    Raises:
        TwofoldError: naming the first layer whose factors are no plain product, which these rules do not know.
    """
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear) and any(p.requires_grad for p in module.parameters()):
            if module.form != "plain":
                raise TwofoldError(
                    f"{name} has factors of the form {module.form}; a training from scratch takes plain ones (form='plain')"
                )
            if not (module.reduce.weight.requires_grad and module.expand.weight.requires_grad):
                continue
            yield name, module


def step_scales(layer: FactoredLinear) -> tuple[float, float]:
    """By what the rates of ``reduce`` (r, n) and ``expand`` (m, r) are multiplied.

    √(m/r) / ‖A‖₂ and √(n/r) / ‖B‖₂, with norms that are right to some percent, from below.
    """
    rank = layer.rank
    b, a = spectral_norm(layer.reduce.weight), spectral_norm(layer.expand.weight)
    tiny = 1e-12
    return math.sqrt(layer.out_features / rank) / max(a, tiny), math.sqrt(layer.in_features / rank) / max(b, tiny)


class ScaledSteps:
    """Multiplies the rate of every factor for the time of a step; a scheduler sees the rates as they were set."""

    def __init__(self, layers: list[FactoredLinear]) -> None:
        self.layers = layers
        self._rates: list[tuple[dict[str, Any], float]] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale the rates of an optimizer in whose groups every factor stands alone."""
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        groups = {id(group["params"][0]): group for group in optimizer.param_groups if len(group["params"]) == 1}
        for layer in self.layers:
            weights = (layer.reduce.weight, layer.expand.weight)
            for weight, share in zip(weights, step_scales(layer), strict=True):
                group = groups[id(weight)]
                self._rates.append((group, group["lr"]))
                group["lr"] = group["lr"] * share

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates.clear()


class ProductDecay:
    """Weight decay of products, apart from the gradient as AdamW's own: a step of rate η along −λ ∂/∂(A, B) ½‖AB‖²_F."""

    def __init__(self, layers: list[FactoredLinear], weight_decay: float) -> None:
        self.layers, self.weight_decay = layers, weight_decay

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Decay the products after each step of an optimizer, at the rate of their group."""
        optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
        for layer in self.layers:
            reduce, expand = layer.reduce.weight, layer.expand.weight
            down, up = _decay_gradients(reduce, expand)
            reduce.add_(down, alpha=-rates[id(reduce)] * self.weight_decay)
            expand.add_(up, alpha=-rates[id(expand)] * self.weight_decay)


def _decay_gradients(
    reduce: Tensor,  # B (r, n)
    expand: Tensor,  # A (m, r)
) -> tuple[Tensor, Tensor]:
    """Of ½‖AB‖²_F: AᵀA B (r, n) and A BBᵀ (m, r), by way of matrices (r, r)."""
    return (expand.mT @ expand) @ reduce, expand @ (reduce @ reduce.mT)
