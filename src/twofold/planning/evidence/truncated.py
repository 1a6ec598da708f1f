"""The perplexity of a model in which one weight alone is truncated, at each share of a grid: ASVD's sensitivities."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from twofold.allocate.sensitivity import GRID
from twofold.calibrate.moments import Moments
from twofold.decompose.decompose import layer_problem
from twofold.decompose.spectra import Spectra
from twofold.host.progress import progress
from twofold.linalg.gauge import gauge_rank
from twofold.linalg.spectrum import truncate
from twofold.model.weights import Target, dense_weight
from twofold.objectives.base import Objective
from twofold.task.quality import Logits, quality, score


@torch.no_grad()
def sensitivities(
    model: nn.Module,
    logits: Logits,
    targets: list[Target],
    windows: Tensor,  # (count, window)
    spectra: Spectra,
    moments: Moments | None,
    objective: Objective,
    damping: float,
    form: str,
    known: dict[str, list[float]],
    keep: Callable[[dict[str, list[float]]], None],
    *,
    quiet: bool = False,
) -> dict[str, list[float]]:
    """Measure every weight at every share of the grid; one forward pass over the windows each.

    Args:
        form: in which a share is stored: plain, or the gauge form.
        known: what was measured before, by the name of the weight.
        keep: is given all that is known after each weight.
    """
    found = {target.name: known[target.name] for target in targets if target.name in known}
    total, done = len(targets) * len(GRID), len(found) * len(GRID)
    with progress("Truncating one weight at a time", total, done=done, unit="measurements", quiet=quiet) as tick:
        for target in targets:
            if target.name in found:
                continue
            module = model.get_submodule(target.name)
            problem = layer_problem(model, target, moments, objective, damping)
            spectrum = spectra.get(target, problem.gram.dtype, problem.gram.device)
            weight = dense_weight(module).detach()
            perplexities = []
            for share in GRID:
                rank = rank_within(target, share, form)
                left, right = truncate(weight, spectrum, problem.metric, rank)
                perplexities.append(_perplexity(module, (left @ right).to(weight), target.transposed, logits, windows))
                tick()
            found[target.name] = perplexities
            keep(found)
    return found


def rank_within(target: Target, share: float, form: str) -> int:
    """The largest rank that stores at most a share of a weight; at least 1."""
    m, n = target.out_features, target.in_features
    allowed = share * target.size * (1 + 1e-9)
    return max(int(allowed / (m + n)) if form == "plain" else gauge_rank(m, n, allowed), 1)


def _perplexity(module: nn.Module, weight: Tensor, transposed: bool, logits: Logits, windows: Tensor) -> float:
    """The perplexity with another weight (out, in) in a layer, which then gets its own back."""
    parameter = module.weight
    assert isinstance(parameter, Tensor)
    own = parameter.data
    parameter.data = (weight.T if transposed else weight).contiguous()
    try:
        loss = sum(score(logits(ids), ids)[0] for ids in windows[:, None])
    finally:
        parameter.data = own
    return math.inf if math.isnan(loss) else quality(loss, windows).perplexity
