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
from torch import Tensor, nn

from twofold.evidence.base import Measurement
from twofold.host.progress import progress
from twofold.linalg.metric import metric_product
from twofold.model.frozen import frozen, no_cache, start_graph
from twofold.model.weights import dense_weight
from twofold.task.curvature import loss_gradient, stream


def rank_losses(work: Measurement) -> dict[str, NDArray[np.float64]]:  # (k + 1,) of each weight, by rank from 0 on
    """Return ½ E[(gᵀ ΔW x)²] of every rank, in nats per token, from one pass forward and backward over the windows."""
    assert work.windows is not None
    model, windows = work.model, work.windows.ids
    sums: dict[str, Tensor] = {}
    hooks = []
    for target in work.targets:
        module = model.get_submodule(target.name)
        problem = work.made.problem(model, target)
        spectrum = work.made.spectrum(target, problem)
        basis = spectrum.basis.to(problem.gram)
        basis = basis * (spectrum.values.to(basis) > 0)
        weighed = metric_product(problem.metric, basis)
        weight = dense_weight(module).detach()
        if spectrum.side == "rows":
            left, right = basis, weight.to(basis).T @ weighed  # g · left (m, k), x · right (n, k)
        else:
            left, right = weight.to(basis) @ weighed, basis
        sums[target.name] = torch.zeros(basis.shape[1] + 1, dtype=torch.float64, device=weight.device)
        hooks.append(module.register_forward_hook(_adding(sums[target.name], left.to(weight), right.to(weight))))
    hooks.append(start_graph(model))
    with (
        frozen(model, hooks),
        torch.enable_grad(),
        progress("Losses by rank", windows.numel(), unit="tokens", quiet=work.quiet) as tick,
    ):
        for i, ids in enumerate(windows[:, None].to(model.device)):
            logits = model(input_ids=ids, **no_cache(model)).logits
            logits.backward(loss_gradient(logits, ids, stream(work.settings.seed, i), work.settings.curvature))
            tick(ids.numel())
    return {name: (total / (2 * windows.numel())).cpu().numpy() for name, total in sums.items()}


def _adding(
    total: Tensor,  # (k + 1,)
    left: Tensor,  # (out, k)
    right: Tensor,  # (in, k)
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A hook that adds (gᵀ ΔW x)² of every token for every rank when the gradient g reaches the output."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        x = args[0].detach().reshape(-1, args[0].shape[-1]) @ right

        def add(gradient: Tensor) -> None:
            parts = x * (gradient.detach().reshape(-1, gradient.shape[-1]) @ left)  # (tokens, k)
            left_out = parts.flip(1).cumsum(1).flip(1)  # of rank 0, 1, …
            total[:-1] += left_out.double().square().sum(0)

        output.register_hook(add)  # type: ignore[no-untyped-call]

    return hook
