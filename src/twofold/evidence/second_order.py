"""What each rank of a weight loses to second order, measured token by token.

For g the gradient at the output (its second moment is the curvature), x the input and ΔW what a rank leaves out, the divergence
grows by ½ E[(gᵀ ΔW x)²]. With W_i the part of component i, gᵀ W_i x is (gᵀ b)(bᵀ M W x) on the side "rows" and (gᵀ W M b)(bᵀ x)
on "columns", b column i of the basis and M the metric; its sums from the last component on are gᵀ ΔW x for every rank at once.
K-FAC's Kronecker product takes g and x for independent of one another; this does not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twofold.calibrate.statistics import rows_of
from twofold.evidence.base import Measurement
from twofold.host.progress import progress
from twofold.linalg.metric import metric_product
from twofold.model.frozen import frozen
from twofold.model.kinds import Sink, Taker, watch
from twofold.task.output.curvature import stream


def rank_losses(work: Measurement) -> dict[str, NDArray[np.float64]]:  # (k + 1,) of each weight, by rank from 0 on
    """Return ½ E[(gᵀ ΔW x)²] of every rank, in nats a prediction, from one pass forward and backward over the samples."""
    assert work.samples is not None and work.task is not None
    model, samples, task = work.model, work.samples, work.task
    sums, hooks = {}, []
    for target in work.targets:
        problem, spectrum, weight = work.decomposed(target)
        basis = spectrum.basis.to(problem.gram)
        basis = basis * (spectrum.values.to(basis) > 0)
        weighed = metric_product(problem.metric, basis)
        if spectrum.side == "rows":
            left, right = basis, weight.to(basis).T @ weighed  # g · left (m, k), x · right (n, k)
        else:
            left, right = weight.to(basis) @ weighed, basis
        total = sums[target.name] = torch.zeros(basis.shape[1] + 1, dtype=torch.float64, device=weight.device)
        mean = None if problem.mean is None else problem.mean.to(weight)
        hooks += watch(model.get_submodule(target.name), _adding(total, left.to(weight), right.to(weight), mean))
    with (
        frozen(model, hooks),
        torch.enable_grad(),
        progress("Losses by rank", samples.units(0, len(samples)), unit=samples.unit, quiet=work.quiet) as tick,
    ):
        for i, batch in enumerate(samples):
            outputs = task.outputs(model, batch)
            drawn = stream(work.settings.seed, i)
            outputs.backward(task.output.probe(outputs, task.labels(batch), drawn, work.settings.curvature))  # type: ignore[no-untyped-call]
            tick(samples.units(i, i + 1))
    return {name: (total / (2 * samples.predictions)).cpu().numpy() for name, total in sums.items()}


def _adding(
    total: Tensor,  # (k + 1,)
    left: Tensor,  # (out, k)
    right: Tensor,  # (in, k)
    mean: Tensor | None,  # (in,), of inputs that are centred
) -> Sink:
    """Add (gᵀ ΔW x)² of every row for every rank when the gradient g reaches the output."""

    def called(x: Tensor, product: Callable[[], Tensor]) -> Taker:
        rows = rows_of(x)
        along = (rows if mean is None else rows - mean) @ right

        def add(gradient: Tensor) -> None:
            parts = along * (rows_of(gradient) @ left)  # (rows, k)
            left_out = parts.flip(1).cumsum(1).flip(1)  # of rank 0, 1, …
            total[:-1] += left_out.double().square().sum(0)

        return add

    return Sink(called, starts=True)
