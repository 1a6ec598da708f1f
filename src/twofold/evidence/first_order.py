"""How the loss changes to first order when one component of a weight is left out: ZS-SVD's scores.

For the mean loss ℓ of the text's own next tokens and component i, W_i, of a weight W: d_i = −⟨∂ℓ/∂W, W_i⟩. Labels sampled from
the model would not do: in the mean their gradient is zero, whatever the weight.

The gradient (m, n) itself is never held. On the side "rows" W_i = b bᵀ M W, with b column i of the basis and M the metric, so
d_i = −bᵀ M K b with K = W (∂ℓ/∂W)ᵀ = E[y gᵀ] (m, m); on "columns" W_i = W M b bᵀ and d_i = −bᵀ K M b with K = (∂ℓ/∂W)ᵀ W =
E[x zᵀ] (n, n), z = Wᵀ g. Sums over tokens of products that stand on the smaller side, as the moments are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from twofold.calibrate.statistics import rows_of
from twofold.evidence.base import Measurement
from twofold.host.progress import progress
from twofold.linalg.metric import Metric, metric_product
from twofold.linalg.spectrum import Spectrum, smaller_side
from twofold.model.frozen import frozen
from twofold.model.kinds import Sink, Taker, dense_weight, watch
from twofold.model.target import Target


def component_scores(
    work: Measurement,
) -> dict[str, NDArray[np.float64]]:  # (k,) of each weight, in the order of its spectrum
    """Return the first-order change of the loss, in nats a prediction, without each component of each weight."""
    products, scores = _gradient_products(work), {}
    for target in work.targets:
        problem, spectrum, _ = work.decomposed(target)
        scores[target.name] = _without_each(spectrum, problem.metric, products.pop(target.name)).cpu().double().numpy()
    return scores


def _without_each(
    spectrum: Spectrum,
    metric: Metric,  # over the k directions of the smaller side
    product: Tensor,  # K (k, k)
) -> Tensor:  # (k,)
    """Return −bᵀ M K b, or −bᵀ K M b, for every column b of the basis; zero where the spectrum is."""
    basis = spectrum.basis.to(spectrum.values.dtype)
    product = product.to(basis)
    weighed = metric_product(metric, basis)
    changes = (weighed * (product @ basis)).sum(0) if spectrum.side == "rows" else (basis * (product @ weighed)).sum(0)
    return torch.where(spectrum.values > 0, -changes, 0)


def _gradient_products(work: Measurement) -> dict[str, Tensor]:  # K (k, k) of each weight
    """Return K of every weight for the mean loss of the samples' own labels, from one pass forward and backward."""
    assert work.samples is not None and work.task is not None
    model, samples, task = work.model, work.samples, work.task
    wide = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    sums, hooks = {}, []
    for target in work.targets:
        k = min(target.out_features, target.in_features)
        sums[target.name] = torch.zeros(k, k, dtype=wide, device=model.device)
        mean = work.decomposition.mean(target)
        hooks += watch(model.get_submodule(target.name), _adding(sums[target.name], target, model, mean))
    labels = [task.labels(batch) for batch in samples]
    labelled = sum(map(task.output.known, labels))
    with (
        frozen(model, hooks),
        torch.enable_grad(),
        progress("Gradients", samples.units(0, len(samples)), unit=samples.unit, quiet=work.quiet) as tick,
    ):
        for i, batch in enumerate(samples):
            own = labels[i]
            assert own is not None
            loss = task.output.loss(task.outputs(model, batch).to(wide), own) / labelled
            loss.backward()  # type: ignore[no-untyped-call]
            tick(samples.units(i, i + 1))
    return sums


def _adding(
    total: Tensor,
    target: Target,
    model: nn.Module,
    mean: Tensor | None,  # (n,), of inputs that are centred
) -> Sink:
    """Add y gᵀ, or x zᵀ, of every row to K when the gradient g reaches the output."""
    rows = smaller_side(target.out_features, target.in_features) == "rows"

    def called(x: Tensor, product: Callable[[], Tensor]) -> Taker | None:
        left = rows_of(product() if rows else x).to(total)
        weight = dense_weight(model.get_submodule(target.name)).detach()
        if mean is not None:
            taken = mean.to(total)
            left = left - (weight.to(total) @ taken if rows else taken)

        def add(gradient: Tensor) -> None:
            g = rows_of(gradient).to(total)
            total.addmm_(left.T, g if rows else g @ weight.to(total))

        return add

    return Sink(called, starts=True)
