"""How the loss changes to first order when one component of a weight is left out: ZS-SVD's scores.

For the mean loss ℓ of the text's own next tokens and component i, W_i, of a weight W: d_i = −⟨∂ℓ/∂W, W_i⟩. Labels sampled from
the model would not do: in the mean their gradient is zero, whatever the weight.

The gradient (m, n) itself is never held. On the side "rows" W_i = b bᵀ M W, with b column i of the basis and M the metric, so
d_i = −bᵀ M K b with K = W (∂ℓ/∂W)ᵀ = E[y gᵀ] (m, m); on "columns" W_i = W M b bᵀ and d_i = −bᵀ K M b with K = (∂ℓ/∂W)ᵀ W =
E[x zᵀ] (n, n), z = Wᵀ g. Sums over tokens of products that stand on the smaller side, as the moments are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from twofold.evidence.base import Measurement
from twofold.host.progress import progress
from twofold.linalg.metric import Metric, metric_product
from twofold.linalg.spectrum import Spectrum, smaller_side
from twofold.model.frozen import frozen, no_cache, start_graph
from twofold.model.weights import Target, dense_weight


def component_scores(
    work: Measurement,
) -> dict[str, NDArray[np.float64]]:  # (k,) of each weight, in the order of its spectrum
    """Return the first-order change of the loss, in nats per token, without each component of each weight."""
    assert work.windows is not None
    products = gradient_products(work.model, work.targets, work.windows.ids, quiet=work.quiet)
    scores = {}
    for target in work.targets:
        problem = work.made.problem(work.model, target)
        spectrum = work.made.spectrum(target, problem)
        scores[target.name] = without_each(spectrum, problem.metric, products.pop(target.name)).cpu().double().numpy()
    return scores


def without_each(
    spectrum: Spectrum,
    metric: Metric,  # over the k directions of the smaller side
    product: Tensor,  # K (k, k)
) -> Tensor:  # (k,)
    """−bᵀ M K b, or −bᵀ K M b, for every column b of the basis; zero where the spectrum is."""
    basis = spectrum.basis.to(spectrum.values.dtype)
    product = product.to(basis)
    weighed = metric_product(metric, basis)
    changes = (weighed * (product @ basis)).sum(0) if spectrum.side == "rows" else (basis * (product @ weighed)).sum(0)
    return torch.where(spectrum.values > 0, -changes, 0)


def gradient_products(
    model: Any,
    targets: list[Target],
    windows: Tensor,  # (count, window)
    *,
    quiet: bool = False,
) -> dict[str, Tensor]:  # K (k, k) of each weight
    """K of every weight for the mean cross-entropy of the next tokens, from one pass forward and backward over the windows."""
    wide = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    device = model.device
    sums = {}
    for target in targets:
        k = min(target.out_features, target.in_features)
        sums[target.name] = torch.zeros(k, k, dtype=wide, device=device)
    hooks = [model.get_submodule(t.name).register_forward_hook(_adding(sums[t.name], t)) for t in targets]
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    hooks.append(start_graph(model))
    with (
        frozen(model, hooks),
        torch.enable_grad(),
        progress("Gradients", windows.numel(), unit="tokens", quiet=quiet) as tick,
    ):
        for ids in windows[:, None].to(device):
            logits = model(input_ids=ids, **no_cache(model)).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits.to(wide), ids[0, 1:], reduction="sum") / predicted
            loss.backward()  # type: ignore[no-untyped-call]
            tick(ids.numel())
    return sums


def _adding(total: Tensor, target: Target) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A hook that adds y gᵀ, or x zᵀ, of every token to K when the gradient g reaches the output."""

    def flat(x: Tensor) -> Tensor:  # (..., k) to (tokens, k)
        return x.detach().reshape(-1, x.shape[-1]).to(total)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        rows = smaller_side(target.out_features, target.in_features) == "rows"
        bias = getattr(module, "bias", None)
        left = flat(args[0]) if not rows else flat(output if bias is None else output - bias)

        def add(gradient: Tensor) -> None:
            g = flat(gradient)
            total.addmm_(left.T, g if rows else g @ flat(dense_weight(module)))

        output.register_hook(add)  # type: ignore[no-untyped-call]

    return hook
