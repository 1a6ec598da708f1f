"""AdamW for models with factored layers: a step of the factors changes their product as much as one of a dense weight would.

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
from typing import Any, Literal

import torch
from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.nn import FactoredLinear, IntMatrix
from twofold.tune.bound import BoundedUpdate

Scale = Literal["product", "bound", "none"]
Decay = Literal["product", "factors"]
BOUND = 0.02  # of scale="bound", as a share of the product's own norm
BETAS = (0.9, 0.95)
DIRECTION = "twofold_direction"  # in the optimizer's state of a factor
FIRST_ROUNDS = 30  # of power iteration
TINY = 1e-12


def training_optimizer(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    embedding_lr: float | None = None,
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
        embedding_lr: that of embeddings and the output layer, the same if it is None.
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
    for name, rate in (("lr", lr), ("embedding_lr", lr if embedding_lr is None else embedding_lr)):
        if not 0 < rate < math.inf:
            raise TwofoldError(f"{name} must be above 0 and finite, got {rate!r}")
    if not 0 <= weight_decay < math.inf:
        raise TwofoldError(f"weight_decay must be at least 0 and finite, got {weight_decay!r}")
    if any(isinstance(module, IntMatrix) for module in model.modules()):
        raise TwofoldError("integers can't be trained; take the model that was factorized without bits")
    layers = dict(factored_layers(model)) if scale != "none" or decay == "product" else {}
    factors = {id(w) for layer in layers.values() for w in (layer.reduce.weight, layer.expand.weight)}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in factors]
    if not rest and not layers:
        raise TwofoldError("the model has no parameter that is trained")
    tables = {id(weight) for weight in embeddings(model)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() > 1 and id(p) not in tables]},
        {"params": [p for p in rest if id(p) in tables], "lr": lr if embedding_lr is None else embedding_lr},
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


def embeddings(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of embeddings, and of the output layer."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is output:
            yield module.weight  # type: ignore[misc]


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


class ScaledSteps:
    """Multiplies the rate of every factor for the time of a step; a scheduler sees the rates as they were set.

    The norms are followed by power iteration, one round a step. Its direction is part of the optimizer's state, so that a
    training that is taken up again does the same.
    """

    def __init__(self, layers: list[FactoredLinear]) -> None:
        self.layers = layers
        self._rates: list[tuple[dict[str, Any], float]] = []
        self._directions: list[tuple[Tensor, Tensor]] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale the rates of an optimizer in whose groups every factor stands alone."""
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        groups = {id(group["params"][0]): group for group in optimizer.param_groups if len(group["params"]) == 1}
        for layer in self.layers:
            reduce, expand = layer.reduce.weight, layer.expand.weight
            b, a = (self._norm(optimizer, weight) for weight in (reduce, expand))
            shares = step_scales(layer, a, b)
            for weight, share in zip((reduce, expand), shares, strict=True):
                group = groups[id(weight)]
                self._rates.append((group, group["lr"]))
                group["lr"] = group["lr"] * share

    def _norm(self, optimizer: torch.optim.Optimizer, weight: Tensor) -> float:
        known = optimizer.state[weight].get(DIRECTION) if weight in optimizer.state else None
        norm, direction = power_iteration(weight, known)
        self._directions.append((weight, direction))
        return norm

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        for weight, direction in self._directions:
            if optimizer.state.get(weight):  # AdamW begins a state of its own in an empty one
                optimizer.state[weight][DIRECTION] = direction
        self._rates.clear()
        self._directions.clear()


def step_scales(layer: FactoredLinear, expand_norm: float, reduce_norm: float) -> tuple[float, float]:
    """By what the rates of ``reduce`` (r, n) and ``expand`` (m, r) are multiplied: ½√(m/r) / ‖A‖₂ and ½√(n/r) / ‖B‖₂."""
    m, n, r = layer.out_features, layer.in_features, layer.rank
    return 0.5 * math.sqrt(m / r) / max(expand_norm, TINY), 0.5 * math.sqrt(n / r) / max(reduce_norm, TINY)


def power_iteration(
    weight: Tensor,  # (m, n)
    direction: Tensor | None,  # (n,), of the last call
) -> tuple[float, Tensor]:
    """‖W‖₂ from below, and the direction (n,) to go on from; without one, many rounds from a fixed start."""
    rounds = 1
    if direction is None:
        rounds = FIRST_ROUNDS
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(weight.shape[1], generator=generator).to(weight)
        direction = direction / direction.norm()
    image = weight @ direction
    for _ in range(rounds):
        back = weight.mT @ image
        size = back.norm()
        if not float(size) > 0:  # a weight of zeros
            return 0.0, direction
        direction = back / size
        image = weight @ direction
    return float(image.norm()), direction


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
